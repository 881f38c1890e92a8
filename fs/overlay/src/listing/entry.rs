//! Entries of a listing and their cookies, which are the offsets of telldir(3) and FUSE_READDIR.

use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::MergedEntry;

/// The number of bits of a hash.
const HASH_BITS: u32 = 31;
/// The largest hash, which is reserved for the end of the directory.
pub(super) const LAST: u32 = (1 << HASH_BITS) - 1;
/// The hash of `..`. The hash of `.` is 0, the beginning of the directory.
const PARENT: u32 = 1;
/// The smallest hash of any other name.
pub(super) const FIRST: u32 = 2;

/// The offset after the last entry.
pub const END: u64 = LAST as u64;

/// The position of an entry in the order of a directory, which does not depend on the other entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cookie {
    pub(super) hash: u32,
    pub(super) rank: u32,
}

impl Cookie {
    /// The cookie of `.`.
    pub(super) const DOT: Self = Self { hash: 0, rank: 0 };
    /// The cookie of `..`.
    pub(super) const DOT_DOT: Self = Self {
        hash: PARENT,
        rank: 0,
    };

    /// Returns the cookie as an offset, which is not negative as an `i64` either.
    pub(super) fn to_offset(self) -> u64 {
        u64::from(self.rank) << HASH_BITS | u64::from(self.hash)
    }

    /// Returns the cookie that an offset contains. Every offset is valid.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "each part fits into 32 bits"
    )]
    pub(super) fn from_offset(offset: u64) -> Self {
        Self {
            hash: (offset & END) as u32,
            rank: (offset >> HASH_BITS) as u32,
        }
    }
}

/// An entry of a listing, which includes `.` and `..`.
#[derive(Clone, Debug)]
pub struct DirEntry {
    pub(super) merged: MergedEntry,
    pub(super) cookie: Cookie,
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

    /// Returns the inode number on disk; for `.` and `..` the visible one.
    pub fn ino_on_disk(&self) -> u64 {
        self.merged.ino
    }

    /// Whether the entry is `.` or `..`.
    pub fn is_dots(&self) -> bool {
        self.cookie <= Cookie::DOT_DOT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_survive_the_conversion_to_offsets() {
        for hash in [0, PARENT, FIRST, 1 << 20, LAST] {
            for rank in [0, 1, 77, u32::MAX] {
                let cookie = Cookie { hash, rank };
                assert_eq!(Cookie::from_offset(cookie.to_offset()), cookie);
                assert!(i64::try_from(cookie.to_offset()).is_ok());
            }
        }
        assert_eq!(Cookie::DOT.to_offset(), 0);
        assert!(
            Cookie::from_offset(END)
                > Cookie {
                    hash: LAST - 1,
                    rank: u32::MAX
                }
        );
    }
}
