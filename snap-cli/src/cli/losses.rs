//! The option `--force` of commands that read states of which a crash may have lost a part.

use crate::snapshot::Losses;

/// Returns how the option `--force` treats a state of which a part may be lost.
pub(super) fn losses(force: bool) -> Losses {
    match force {
        true => Losses::Accept,
        false => Losses::Refuse,
    }
}
