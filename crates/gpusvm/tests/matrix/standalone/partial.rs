//! Half of a buffer that lives on the device goes, and the device writes beside the hole.
//!
//! ```text
//!   0         1/4        1/2        3/4         1     of 2 MiB
//!   [first exec ... goes ...][second exec            ]
//!   [first exec ][ ... goes ... ][ second exec       ]  middle
//! ```
//!
//! What goes is unmapped, or replaced by fresh locked memory, which holds the fence of the second exec.

use super::Test;
use crate::Skip;
use crate::buffer::{Buffer, SharedPage};
use crate::engine::Machine;
use crate::record::{self, Fence, Write};
use crate::sections::Flags;

const LEN: usize = 2 << 20;
const HALF: usize = LEN / 2;

#[derive(Clone, Copy, Debug)]
struct Case {
    atomic: bool,
    middle: bool,
    remap: bool,
    cpu_fault: bool,
}

pub(super) fn tests() -> Vec<Test> {
    let case = |bits: u32| Case {
        atomic: bits & 8 != 0,
        middle: bits & 4 != 0,
        remap: bits & 2 != 0,
        cpu_fault: bits & 1 == 0,
    };
    let test = |case: Case| Test::quick(case.name(), move || case.run());
    (0..16).map(case).map(test).collect()
}

impl Case {
    fn name(self) -> String {
        let atomic = if self.atomic { "atomic-" } else { "" };
        let middle = if self.middle { "middle-" } else { "" };
        let what = if self.remap { "remap" } else { "munmap" };
        let fault = if self.cpu_fault {
            "cpu-fault"
        } else {
            "no-cpu-fault"
        };
        format!("partial-{atomic}{middle}{what}-{fault}")
    }

    fn run(self) -> Result<(), Skip> {
        let machine = Machine::new(1)?;
        let engine = machine.engine(0);
        let buffer = Buffer::map(machine.svm(), LEN, Flags::MMAP);
        let offset = if self.middle { LEN / 4 } else { 0 };
        let behind = offset + HALF;
        let write = if self.atomic {
            Write::Increment
        } else {
            Write::Store
        };
        let records = [buffer.record(0), buffer.record(behind / record::SIZE + 1)];
        for (record, value) in records.into_iter().zip([0x8000_0001, 0x8000_0002]) {
            record.write_list(&[record.data_at()], value, write);
        }
        let page = SharedPage::new();
        let fence = page.fence(0);
        fence.clear();
        engine.wait(engine.exec(records[0], fence), fence);
        assert!(
            machine.stats().vram_used_bytes > 0,
            "it lives on the device"
        );
        if self.cpu_fault {
            assert_eq!(records[0].data(), 0x8000_0001);
        }
        buffer.punch(offset, HALF, self.remap);
        let fence = if self.remap {
            Fence(buffer.at().wrapping_add(offset).cast())
        } else {
            fence
        };
        fence.clear();
        engine.wait(engine.exec(records[1], fence), fence);
        assert_eq!(records[1].data(), 0x8000_0002);
        if self.middle {
            assert_eq!(records[0].data(), 0x8000_0001, "before the hole");
            buffer.check_untouched(record::SIZE, offset);
        }
        buffer.check_untouched(behind, behind + record::SIZE);
        buffer.check_untouched(behind + 2 * record::SIZE, LEN);
        drop(buffer);
        machine.finish(0);
        Ok(())
    }
}
