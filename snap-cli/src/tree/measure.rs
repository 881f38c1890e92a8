//! How large a layer is, for lists, and whether it still looks as it did.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use sha2::{Digest as _, Sha256};

use super::digest_form::Form;
use super::error::Result;
use super::walk::{self, Item};

/// What walking a tree tells without reading any content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Size {
    /// Bytes that it takes up on the disk, each inode once.
    pub bytes: u64,
    /// Entries in it: its root not counted, marks counted.
    pub entries: u64,
    /// Inodes in it, its root counted.
    pub inodes: u64,
    /// A SHA-256 over names, types, modes, owners, sizes of files, device numbers and modification times.
    pub looks: String,
}

/// Walks the tree.
pub fn measure(tree: &Path) -> Result<Size> {
    measure_as(tree, Form::Names)
}

/// Walks the tree, for a comparison with what `known` says of it: [`Size::looks`] comes in its form.
pub fn measure_like(tree: &Path, known: &str) -> Result<Size> {
    measure_as(tree, Form::of(known))
}

fn measure_as(tree: &Path, form: Form) -> Result<Size> {
    let (mut bytes, mut entries) = (0, 0);
    // An inode with one name is met once.
    let mut seen = HashSet::new();
    let mut inodes = 0;
    let mut looks = Sha256::new_with_prefix(form.prefix("looks"));
    walk::plain(tree, &mut |item: &Item<'_>| {
        let stat = &item.stat;
        entries += u64::from(!item.path.is_empty());
        let alone = stat.nlink < 2 || item.kind() == FileKind::Directory;
        if alone || seen.insert((stat.dev, stat.ino)) {
            bytes += stat.blocks * 512;
            inodes += 1;
        }
        // A folder's size is its file system's business.
        let size = match item.kind() {
            FileKind::Directory => 0,
            _ => stat.size,
        };
        form.add_name(item, &mut looks);
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
    let mut hex = form.mark().to_owned();
    for byte in looks.finalize() {
        // Writing to a string can't fail.
        write!(hex, "{byte:02x}").unwrap_or_default();
    }
    Ok(Size {
        bytes,
        entries,
        inodes,
        looks: hex,
    })
}
