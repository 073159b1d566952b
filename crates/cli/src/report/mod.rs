//! What is printed at the end: for people, or one JSON object.

mod text; // for people

use crate::args::Options;
use crate::machine::AtExit;
use crate::workload::{Fact, Outcome, Value, Verdict};
use serde::{Serialize, Serializer};
use std::collections::BTreeMap;
use std::time::Duration;

/// All there is to say about a run. The fields are the keys of the JSON object.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    workload: &'static str,
    subject: String,
    /// Whether the result is right.
    pub(crate) verified: bool,
    /// What it was compared with, or the first place where it is wrong.
    verdict: String,
    elapsed_s: f64,
    rung: u8,
    rung_name: String,
    rung_notice: Option<String>,
    seed: u64,
    units: usize,
    working_set_bytes: u64,
    vram_bytes: u64,
    device_faults: u64,
    cpu_faults: u64,
    evictions: u64,
    /// Times that memory should have moved to the device and was mapped in place instead.
    not_migrated: u64,
    to_device_bytes: u64,
    to_ram_bytes: u64,
    to_device: Traffic,
    to_ram: Traffic,
    to_peer: Traffic,
    device_fault_time: FaultTime,
    cpu_fault_time: FaultTime,
    ranges_live: u64,
    vram_used_bytes_at_exit: u64,
    #[serde(serialize_with = "facts")]
    result: Vec<Fact>,
}

/// What moved in one direction.
#[derive(Debug, Default, Serialize)]
struct Traffic {
    bytes_by_cause: BTreeMap<&'static str, u64>,
    copy_s: f64,
    bytes_per_s: f64,
}

/// How long faults took.
#[derive(Debug, Default, Serialize)]
struct FaultTime {
    p50_ns: u64,
    p99_ns: u64,
    max_ns: u64,
}

impl Report {
    /// The result of a workload.
    pub(crate) fn new(
        (workload, subject): (&'static str, String),
        outcome: Outcome,
        options: &Options,
    ) -> Self {
        let (verified, verdict) = match outcome.verdict {
            Verdict::Verified(text) => (true, text),
            Verdict::Wrong(text) => (false, text),
        };
        Self {
            workload,
            subject,
            verified,
            verdict,
            seed: options.seed,
            units: options.units(),
            result: outcome.facts,
            ..Self::default()
        }
    }

    /// What the machine counted meanwhile.
    pub(crate) fn with_machine(
        self,
        at_exit: &AtExit,
        working_set: u64,
        elapsed: Duration,
    ) -> Self {
        let stats = &at_exit.stats;
        Self {
            elapsed_s: elapsed.as_secs_f64(),
            rung: at_exit.rung.number(),
            rung_name: at_exit.rung.to_string(),
            rung_notice: at_exit.notice.clone(),
            working_set_bytes: working_set,
            vram_bytes: stats.vram_bytes,
            device_faults: stats.device_faults,
            cpu_faults: stats.cpu_faults,
            evictions: stats.evictions,
            not_migrated: stats.not_migrated,
            to_device_bytes: stats.to_device.bytes,
            to_ram_bytes: stats.to_ram.bytes,
            to_device: Traffic::new(&stats.to_device),
            to_ram: Traffic::new(&stats.to_ram),
            to_peer: Traffic::new(&stats.to_peer),
            device_fault_time: FaultTime::new(&stats.device_fault_time),
            cpu_fault_time: FaultTime::new(&stats.cpu_fault_time),
            ranges_live: stats.ranges_live,
            vram_used_bytes_at_exit: stats.vram_used_bytes,
            ..self
        }
    }

    /// One JSON object.
    pub(crate) fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and finite numbers")
    }
}

impl Traffic {
    fn new(moved: &gpusvm::Moved) -> Self {
        let seconds = moved.elapsed.as_secs_f64();
        Self {
            bytes_by_cause: moved.by_cause.iter().copied().collect(),
            copy_s: seconds,
            bytes_per_s: if seconds > 0.0 {
                moved.bytes as f64 / seconds
            } else {
                0.0
            },
        }
    }
}

impl FaultTime {
    fn new(times: &gpusvm::Times) -> Self {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            p50_ns: ns(times.p50),
            p99_ns: ns(times.p99),
            max_ns: ns(times.max),
        }
    }
}

/// One object, a key for each fact.
fn facts<S: Serializer>(facts: &[Fact], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(facts.iter().map(|fact| {
        let value = match fact.value {
            Value::Count(number) | Value::Id(number) => number.into(),
            Value::Time(time) => time.as_secs_f64().into(),
            Value::Rate(rate, _) => serde_json::Value::from(rate),
        };
        (fact.key, value)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A report with something in every line but one.
    pub(super) fn sample() -> Report {
        Report {
            workload: "bfs",
            subject: "Kronecker graph, scale 18, edge factor 16, seed 1".to_owned(),
            verified: true,
            verdict: "levels of a plain search".to_owned(),
            elapsed_s: 3.214,
            rung: 1,
            rung_name: "userfaultfd with MOVE".to_owned(),
            units: 2,
            seed: 1,
            working_set_bytes: 107_000_000,
            vram_bytes: 32 << 20,
            device_faults: 1234,
            evictions: 78,
            to_device_bytes: 3 << 30,
            to_ram_bytes: 3 << 20,
            to_device: Traffic {
                bytes_by_cause: [("device fault", 3 << 30), ("prefetch", 0)].into(),
                copy_s: 1.5,
                bytes_per_s: 2.147_483_648e9,
            },
            to_ram: Traffic {
                bytes_by_cause: [("eviction", 2 << 20), ("CPU fault", 1 << 20)].into(),
                copy_s: 0.5,
                bytes_per_s: 6.29e6,
            },
            device_fault_time: FaultTime {
                p50_ns: 210_000,
                p99_ns: 1_250_000,
                max_ns: 9_000_000,
            },
            result: vec![
                Fact::count("vertices", "vertices", 262_144),
                Fact::time("search_s", "searching", Duration::from_millis(1500)),
                Fact::rate(
                    "teps",
                    "speed",
                    "MTEPS",
                    (3_000_000, Duration::from_millis(1500)),
                ),
            ],
            ..Report::default()
        }
    }

    #[test]
    fn as_json() {
        let json: serde_json::Value = serde_json::from_str(&sample().json()).unwrap();
        assert_eq!(json["workload"], "bfs");
        assert_eq!(json["verified"], true);
        assert_eq!(json["elapsed_s"], 3.214);
        assert_eq!(json["rung_notice"], serde_json::Value::Null);
        assert_eq!(json["to_ram"]["bytes_by_cause"]["eviction"], 2 << 20);
        assert_eq!(json["device_fault_time"]["p99_ns"], 1_250_000);
        assert_eq!(json["result"]["vertices"], 262_144);
        assert_eq!(json["result"]["search_s"], 1.5);
        assert_eq!(json["result"]["teps"], 2e6);
    }
}
