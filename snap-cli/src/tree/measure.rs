//! The size of a layer, and a digest of its metadata.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use sha2::{Digest as _, Sha256};

use super::digest_form::Form;
use super::error::Result;
use super::walk::{self, Item};

/// The size of a tree and a digest of its metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeSize {
    /// The number of bytes on disk, each inode counted once.
    pub bytes: u64,
    /// The number of entries, excluding the root and including markers.
    pub entries: u64,
    /// The number of inodes, including the root.
    pub inodes: u64,
    /// A SHA-256 digest of names, types, modes, owners, sizes of files, device numbers and modification times.
    pub metadata_digest: String,
}

/// Measures a tree.
pub fn measure(tree: &Path) -> Result<TreeSize> {
    measure_as(tree, Form::Names)
}

/// Measures a tree for a comparison with a `known` digest, whose form [`TreeSize::metadata_digest`] has.
pub fn measure_like(tree: &Path, known: &str) -> Result<TreeSize> {
    measure_as(tree, Form::of_digest(known))
}

fn measure_as(tree: &Path, form: Form) -> Result<TreeSize> {
    let (mut bytes, mut entries) = (0, 0);
    // Only inodes with several names are recorded.
    let mut seen = HashSet::new();
    let mut inodes = 0;
    let mut hasher = Sha256::new_with_prefix(form.hash_prefix("looks"));
    walk::visit_dir(tree, &mut |item: &Item<'_>| {
        let stat = &item.stat;
        entries += u64::from(!item.path.is_empty());
        let has_one_name = stat.nlink < 2 || item.kind() == FileKind::Directory;
        if has_one_name || seen.insert((stat.dev, stat.ino)) {
            bytes += stat.blocks * 512;
            inodes += 1;
        }
        // The size of a directory depends on the file system.
        let size = match item.kind() {
            FileKind::Directory => 0,
            _ => stat.size,
        };
        form.add_name(item, &mut hasher);
        for number in [
            stat.mode.into(),
            stat.uid.into(),
            stat.gid.into(),
            size,
            stat.rdev,
            stat.mtime.secs.cast_unsigned(),
            stat.mtime.nanos.into(),
        ] {
            hasher.update(u64::to_le_bytes(number));
        }
        Ok(())
    })?;
    let mut hex = form.digest_prefix().to_owned();
    for byte in hasher.finalize() {
        // Writing to a string cannot fail.
        write!(hex, "{byte:02x}").unwrap_or_default();
    }
    Ok(TreeSize {
        bytes,
        entries,
        inodes,
        metadata_digest: hex,
    })
}
