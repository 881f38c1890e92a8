//! Builds the workspace for its tests.

use crate::run::{Result, Run};

/// Builds all programs and tests.
///
/// Both in one command, because Cargo selects the features of dependencies for each command: the tests need more of
/// them, and programs that are built alone would compile every dependency a second time.
pub(crate) fn programs_and_tests() -> Result<()> {
    Run::cargo()?
        .args(["build", "--workspace", "--bins", "--tests", "--locked"])
        .run()
}
