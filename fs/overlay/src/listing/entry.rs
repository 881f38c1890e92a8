//! Entries of a listing, and their positions: the values of telldir(3), which the protocol calls offsets.

use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::MergedEntry;

/// The number of bits of the hash.
const HASH_BITS: u32 = 31;
/// The largest hash, which is the end.
pub(super) const LAST: u32 = (1 << HASH_BITS) - 1;
/// The hash of `..`; that of `.` is 0, the beginning.
const PARENT: u32 = 1;
/// The first hash that a name can have.
pub(super) const FIRST: u32 = 2;

/// The position behind the last entry.
pub const END: u64 = LAST as u64;

/// The position of an entry in the order of its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) hash: u32,
    pub(super) rank: u32,
}

impl Position {
    /// Of `.`.
    pub(super) const DOT: Self = Self { hash: 0, rank: 0 };
    /// Of `..`.
    pub(super) const DOT_DOT: Self = Self {
        hash: PARENT,
        rank: 0,
    };

    /// Returns the position as a number that is never negative as an `i64`.
    pub(super) fn to_cookie(self) -> u64 {
        u64::from(self.rank) << HASH_BITS | u64::from(self.hash)
    }

    /// Returns the position that a number means; each number means one.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "the two halves are cut out"
    )]
    pub(super) fn from_cookie(cookie: u64) -> Self {
        Self {
            hash: (cookie & END) as u32,
            rank: (cookie >> HASH_BITS) as u32,
        }
    }
}

/// One entry of a listing; `.` and `..` are among them.
#[derive(Clone, Debug)]
pub struct DirEntry {
    pub(super) merged: MergedEntry,
    pub(super) at: Position,
}

impl DirEntry {
    /// Returns the name.
    pub fn name(&self) -> &Name {
        &self.merged.name
    }

    /// Returns the type.
    pub fn kind(&self) -> FileKind {
        self.merged.kind
    }

    /// Returns the inode number on disk; for `.` and `..` the one that shows.
    pub fn ino_on_disk(&self) -> u64 {
        self.merged.ino
    }

    /// Whether it is `.` or `..`.
    pub fn is_dots(&self) -> bool {
        self.at <= Position::DOT_DOT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_a_number_that_says_it() {
        for hash in [0, PARENT, FIRST, 1 << 20, LAST] {
            for rank in [0, 1, 77, u32::MAX] {
                let at = Position { hash, rank };
                assert_eq!(Position::from_cookie(at.to_cookie()), at);
                assert!(i64::try_from(at.to_cookie()).is_ok());
            }
        }
        assert_eq!(Position::DOT.to_cookie(), 0);
        assert!(
            Position::from_cookie(END)
                > Position {
                    hash: LAST - 1,
                    rank: u32::MAX
                }
        );
    }
}
