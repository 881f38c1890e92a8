//! How large a layer is, for lists, and whether it still looks as it did.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use cowl_fs::sys::stat::FileKind;
use sha2::{Digest as _, Sha256};

use super::error::Result;
use super::walk;

/// What walking a tree tells without reading any content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Size {
    /// Bytes that it takes up on the disk, each inode once.
    pub bytes: u64,
    /// Entries in it: its root not counted, marks counted.
    pub entries: u64,
    /// Inodes in it, its root counted.
    pub inodes: u64,
    /// A SHA-256 over paths, types, modes, owners, sizes of files, device numbers and modification times.
    pub looks: String,
}

/// Walks the tree.
pub fn measure(tree: &Path) -> Result<Size> {
    let (mut bytes, mut entries) = (0, 0);
    let mut seen = HashSet::new();
    let mut looks = Sha256::new_with_prefix(b"cowl looks 1");
    walk::plain(tree, &mut |item| {
        let stat = &item.stat;
        entries += u64::from(!item.path.is_empty());
        if seen.insert((stat.dev, stat.ino)) {
            bytes += stat.blocks * 512;
        }
        // A folder's size is its file system's business.
        let size = match item.kind() {
            FileKind::Directory => 0,
            _ => stat.size,
        };
        looks.update((item.path.len() as u64).to_le_bytes());
        looks.update(&item.path);
        for number in [
            stat.mode.into(),
            stat.uid.into(),
            stat.gid.into(),
            size,
            stat.rdev,
            stat.mtime.secs.cast_unsigned(),
            stat.mtime.nanos.into(),
        ] {
            looks.update(u64::to_le_bytes(number));
        }
        Ok(())
    })?;
    let mut hex = String::new();
    for byte in looks.finalize() {
        // Writing to a string can't fail.
        write!(hex, "{byte:02x}").unwrap_or_default();
    }
    Ok(Size {
        bytes,
        entries,
        inodes: seen.len() as u64,
        looks: hex,
    })
}
