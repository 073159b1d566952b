//! The conformance suite on the simulated world: see `docs/conformance.md`.
//!
//! A case that fails prints its seed; `GPUSVM_SEED=n` runs that one alone.

use gpusvm_device::FaultMode;
use gpusvm_testkit::conformance::{Kit, Model};
use gpusvm_testkit::conformance_cases;

macro_rules! tests {
    ($module:ident, $faults:expr; $($case:ident),* $(,)?) => {
        mod $module {
            use super::*;
            const KIT: Kit = Kit::new(Model::Dmirror, $faults);
            $(
                #[test]
                fn $case() {
                    gpusvm_testkit::conformance::$case::<gpusvm_testkit::world::Simulated>(&KIT);
                }
            )*
        }
    };
}

mod sim {
    use super::*;
    conformance_cases!(tests, faulting, (FaultMode::Replayable));
    conformance_cases!(tests, declared, (FaultMode::Declared));
}
