//! Comparison of two objects of two states. Only this module defines which differences count.

use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{DirNode, FileNode, LayerPath, View};

use crate::tree::attrs::{self, marker_space};
use crate::tree::content;
use crate::tree::error::{Context as _, Result};
use crate::tree::walk::open_content;

/// The differences between two objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Differences {
    /// The content of a file, the target of a symbolic link, or the number of a device.
    pub content: bool,
    /// The permission bits.
    pub mode: bool,
    /// The user or the group.
    pub owner: bool,
    /// The modification time; never set for directories.
    pub time: bool,
    /// An xattr or an ACL.
    pub xattrs: bool,
}

impl Differences {
    /// Returns whether there is no difference.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Returns the words for the differences, as output shows them.
    pub fn words(self) -> Vec<&'static str> {
        [
            (self.content, "content"),
            (self.mode, "mode"),
            (self.owner, "owner"),
            (self.time, "time"),
            (self.xattrs, "xattrs"),
        ]
        .into_iter()
        .filter_map(|(differs, word)| differs.then_some(word))
        .collect()
    }

    /// Compares the stat fields that count for all types of objects.
    fn from_stats(a: &Stat, b: &Stat) -> Self {
        Self {
            mode: a.perm() != b.perm(),
            owner: (a.uid, a.gid) != (b.uid, b.gid),
            ..Self::default()
        }
    }
}

/// Two states that are compared.
pub(super) struct Pair<'a> {
    pub(super) a: &'a View,
    pub(super) b: &'a View,
    /// Whether all differences are determined; otherwise a comparison may stop at the first one.
    pub(super) thorough: bool,
}

impl Pair<'_> {
    /// Compares two directories, without their entries.
    pub(super) fn compare_dirs(
        &self,
        a: &DirNode,
        b: &DirNode,
        path: &LayerPath,
    ) -> Result<Differences> {
        if a.is_same_location(b) {
            return Ok(Differences::default());
        }
        let mut differences = Differences::from_stats(&a.stat, &b.stat);
        if !differences.is_empty() && !self.thorough {
            return Ok(differences);
        }
        let message = "cannot read the xattrs";
        let (old, new) = (a.xattrs(), b.xattrs());
        let old = attrs::compared_xattrs(marker_space(self.a), old.context_at(message, path)?);
        let new = attrs::compared_xattrs(marker_space(self.b), new.context_at(message, path)?);
        differences.xattrs = old != new;
        Ok(differences)
    }

    /// Compares two files of the same type.
    pub(super) fn compare_files(
        &self,
        a: &FileNode,
        b: &FileNode,
        path: &LayerPath,
    ) -> Result<Differences> {
        if a.loc.is_same_location(&b.loc) && a.data_loc().is_same_location(b.data_loc()) {
            return Ok(Differences::default());
        }
        let mut differences = Differences {
            time: a.stat.mtime != b.stat.mtime,
            content: a.stat.rdev != b.stat.rdev,
            ..Differences::from_stats(&a.stat, &b.stat)
        };
        if !differences.is_empty() && !self.thorough {
            return Ok(differences);
        }
        let message = "cannot read the xattrs";
        let (old, new) = (a.loc.xattrs(), b.loc.xattrs());
        let old = attrs::compared_xattrs(marker_space(self.a), old.context_at(message, path)?);
        let new = attrs::compared_xattrs(marker_space(self.b), new.context_at(message, path)?);
        differences.xattrs = old != new;
        if !differences.xattrs || self.thorough {
            differences.content |=
                is_content_different(a, b).context_at("cannot compare the content", path)?;
        }
        Ok(differences)
    }
}

/// Returns whether the contents of two files, or the targets of two symbolic links, differ.
fn is_content_different(a: &FileNode, b: &FileNode) -> cowl_layers::error::Result<bool> {
    match a.stat.kind() {
        FileKind::Regular if a.stat.size != b.stat.size => Ok(true),
        FileKind::Regular if a.data_loc().is_same_location(b.data_loc()) => Ok(false),
        FileKind::Regular => {
            let old = open_content(a.data_loc())?;
            let new = open_content(b.data_loc())?;
            content::is_same(old, new, a.stat.size).map(|is_same| !is_same)
        }
        FileKind::Symlink => Ok(a.loc.readlink()? != b.loc.readlink()?),
        _ => Ok(false),
    }
}
