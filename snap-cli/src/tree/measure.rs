//! How large a layer is, for lists, and whether it still looks as it did.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use sha2::{Digest as _, Sha256};

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

/// How a sum over a tree says where an entry lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Form {
    /// By its whole path. Sums of this form are only ever compared with: they take a time in proportion to
    /// the number of entries times the length of their paths.
    Paths,
    /// By its depth and its name, which say the same in a walk.
    Names,
}

impl Form {
    /// What stands before the digits of a sum.
    const NAMES: &str = "2:";

    /// The form of a sum.
    pub(super) fn of(sum: &str) -> Self {
        match sum.starts_with(Self::NAMES) {
            true => Self::Names,
            false => Self::Paths,
        }
    }

    pub(super) fn mark(self) -> &'static str {
        match self {
            Self::Paths => "",
            Self::Names => Self::NAMES,
        }
    }

    pub(super) fn prefix(self, what: &str) -> String {
        match self {
            Self::Paths => format!("cowl {what} 1"),
            Self::Names => format!("cowl {what} 2"),
        }
    }

    pub(super) fn add_name(self, item: &Item<'_>, sum: &mut Sha256) {
        let name = match self {
            Self::Paths => item.path,
            Self::Names => {
                sum.update((item.depth as u64).to_le_bytes());
                item.name()
            }
        };
        sum.update((name.len() as u64).to_le_bytes());
        sum.update(name);
    }
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
