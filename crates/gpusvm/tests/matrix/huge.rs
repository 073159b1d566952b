//! Huge pages of hugetlbfs, as long as somebody needs them.

use crate::Skip;
use std::sync::Mutex;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Enough for all tests that run at once.
const ENOUGH: u64 = 64;

/// The pool is large enough as long as one of these is there.
#[derive(Debug)]
pub(crate) struct HugePages;

/// Who uses the pool, and how large it was before.
static USERS: Mutex<(usize, u64)> = Mutex::new((0, 0));

impl HugePages {
    /// Has the kernel reserve some, if it may be asked to and there are not enough.
    pub(crate) fn reserve() -> Result<Self, Skip> {
        let mut users = USERS.lock().expect("nobody panics with it");
        if users.0 == 0 {
            let before = size();
            if before < ENOUGH {
                let raised = std::fs::write(POOL, ENOUGH.to_string());
                if raised.is_err() || size() < ENOUGH {
                    let _ = std::fs::write(POOL, before.to_string());
                    let found = size();
                    let text = format!("vm.nr_hugepages is {found}, and cannot be {ENOUGH}");
                    return Err(Skip(text));
                }
            }
            users.1 = before;
        }
        users.0 += 1;
        Ok(Self)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let mut users = USERS.lock().expect("nobody panics with it");
        users.0 -= 1;
        if users.0 == 0 && users.1 < ENOUGH {
            // What cannot be restored stays reserved: no test depends on it.
            let _ = std::fs::write(POOL, users.1.to_string());
        }
    }
}

fn size() -> u64 {
    let text = std::fs::read_to_string(POOL).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
