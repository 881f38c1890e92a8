//! The locations of objects, for the record of state and the ledger.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::error::Result;
use cowl_layers::layer::{Layer, LayerDir};
use cowl_layers::sys;
use cowl_layers::view::Loc;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::object::{Alias, DirState, FileState, Inode, InodeState};

/// The location of an inode's object.
///
/// An object with a name is found by it in the stack. Any other one is found in its layer, or by a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// The root directory.
    Root,
    /// A directory: the inode number of its parent, and its name.
    Dir(EntryName),
    /// A directory that was removed.
    RemovedDir {
        locations: Vec<DirPlace>,
        redirect: Option<Vec<u8>>,
    },
    /// An object of any other type: its known names.
    File(Vec<EntryName>),
    /// An object whose known names were removed.
    Nameless(Box<NamelessFile>),
}

/// The inode number of a directory, and a name in it.
pub(crate) type EntryName = (u64, Vec<u8>);

/// An object that is not a directory, and whose known names were removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamelessFile {
    pub(crate) object: ObjectPlace,
    pub(crate) data: Option<ObjectPlace>,
    pub(crate) redirect: Option<Vec<u8>>,
    pub(crate) names: Vec<EntryName>,
    /// Whether the last name was removed.
    pub(crate) orphan: bool,
    /// The index of its descriptor.
    pub(crate) descriptor: Option<usize>,
}

/// A name in a directory of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ObjectPlace {
    /// The index of the layer, or its id in the ledger.
    pub(crate) layer: u64,
    /// The path of the directory, relative to the layer's root; empty for the root, and if a descriptor is used instead.
    pub(crate) dir: Vec<u8>,
    pub(crate) name: Vec<u8>,
}

/// A directory of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DirPlace {
    /// The layer, and the path relative to its root.
    Path(u64, Vec<u8>),
    /// It was removed from the layer: the layer, the object on disk, and the index of a descriptor.
    Removed(u64, Identity, usize),
}

/// The numbers by which locations refer to layers and descriptors.
pub(crate) trait References {
    /// Returns the number of a layer.
    fn layer(&mut self, layer: &Arc<Layer>) -> u64;
    /// Returns the number of a descriptor.
    fn descriptor(&mut self, descriptor: Arc<OwnedFd>) -> usize;
}

impl Place {
    /// Returns the names to which the place refers, with the inode numbers of their directories.
    pub(crate) fn names(&self) -> &[EntryName] {
        match self {
            Self::Dir(name) => std::slice::from_ref(name),
            Self::File(names) => names,
            Self::Nameless(file) => &file.names,
            Self::Root | Self::RemovedDir { .. } => &[],
        }
    }

    /// Returns the location of an inode's object.
    pub(crate) fn of(inode: &Inode, to: &mut impl References) -> Result<Self> {
        if inode.is_dir() {
            of_dir(inode.dir()?, to)
        } else {
            of_file(inode.file()?, to)
        }
    }

    /// Returns the location of an object in this state.
    pub(crate) fn of_state(state: InodeState, to: &mut impl References) -> Result<Self> {
        match state {
            InodeState::Dir(dir) => of_dir(dir, to),
            InodeState::File(file) => of_file(file, to),
        }
    }
}

fn of_dir(state: DirState, to: &mut impl References) -> Result<Place> {
    let DirState {
        locs,
        redirect,
        alias,
        removed,
        // In the record of the inode.
        identity: _,
    } = state;
    match alias {
        Some(alias) => Ok(Place::Dir(entry_name(&alias))),
        None if !removed => Ok(Place::Root),
        None => Ok(Place::RemovedDir {
            locations: locs
                .iter()
                .map(|dir| dir_place(dir, to))
                .collect::<Result<_>>()?,
            redirect: redirect.map(|redirect| redirect.to_value()),
        }),
    }
}

fn of_file(state: FileState, to: &mut impl References) -> Result<Place> {
    let FileState {
        loc,
        data,
        redirect,
        aliases,
        orphan,
        anchor,
        // Only a cache.
        visible: _,
        identity: _,
    } = state;
    let names: Vec<EntryName> = aliases.iter().map(entry_name).collect();
    if !orphan && anchor.is_none() && !names.is_empty() {
        return Ok(Place::File(names));
    }
    let descriptor = anchor.map(|anchor| to.descriptor(anchor));
    let object = match descriptor {
        None => object_place(&loc, to)?,
        // The name can be gone.
        Some(_) => ObjectPlace {
            layer: to.layer(loc.dir.layer()),
            dir: Vec::new(),
            name: loc.name.as_bytes().to_vec(),
        },
    };
    Ok(Place::Nameless(Box::new(NamelessFile {
        object,
        data: data.map(|data| object_place(&data, to)).transpose()?,
        redirect: redirect.map(|redirect| redirect.to_value()),
        names,
        orphan,
        descriptor,
    })))
}

fn dir_place(dir: &LayerDir, to: &mut impl References) -> Result<DirPlace> {
    let layer = to.layer(dir.layer());
    Ok(match dir.removed_fd() {
        Some(fd) => {
            let object = Identity::from_stat(&sys::stat::stat_fd(&*fd)?);
            DirPlace::Removed(layer, object, to.descriptor(fd))
        }
        None => DirPlace::Path(layer, dir.path_in_layer()?),
    })
}

fn object_place(loc: &Loc, to: &mut impl References) -> Result<ObjectPlace> {
    Ok(ObjectPlace {
        layer: to.layer(loc.dir.layer()),
        dir: loc.dir.path_in_layer()?,
        name: loc.name.as_bytes().to_vec(),
    })
}

fn entry_name(alias: &Alias) -> EntryName {
    (alias.parent.ino(), alias.name.as_bytes().to_vec())
}
