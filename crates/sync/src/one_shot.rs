//! A step that is to fail once, for who wants to see what becomes of that.

use crate::atomic::{AtomicBool, Ordering};

/// Makes the next step of a kind fail. Who takes the step asks [`OneShot::fires`]; that costs one load
/// where nobody wants it to fail.
#[derive(Debug, Default)]
pub struct OneShot {
    armed: AtomicBool,
}

impl OneShot {
    /// The next step fails.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Release);
    }

    /// No step fails any more.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::Release);
    }

    /// Whether a step is still to fail.
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Acquire)
    }

    /// Whether this step is the one that fails: true once.
    pub fn fires(&self) -> bool {
        self.is_armed() && self.armed.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fires_once_and_only_if_it_is_armed() {
        let shot = OneShot::default();
        assert!(!shot.fires());
        shot.arm();
        assert!(shot.is_armed());
        assert!(shot.fires());
        assert!(!shot.fires() && !shot.is_armed());
        shot.arm();
        shot.disarm();
        assert!(!shot.fires());
    }
}
