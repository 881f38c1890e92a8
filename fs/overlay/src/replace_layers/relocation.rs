//! The planned moves of known inodes.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use cowl_layers::error::{Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::layer::LayerDir;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::stat::Time;
use cowl_layers::view::Loc;
use rustc_hash::FxHashMap;

use crate::inode::{FileState, Identity, Inode, is_file_where};

/// A difference between the merged trees before and after a replacement of layers.
#[derive(Debug)]
pub struct Difference {
    /// The path of the object, relative to the root.
    pub(super) path: Vec<u8>,
    pub(super) kind: DifferenceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DifferenceKind {
    /// The object does not exist in the new stack.
    Absent,
    /// It has another type or size.
    Object,
    /// It is merged from other directories in the layers that remain.
    Layers,
    /// It cannot be read.
    Error(Error),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.shown();
        match self.kind {
            DifferenceKind::Absent => write!(f, "/{path} is missing in the new layers"),
            DifferenceKind::Object => {
                write!(f, "/{path} has another type or size in the new layers")
            }
            DifferenceKind::Layers => {
                write!(f, "the new layers would change the content of /{path}")
            }
            DifferenceKind::Error(error) => {
                write!(f, "cannot read /{path} in the new layers: {error}")
            }
        }
    }
}

/// The attributes of an object at its new location, if that is another one.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewObject {
    pub(super) identity: Identity,
    /// The ctime on disk, before and after.
    pub(super) ctimes: (Time, Time),
}

/// The new location of a directory.
#[derive(Debug)]
pub(super) struct DirMove {
    /// The locations for which the move was planned.
    pub(super) from: Arc<[Arc<LayerDir>]>,
    pub(super) to: Arc<[Arc<LayerDir>]>,
    pub(super) redirect: Option<Redirect>,
    pub(super) object: Option<NewObject>,
}

/// The new location of an object that is not a directory.
#[derive(Debug)]
pub(super) struct FileMove {
    /// The identity for which the move was planned.
    pub(super) from: Identity,
    pub(super) had_data: bool,
    /// The new location and redirect, if the object is in a removed layer.
    pub(super) loc: Option<(Loc, Option<Redirect>, NewObject)>,
    /// The new location of the content, if that is in a removed layer.
    pub(super) data: Option<Option<Loc>>,
}

/// The plans for the known inodes, by inode number.
#[derive(Debug, Default)]
pub(super) struct Plans {
    pub(super) dirs: FxHashMap<u64, (Arc<Inode>, DirMove)>,
    pub(super) files: FxHashMap<u64, (Arc<Inode>, FileMove)>,
    /// The ids of the removed layers that contain objects without a name.
    pub(super) retained: HashSet<u64>,
    /// The files that no name leads to although their link counts are not 0, because a layer above hides their names.
    pub(super) hidden: FxHashMap<u64, Identity>,
}

/// The locations that inodes had before they moved. They are dropped after operations continue, because closing many
/// directories takes about as long as the moves.
#[derive(Debug, Default)]
pub(super) struct OldLocations {
    pub(super) inodes: Vec<Arc<Inode>>,
    dirs: Vec<Arc<[Arc<LayerDir>]>>,
    files: Vec<Loc>,
}

impl Plans {
    /// Removes the plans for objects that have changed since.
    pub(super) fn retain_valid(&mut self) {
        self.retained.clear();
        self.dirs
            .retain(|_, (inode, planned)| planned.is_valid(inode));
        self.files
            .retain(|_, (inode, planned)| is_file_where(inode, |file| planned.is_valid(file)));
    }
}

impl DirMove {
    fn is_valid(&self, inode: &Inode) -> bool {
        let now = inode.locations();
        now.is_ok_and(|locs| locs.is_some_and(|locs| Arc::ptr_eq(&locs, &self.from)))
    }

    /// Moves the directory.
    pub(super) fn apply(self, inode: &Inode, old: &mut OldLocations) -> Result<()> {
        old.dirs.push(self.from);
        inode.update_dir(|dir| {
            dir.locs = self.to;
            // Otherwise the redirect is that of the upper layer, which a rename may have changed since.
            if let Some(object) = self.object {
                dir.redirect = self.redirect;
                dir.identity = object.identity;
            }
        })
    }
}

impl FileMove {
    /// Whether the plan still applies. A copy-up changes the identity, or leaves the content at the object itself.
    fn is_valid(&self, file: &FileState) -> bool {
        !file.orphan && file.identity == self.from && file.data.is_some() == self.had_data
    }

    /// Moves the file.
    pub(super) fn apply(self, inode: &Inode, old: &mut OldLocations) -> Result<()> {
        inode.update_file(|file| {
            if let Some((loc, redirect, object)) = self.loc {
                old.files.push(std::mem::replace(&mut file.loc, loc));
                file.redirect = redirect.map(Box::new);
                file.identity = object.identity;
                // It refers to the object in the removed layer.
                file.anchor = None;
            }
            if let Some(data) = self.data {
                file.data = data.map(Box::new);
            }
        })
    }
}
