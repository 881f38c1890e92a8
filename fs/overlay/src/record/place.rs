//! The locations of objects in the record.

use serde::{Deserialize, Serialize};

use crate::inode::Identity;

/// The location of an inode's object.
///
/// An object with a name is found by it in the stack. Any other one is found in its layer, or by a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
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
pub(super) type EntryName = (u64, Vec<u8>);

/// An object that is not a directory, and whose known names were removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NamelessFile {
    pub(super) object: ObjectPlace,
    pub(super) data: Option<ObjectPlace>,
    pub(super) redirect: Option<Vec<u8>>,
    pub(super) names: Vec<EntryName>,
    /// Whether the last name was removed.
    pub(super) orphan: bool,
    /// The index of its descriptor.
    pub(super) descriptor: Option<usize>,
}

/// A name in a directory of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ObjectPlace {
    /// The index of the layer.
    pub(super) layer: usize,
    /// The path of the directory, relative to the layer's root; empty for the root, and if a descriptor is used instead.
    pub(super) dir: Vec<u8>,
    pub(super) name: Vec<u8>,
}

/// A directory of one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum DirPlace {
    /// The index of the layer, and the path relative to its root.
    Path(usize, Vec<u8>),
    /// It was removed from the layer: the index of the layer, the object on disk, and the index of a descriptor.
    Removed(usize, Identity, usize),
}
