//! The option `--force` of commands that read states.

use crate::snapshot::Losses;

/// Returns how a state of which a part may be lost is treated.
pub(super) fn losses(force: bool) -> Losses {
    match force {
        true => Losses::Accept,
        false => Losses::Refuse,
    }
}
