//! How long to wait for an event that says what became of a page: a second, and not more.

use core::time::Duration;

/// How often to look.
pub(crate) const POLLS: u32 = 10_000;
/// How soon.
const POLL: Duration = Duration::from_micros(100);

/// Looks that are left.
#[derive(Debug)]
pub(crate) struct Patience(u32);

impl Patience {
    pub(crate) const fn new() -> Self {
        Self(POLLS)
    }

    /// Waits a moment. `false` at once when it was waited for long enough.
    pub(crate) fn wait(&mut self) -> bool {
        let Some(left) = self.0.checked_sub(1) else {
            return false;
        };
        self.0 = left;
        std::thread::sleep(POLL);
        true
    }

    /// Something came of it: as at the beginning.
    pub(crate) fn renew(&mut self) {
        self.0 = POLLS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_and_begins_again_with_every_success() {
        let mut patience = Patience::new();
        assert!(patience.wait());
        patience.renew();
        let waits = (0..u32::MAX).take_while(|_| patience.wait()).count();
        assert_eq!(waits, 10_000);
        assert!(!patience.wait());
    }
}
