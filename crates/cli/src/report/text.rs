//! The report for people: a label and a value on each line.

use super::{FaultTime, Report, Traffic};
use crate::workload::Value;
use indicatif::{BinaryBytes, HumanCount};
use std::fmt;
use std::time::Duration;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let result = if self.verified { "verified" } else { "WRONG" };
        writeln!(f, "{}: {}", self.workload, self.subject)?;
        line(f, "result", format_args!("{result}: {}", self.verdict))?;
        for fact in &self.result {
            line(f, fact.label, format_args!("{}", fact.value))?;
        }
        writeln!(f)?;
        line(f, "time in all", format_args!("{:.2} s", self.elapsed_s))?;
        line(
            f,
            "rung",
            format_args!("{} of 4, {}", self.rung, self.rung_name),
        )?;
        let ratio = self.working_set_bytes as f64 / self.vram_bytes.max(1) as f64;
        let (set, vram) = (
            BinaryBytes(self.working_set_bytes),
            BinaryBytes(self.vram_bytes),
        );
        line(f, "working set", format_args!("{set}, {ratio:.2} x VRAM"))?;
        line(
            f,
            "device",
            format_args!("{vram} of VRAM, {} units", self.units),
        )?;
        fault_line(
            f,
            "device faults",
            self.device_faults,
            &self.device_fault_time,
        )?;
        fault_line(f, "CPU faults", self.cpu_faults, &self.cpu_fault_time)?;
        line(
            f,
            "evictions",
            format_args!("{}", HumanCount(self.evictions)),
        )?;
        if self.not_migrated > 0 {
            let count = HumanCount(self.not_migrated);
            line(
                f,
                "not migrated",
                format_args!("{count} times: mapped in place instead"),
            )?;
        }
        traffic_lines(f, "to device", self.to_device_bytes, &self.to_device)?;
        traffic_lines(f, "to RAM", self.to_ram_bytes, &self.to_ram)?;
        let (ranges, used) = (self.ranges_live, BinaryBytes(self.vram_used_bytes_at_exit));
        line(
            f,
            "left at exit",
            format_args!("{ranges} ranges, {used} of VRAM"),
        )
    }
}

fn line(f: &mut fmt::Formatter<'_>, label: &str, value: fmt::Arguments<'_>) -> fmt::Result {
    writeln!(f, "  {label:<16} {value}")
}

fn fault_line(
    f: &mut fmt::Formatter<'_>,
    label: &str,
    count: u64,
    time: &FaultTime,
) -> fmt::Result {
    if count == 0 {
        return line(f, label, format_args!("none"));
    }
    let count = HumanCount(count);
    let [p50, p99, max] = [time.p50_ns, time.p99_ns, time.max_ns].map(Duration::from_nanos);
    line(
        f,
        label,
        format_args!("{count} (p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?})"),
    )
}

fn traffic_lines(
    f: &mut fmt::Formatter<'_>,
    label: &str,
    bytes: u64,
    traffic: &Traffic,
) -> fmt::Result {
    if bytes == 0 {
        return line(f, label, format_args!("nothing"));
    }
    let gigabytes = traffic.bytes_per_s / 1e9;
    line(
        f,
        label,
        format_args!("{} at {gigabytes:.2} GB/s", BinaryBytes(bytes)),
    )?;
    for (cause, bytes) in traffic
        .bytes_by_cause
        .iter()
        .filter(|(_, bytes)| **bytes > 0)
    {
        line(f, "", format_args!("{cause}: {}", BinaryBytes(*bytes)))?;
    }
    Ok(())
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{}", HumanCount(*count)),
            Self::Id(id) => write!(f, "{id}"),
            Self::Time(time) => write!(f, "{time:.1?}"),
            Self::Rate(rate, unit) => write!(f, "{:.1} {unit}", rate / 1e6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;

    const TEXT: &str = "\
bfs: Kronecker graph, scale 18, edge factor 16, seed 1
  result           verified: levels of a plain search
  vertices         262,144
  searching        1.5s
  speed            2.0 MTEPS

  time in all      3.21 s
  rung             1 of 4, userfaultfd with MOVE
  working set      102.04 MiB, 3.19 x VRAM
  device           32.00 MiB of VRAM, 2 units
  device faults    1,234 (p50 210.0µs, p99 1.2ms, max 9.0ms)
  CPU faults       none
  evictions        78
  to device        3.00 GiB at 2.15 GB/s
                   device fault: 3.00 GiB
  to RAM           3.00 MiB at 0.01 GB/s
                   CPU fault: 1.00 MiB
                   eviction: 2.00 MiB
  left at exit     0 ranges, 0 B of VRAM
";

    #[test]
    fn for_people() {
        assert_eq!(sample().to_string(), TEXT);
    }
}
