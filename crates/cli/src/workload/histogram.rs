//! How often each byte occurs in a file: counted on the device, compared with the CPU's count.
//!
//! The file is read straight into shared memory. A lane counts a chunk of it in tiles, in numbers of its
//! own, and adds them to the common ones at the end.

use super::{Fact, Outcome, Verdict, Workload};
use crate::args::HistogramArgs;
use crate::error::CliError;
use crate::graph::index;
use crate::machine::Context;
use gpusvm::{Lane, LaneError, SvmPtr};
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

/// Bytes that a lane loads at once.
const TILE: usize = 4 << 10;
/// Bytes that a lane counts.
const CHUNK: usize = 64 << 10;
/// Bytes that are read from the file at once.
const READ: usize = 4 << 20;

/// The workload.
#[derive(Debug)]
pub(crate) struct Histogram {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Histogram {
    /// Opens the file.
    pub(crate) fn new(args: &HistogramArgs) -> Result<Self, CliError> {
        let path = args.input.clone();
        let unreadable = |source| CliError::Unreadable {
            path: path.clone(),
            source,
        };
        // A pipe would be waited for: what it is comes before opening it.
        if !path.metadata().map_err(unreadable)?.is_file() {
            return Err(CliError::NotAFile { path });
        }
        let file = File::open(&path).map_err(unreadable)?;
        match file.metadata().map_err(unreadable)?.len() {
            0 => Err(CliError::EmptyFile { path }),
            len => Ok(Self { path, file, len }),
        }
    }

    fn read(&mut self, bytes: &mut [u8], context: &Context<'_>) -> Result<(), CliError> {
        context.progress.stage("reading", self.len);
        for chunk in bytes.chunks_mut(READ) {
            let read = self.file.read_exact(chunk);
            read.map_err(|source| CliError::Unreadable {
                path: self.path.clone(),
                source,
            })?;
            context.progress.step(chunk.len() as u64);
        }
        Ok(())
    }
}

impl Workload for Histogram {
    fn name(&self) -> &'static str {
        "histogram"
    }

    fn subject(&self) -> String {
        self.path.display().to_string()
    }

    fn footprint(&self) -> Option<u64> {
        self.len.checked_add(256 * 8)
    }

    fn run(mut self: Box<Self>, context: &Context<'_>) -> Result<Outcome, CliError> {
        let mut bytes = context.alloc::<u8>(index(self.len))?;
        let counts = context.alloc::<u64>(256)?;
        self.read(&mut bytes, context)?;

        context.progress.open_stage("counting");
        let (input, output, len) = (bytes.device_ptr(), counts.device_ptr(), bytes.len());
        let kernel = move |lane: &mut Lane<'_>| count_chunk(lane, input, len, output);
        // SAFETY: bytes and counts live until the end of this function, and only the device touches
        // them while it counts.
        let time = unsafe { context.launch(len.div_ceil(CHUNK), kernel) }?;

        context.progress.open_stage("verifying");
        let verdict = verify(&bytes, &counts);
        let distinct = counts.iter().filter(|&&count| count > 0).count() as u64;
        let facts = vec![
            Fact::count("bytes", "bytes", self.len),
            Fact::count("distinct_bytes", "distinct bytes", distinct),
            Fact::time("count_s", "counting", time),
            Fact::rate("count_bytes_per_s", "counted", "MB/s", (self.len, time)),
        ];
        Ok(Outcome { verdict, facts })
    }
}

fn count_chunk(
    lane: &mut Lane<'_>,
    input: SvmPtr<u8>,
    len: usize,
    output: SvmPtr<u64>,
) -> Result<(), LaneError> {
    let start = lane.id() * CHUNK;
    let end = len.min(start + CHUNK);
    let mut tile = [0_u8; TILE];
    let mut counts = [0_u64; 256];
    for at in (start..end).step_by(TILE) {
        let tile = &mut tile[..TILE.min(end - at)];
        lane.load_tile(input.add(at), tile)?;
        count(tile, &mut counts);
    }
    for (byte, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        lane.atomic_add(output.add(byte), count)?;
    }
    Ok(())
}

fn count(bytes: &[u8], counts: &mut [u64; 256]) {
    bytes
        .iter()
        .for_each(|&byte| counts[usize::from(byte)] += 1);
}

fn verify(bytes: &[u8], counts: &[u64]) -> Verdict {
    let mut expected = [0; 256];
    count(bytes, &mut expected);
    match counts
        .iter()
        .zip(&expected)
        .position(|(found, want)| found != want)
    {
        None => Verdict::Verified("all 256 counts equal the CPU's".to_owned()),
        Some(byte) => Verdict::Wrong(format!(
            "byte {byte:#04x} was counted {} times, and occurs {} times",
            counts[byte], expected[byte]
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_count_is_found() {
        let mut counts = [0; 256];
        count(b"abracadabra", &mut counts);
        assert!(matches!(
            verify(b"abracadabra", &counts),
            Verdict::Verified(_)
        ));
        counts[0x62] += 1;
        let Verdict::Wrong(text) = verify(b"abracadabra", &counts) else {
            panic!("not found")
        };
        assert_eq!(text, "byte 0x62 was counted 3 times, and occurs 2 times");
    }
}
