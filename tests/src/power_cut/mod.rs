//! What a power cut leaves of a mount, over and over.
//!
//! [`disk`] is a disk that remembers every write and every flush it was given, [`work`] uses a mount whose
//! layers lie on it, [`kinds`] says what is done to each file and what may be found of it afterwards, and
//! [`judge`] plugs the disk in again as it was at some moment and looks.
//!
//! [`store`] works with a store on such a disk instead, and [`store_judge`] inspects that.
//!
//! A copy of a disk image taken at a random moment would be kinder than a real cut: it has every write
//! that was ever handed over, in order. A disk owes that only for what was done before a flush that
//! has ended; of the rest it may have written any part, in any order. So a moment is a place in the log, and
//! what was not flushed by then is on the disk or not as a coin falls, 4 KiB by 4 KiB.

pub mod disk;
pub mod judge;
pub mod kinds;
pub mod store;
pub mod store_judge;
pub mod work;

use crate::conditions::{Need, can};

/// Whether the test can run on a disk with a file system of the type `kind`; `programs` are needed besides.
#[must_use]
pub fn can_cut(test: &str, kind: &'static str, programs: &[&'static str]) -> bool {
    let make = match kind {
        "ext4" => "mkfs.ext4",
        "xfs" => "mkfs.xfs",
        _ => "mkfs.btrfs",
    };
    let mut needs = vec![Need::Root, Need::Fuse, Need::Filesystem(kind)];
    needs.extend([make, "losetup"].map(Need::Program));
    needs.extend(programs.iter().copied().map(Need::Program));
    can(test, &needs)
}

/// Spreads `cuts` over runs of `most` cuts at the most. `run` gets the seed of each and its number of cuts.
pub fn in_runs(cuts: u64, most: u64, mut run: impl FnMut(u64, u64)) {
    let first = crate::run::number("COWL_SEED", 1);
    for (seed, start) in (first..).zip((0..cuts).step_by(usize::try_from(most).unwrap_or(1))) {
        run(seed, most.min(cuts - start));
    }
}
