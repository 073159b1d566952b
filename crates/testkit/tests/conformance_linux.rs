//! The conformance suite on this very process: see `docs/conformance.md`.
//!
//! Without userfaultfd the cases are skipped with a printed reason; where `GPUSVM_REQUIRE_UFFD=1` is
//! set, they fail instead.

use gpusvm_device::FaultMode;
use gpusvm_testkit::conformance::{Kit, Model};
use gpusvm_testkit::conformance_cases;

macro_rules! tests {
    ($module:ident, $model:expr, $faults:expr; $($case:ident),* $(,)?) => {
        mod $module {
            use super::*;
            const KIT: Kit = Kit::new($model, $faults);
            $(
                #[test]
                fn $case() {
                    gpusvm_testkit::conformance::$case::<gpusvm_testkit::world::Linux>(&KIT);
                }
            )*
        }
    };
}

mod linux {
    use super::*;
    conformance_cases!(tests, faulting, (Model::Dmirror), (FaultMode::Replayable));
    conformance_cases!(tests, declared, (Model::Dmirror), (FaultMode::Declared));
    conformance_cases!(
        tests,
        softgpu_faulting,
        (Model::Soft),
        (FaultMode::Replayable)
    );
    conformance_cases!(
        tests,
        softgpu_declared,
        (Model::Soft),
        (FaultMode::Declared)
    );
}
