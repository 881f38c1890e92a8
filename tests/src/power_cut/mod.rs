//! Simulates power cuts under a mount or a store.
//!
//! - [`disk`] records every write and every flush that a disk receives.
//! - [`work`] runs programs in a mount whose layers are on that disk; [`kinds`] defines the operations on each
//!   file and the states that are allowed after a cut; [`judge`] attaches the disk as it was at some moment and
//!   verifies these states.
//! - [`moving`] takes snapshots while a program writes to files by passthrough and changes names, [`phases`] finds the
//!   moments of their steps, and [`moving_judge`] verifies these files.
//! - [`receiving`] interrupts transfers from another store, and continues them.
//! - [`store`] runs all verbs on a store on such a disk, and [`store_judge`] verifies the store.
//!
//! A copy of the disk image at a random moment would be milder than a real power cut, because it has every
//! write in order. A disk guarantees only the writes before a completed flush. Any part of the others may
//! have been written, in any order. So a moment is a position in the log, and each block of 4 KiB that was not
//! flushed by then survives or not at random.

pub mod disk;
pub mod judge;
pub mod kinds;
pub mod moving;
pub mod moving_judge;
pub mod phases;
pub mod receiving;
pub mod store;
pub mod store_judge;
pub mod work;

use crate::conditions::{Need, can};

/// Returns whether the machine can run a test on a file system of the type `kind` that also requires `programs`.
#[must_use]
pub fn can_cut(kind: &'static str, programs: &[&'static str]) -> bool {
    let make = match kind {
        "ext4" => "mkfs.ext4",
        "xfs" => "mkfs.xfs",
        _ => "mkfs.btrfs",
    };
    let mut needs = vec![Need::Root, Need::Fuse, Need::Filesystem(kind)];
    needs.extend([make, "losetup"].map(Need::Program));
    needs.extend(programs.iter().copied().map(Need::Program));
    can(&needs)
}

/// Splits `cuts` into runs of at most `most` cuts. `run` gets the seed and the number of cuts of each.
pub fn in_runs(cuts: u64, most: u64, mut run: impl FnMut(u64, u64)) {
    let first = crate::run::number("COWL_SEED", 1);
    for (seed, start) in (first..).zip((0..cuts).step_by(usize::try_from(most).unwrap_or(1))) {
        run(seed, most.min(cuts - start));
    }
}
