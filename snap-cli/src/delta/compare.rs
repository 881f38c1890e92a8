//! In what two objects of two states differ: the one place that says what counts as a difference.

use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{DirNode, FileNode, LayerPath, View};

use crate::tree::attrs::{self, space_of};
use crate::tree::content;
use crate::tree::error::{Context as _, Result};
use crate::tree::walk::open_content;

/// What of an object differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct What {
    /// The content, the link's target or the device's number.
    pub content: bool,
    /// The permission bits.
    pub mode: bool,
    /// The user or the group.
    pub owner: bool,
    /// The modification time; of no meaning for folders.
    pub time: bool,
    /// An extended attribute or an ACL.
    pub xattrs: bool,
}

impl What {
    /// Whether anything differs.
    pub fn any(self) -> bool {
        self != Self::default()
    }

    /// The words for it.
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

    fn of(a: &Stat, b: &Stat) -> Self {
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
    /// Whether everything that differs is wanted, or only whether anything does.
    pub(super) thorough: bool,
}

impl Pair<'_> {
    /// In what two folders differ, apart from what is in them.
    pub(super) fn folders(&self, a: &DirNode, b: &DirNode, path: &LayerPath) -> Result<What> {
        if a.is_same_location(b) {
            return Ok(What::default());
        }
        let mut what = What::of(&a.stat, &b.stat);
        if what.any() && !self.thorough {
            return Ok(what);
        }
        let tried = "can't read the attributes";
        let one = attrs::shown(space_of(self.a), a.xattrs().context_at(tried, path)?);
        what.xattrs = one != attrs::shown(space_of(self.b), b.xattrs().context_at(tried, path)?);
        Ok(what)
    }

    /// In what two files of one type differ.
    pub(super) fn files(&self, a: &FileNode, b: &FileNode, path: &LayerPath) -> Result<What> {
        if a.loc.is_same_location(&b.loc) && a.data_loc().is_same_location(b.data_loc()) {
            return Ok(What::default());
        }
        let mut what = What {
            time: a.stat.mtime != b.stat.mtime,
            content: a.stat.rdev != b.stat.rdev,
            ..What::of(&a.stat, &b.stat)
        };
        if what.any() && !self.thorough {
            return Ok(what);
        }
        let tried = "can't read the attributes";
        let one = attrs::shown(space_of(self.a), a.loc.xattrs().context_at(tried, path)?);
        what.xattrs =
            one != attrs::shown(space_of(self.b), b.loc.xattrs().context_at(tried, path)?);
        if !what.xattrs || self.thorough {
            what.content |= self.contents(a, b).context_at("can't compare", path)?;
        }
        Ok(what)
    }

    #[allow(clippy::unused_self, reason = "one of three that are asked alike")]
    fn contents(&self, a: &FileNode, b: &FileNode) -> cowl_layers::error::Result<bool> {
        match a.stat.kind() {
            FileKind::Regular if a.stat.size != b.stat.size => Ok(true),
            FileKind::Regular if a.data_loc().is_same_location(b.data_loc()) => Ok(false),
            FileKind::Regular => {
                let one = open_content(a.data_loc())?;
                let two = open_content(b.data_loc())?;
                content::same(one, two, a.stat.size).map(|same| !same)
            }
            FileKind::Symlink => Ok(a.loc.readlink()? != b.loc.readlink()?),
            _ => Ok(false),
        }
    }
}
