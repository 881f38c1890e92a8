//! Limits on the data that is parsed from an archive.
//!
//! An archive is untrusted: its numbers and lengths are claims, and a few hundred compressed bytes can expand to
//! gigabytes. Everything that is held in memory is therefore limited here, far above what Linux file systems can
//! store and archivers write, such that an import uses less than 256 MiB. Content is written to disk and limited by
//! its size. docs/decisions/0019 gives the reason for each number, and 0046 for
//! those of images.

use crate::tree::error::{ErrorKind, Result, TreeError};

/// Bytes of the path of an entry, or of the target of a hard link. PATH_MAX is 4096, but deeper trees exist, because
/// a path can be resolved in steps.
pub(super) const PATH: u64 = 1 << 20;

/// Bytes of a PAX extended header.
pub(super) const EXTENDED: u64 = 16 << 20;

/// Bytes of a PAX global header, and of all xattrs that global headers set.
pub(super) const GLOBAL: u64 = 1 << 20;

/// Segments of a sparse file's map.
pub(super) const SEGMENTS: usize = 1 << 20;

/// Entries of an ACL: as many as fit in the value of an xattr (XATTR_SIZE_MAX).
pub(super) const ACL_ENTRIES: usize = (XATTR_VALUE - 4) / 8;

/// XATTR_SIZE_MAX of Linux. Larger xattrs are omitted.
pub(super) const XATTR_VALUE: usize = 64 << 10;

/// Bytes of the name of an omitted record that are retained for a note.
pub(super) const OMITTED_NAME: usize = 256;

/// Bytes of ACLs with names, and of the paths of their objects, that are held until `etc/passwd` is complete.
pub(super) const NAMED_ACLS: usize = 16 << 20;

/// Bytes of `etc/passwd`, and of `etc/group`, that are searched for the names in ACLs.
pub(super) const NAME_FILES: u64 = 1 << 20;

/// XATTR_LIST_MAX of Linux: all names of one object, each with its NUL.
pub(super) const XATTR_NAMES: usize = 64 << 10;

/// Bytes of distinct ACLs that are held until the directories are complete.
pub(super) const DIRECTORY_ACLS: usize = 16 << 20;

/// The base-2 logarithm of the largest zstd window: that of `zstd -22` (without `--long`, or with `--long=27`).
pub(super) const WINDOW_LOG: u32 = 27;

/// Bytes of memory for xz: a dictionary of 128 MiB, twice the largest of the presets, and the rest of the decoder.
pub(super) const XZ_MEMORY: u64 = 136 << 20;

/// Bytes of the manifest of a whole container.
pub(super) const MANIFEST: u64 = 32 << 20;

/// JSON values in such a manifest. A value takes far more memory than its text.
pub(super) const MANIFEST_VALUES: usize = 1 << 20;

/// Bytes after the end of the archive of a whole container. An endless stream would hold the layers of a transfer
/// forever.
pub(super) const REST: u64 = 64 << 20;

/// Bytes of the list of inode numbers of a layer.
pub(super) const NUMBERS: usize = 32 << 20;

/// Entries in all such lists of an archive.
pub(super) const LENT_NUMBERS: usize = 1 << 19;

/// Bytes of the file that holds a layer's digest.
pub(super) const SUM: u64 = 1 << 10;

/// Layers of an image. The kernel mounts no more than 500, and container engines create no more than 127.
pub(super) const IMAGE_LAYERS: usize = 400;
/// Steps in the history of an image: several for each layer.
pub(super) const IMAGE_HISTORY: usize = 16 * IMAGE_LAYERS;

/// Bytes of an index or a manifest of an image.
pub(super) const IMAGE_MANIFEST: u64 = 4 << 20;

/// Bytes of the config of an image, which becomes a part of the container's manifest.
pub(super) const IMAGE_CONFIG: u64 = 1 << 20;

/// JSON values in the settings of an image's config. They are stored in the container's manifest.
pub(super) const IMAGE_VALUES: usize = 1 << 14;

/// Depth of these values. The manifest and the archive of a whole container add further levels.
pub(super) const IMAGE_DEPTH: usize = 32;

/// Bytes of the name of an image, and of its tag. Longer ones are ignored.
pub(super) const IMAGE_NAME: usize = 1 << 10;

/// Files in an archive of an image.
pub(super) const IMAGE_FILES: usize = 1 << 16;

/// Bytes of their names.
pub(super) const IMAGE_NAMES: usize = 16 << 20;

/// Indexes in an image that contain each other.
pub(super) const IMAGE_INDEXES: usize = 8;

/// Returns the error for an entry that exceeds a limit.
pub(super) fn exceeded(what: impl Into<String>, path: &[u8]) -> TreeError {
    let error = TreeError::new(ErrorKind::Limit, what);
    if path.is_empty() {
        error
    } else {
        error.at(path)
    }
}

/// Returns an error if a size exceeds `limit`.
pub(super) fn check_size(size: u64, limit: u64, what: &str, path: &[u8]) -> Result<()> {
    if size <= limit {
        return Ok(());
    }
    Err(exceeded(
        format!("{what} has {size} bytes; the limit is {limit}"),
        path,
    ))
}
