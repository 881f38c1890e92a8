//! Limits on what is parsed from an archive.
//!
//! An archive is hostile: its numbers and lengths are claims, and a few hundred compressed bytes expand
//! to gigabytes. Whatever is held in memory is therefore limited here, far above what Linux file systems can
//! store and what archivers write, so that an import needs less than 256 MiB. Content goes to the
//! disk and is limited by the disk. docs/decisions/0019 has the reasons for each number.

use crate::delta::error::{ErrorKind, Result, TreeError};

/// Bytes of an entry's path, or of the path that a hard link names. PATH_MAX is 4096; deeper trees exist,
/// because paths can be followed step by step.
pub(super) const PATH: u64 = 1 << 20;

/// Bytes of one PAX extended header.
pub(super) const EXTENDED: u64 = 16 << 20;

/// Bytes of one PAX global header, and of all extended attributes that global headers set.
pub(super) const GLOBAL: u64 = 1 << 20;

/// Runs of data in a sparse file's map.
pub(super) const SEGMENTS: usize = 1 << 20;

/// Entries of an ACL: as many as fit an extended attribute's value (XATTR_SIZE_MAX).
pub(super) const ACL_ENTRIES: usize = (XATTR_VALUE - 4) / 8;

/// XATTR_SIZE_MAX of Linux.
pub(super) const XATTR_VALUE: usize = 64 << 10;

/// XATTR_LIST_MAX of Linux: all names of one object, each with its NUL.
pub(super) const XATTR_NAMES: usize = 64 << 10;

/// Bytes of different ACLs that are remembered until the directories are complete.
pub(super) const DIRECTORY_ACLS: usize = 16 << 20;

/// Memory of a decoder: the window of `zstd -22` (without `--long` or with `--long=27`) and the largest
/// dictionary that xz's presets use twice over.
pub(super) const WINDOW_LOG: u32 = 27;

/// Bytes of memory for xz: a dictionary of 128 MiB and what surrounds it.
pub(super) const XZ_MEMORY: u64 = 136 << 20;

/// Bytes of the manifest of a whole container.
pub(super) const MANIFEST: u64 = 32 << 20;

/// JSON values in such a manifest: each takes far more memory than its bytes.
pub(super) const MANIFEST_VALUES: usize = 1 << 20;

/// Bytes of the file that holds a layer's sum.
pub(super) const SUM: u64 = 1 << 10;

/// An error for an entry that exceeds a limit.
pub(super) fn exceeded(what: impl Into<String>, path: &[u8]) -> TreeError {
    let error = TreeError::new(ErrorKind::Limit, what);
    if path.is_empty() {
        error
    } else {
        error.at(path)
    }
}

/// Refuses a number of bytes above `limit`.
pub(super) fn bytes(size: u64, limit: u64, what: &str, path: &[u8]) -> Result<()> {
    if size <= limit {
        return Ok(());
    }
    Err(exceeded(
        format!("{what} has {size} bytes; the limit is {limit}"),
        path,
    ))
}
