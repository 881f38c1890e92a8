//! The merged tree of a stack of layers, read-only, without a mount and without privileges.
//!
//! It caches nothing between two calls. The overlay adds inodes and writing; `cowl` uses it to compare, export and
//! flatten.

mod listing;
mod lookup;
mod names;
#[cfg(test)]
mod names_tests;
mod path;
pub mod resolve;

pub use listing::MergedEntry;
pub use names::{NameIndex, PartialIndex};
pub use path::LayerPath;

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::error::Result;
use crate::format::{InodeNumberXattr, Redirect, XattrSpace};
use crate::layer::{Layer, LayerDir, Markers};
use crate::name::Name;
use crate::sys;
use crate::sys::stat::{FileKind, Stat};

/// A stack of layers, topmost first.
#[derive(Clone, Debug)]
pub struct View {
    layers: Vec<Arc<Layer>>,
    base_dev: u64,
    extent: Extent,
    /// Layers that show nothing themselves and hold the content of metacopies.
    data: Vec<Arc<Layer>>,
}

/// Whether a view has all layers of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    Whole,
    /// There are further layers below.
    Part,
}

/// An entry of a merged directory.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The name.
    pub name: Name,
    /// The type; for a whiteout (raw listings only) a character device.
    pub kind: FileKind,
    /// The visible inode number.
    pub ino: u64,
    /// Whether the name is hidden (raw listings only).
    pub whiteout: bool,
}

/// The result of a lookup.
#[derive(Clone, Debug)]
pub enum Found {
    /// No layer contains the name.
    Absent,
    /// A whiteout hides the name.
    Whiteout,
    /// A directory.
    Dir(DirNode),
    /// An object of any other type.
    File(FileNode),
}

/// A merged directory.
#[derive(Clone, Debug)]
pub struct DirNode {
    /// The merged directories in the layers, topmost first, never empty. The first one has the attributes.
    pub locs: Vec<Arc<LayerDir>>,
    /// The path to look up in layers below this view; `None` if they do not contribute.
    pub below: Option<LayerPath>,
    /// The redirect xattr of the topmost directory.
    pub redirect: Option<Redirect>,
    /// The attributes on disk.
    pub stat: Stat,
    /// The visible inode number.
    pub ino: u64,
}

/// An object other than a directory.
#[derive(Clone, Debug)]
pub struct FileNode {
    /// The location of its name, attributes and xattrs.
    pub loc: Loc,
    /// The location of its content, if different (metacopy).
    pub data: Option<Loc>,
    /// Whether its content is in a layer below this view, at the path `below`.
    pub data_missing: bool,
    /// The path to look up in layers below this view; `None` if they do not contribute.
    pub below: Option<LayerPath>,
    /// The redirect xattr at `loc`.
    pub redirect: Option<Redirect>,
    /// The attributes, with the size and blocks of the content.
    pub stat: Stat,
    /// The visible inode number.
    pub ino: u64,
}

/// The location of an object: a name in a directory of one layer.
#[derive(Clone, Debug)]
pub struct Loc {
    /// The directory.
    pub dir: Arc<LayerDir>,
    /// The name.
    pub name: Name,
}

/// Xattrs with their values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

impl View {
    /// Creates the view of a complete stack, topmost first.
    pub fn new(layers: Vec<Arc<Layer>>) -> Self {
        Self::with(layers, Extent::Whole)
    }

    /// Creates the view of a range of a stack, which has further layers below.
    pub fn part(layers: Vec<Arc<Layer>>) -> Self {
        Self::with(layers, Extent::Part)
    }

    fn with(layers: Vec<Arc<Layer>>, extent: Extent) -> Self {
        let base_dev = layers.first().map_or(0, |layer| layer.dev());
        Self {
            layers,
            base_dev,
            extent,
            data: Vec::new(),
        }
    }

    /// Returns the view of a stack whose layers have changed to `layers`, with the same data-only layers.
    #[must_use]
    pub fn with_layers(&self, layers: Vec<Arc<Layer>>) -> Self {
        Self {
            data: self.data.clone(),
            ..Self::with(layers, self.extent)
        }
    }

    /// Adds data-only layers, topmost first.
    ///
    /// They are not visible, but the content of a metacopy that has a redirect with a path is looked up there if no
    /// other layer contains it.
    #[must_use]
    pub fn with_data_layers(mut self, data: Vec<Arc<Layer>>) -> Self {
        self.data = data;
        self
    }

    /// Returns the data-only layers, topmost first.
    pub fn data_only(&self) -> &[Arc<Layer>] {
        &self.data
    }

    /// Returns the layers, topmost first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Returns the root directory, merged from the roots of all layers.
    pub fn root(&self) -> Result<DirNode> {
        let locs: Vec<_> = self.layers.iter().map(Layer::root_dir).collect();
        let top = locs
            .first()
            .ok_or(crate::Error::Damaged("a stack without layers"))?;
        let stat = sys::stat::stat_fd(&*top.fd()?)?;
        Ok(DirNode {
            locs,
            below: self.is_part().then(LayerPath::default),
            redirect: None,
            stat,
            ino: 1,
        })
    }

    /// Returns whether markers in this layer count: at the bottom of a stack there is nothing to hide, unless
    /// data-only layers have the content of its metacopies.
    fn markers(&self, layer: &Arc<Layer>) -> Markers {
        let count = self.is_part()
            || !self.data.is_empty()
            || self.layers.len() == 1
            || self
                .layers
                .last()
                .is_none_or(|last| !Arc::ptr_eq(last, layer));
        match count {
            true => Markers::Read,
            false => Markers::Ignored,
        }
    }

    fn is_part(&self) -> bool {
        self.extent == Extent::Part
    }

    /// Returns the visible inode number of the inode `ino` on the device `dev`, if that is the device of one of the
    /// layers, without regard to a number from before a copy-up.
    pub fn own_number(&self, dev: u64, ino: u64) -> Option<u64> {
        let layer = self.layers.iter().find(|layer| layer.dev() == dev)?;
        Some(layer.number(self.base_dev, ino))
    }

    /// Returns the visible inode number of an object.
    ///
    /// That is the number from before its copy-up, if the layer that the number belongs to is in the stack; otherwise
    /// its own.
    pub fn number(&self, layer: &Layer, stat: &Stat, retained: Option<InodeNumberXattr>) -> u64 {
        self.number_of(layer, stat.ino, retained)
    }

    fn number_of(&self, layer: &Layer, ino: u64, retained: Option<InodeNumberXattr>) -> u64 {
        if let Some(retained) = retained
            && let Some(origin) = self.layers.iter().find(|l| l.id() == retained.layer)
        {
            return origin.number(self.base_dev, retained.ino);
        }
        layer.number(self.base_dev, ino)
    }
}

impl Loc {
    /// Opens an O_PATH descriptor of the object.
    pub fn open_path(&self) -> Result<OwnedFd> {
        sys::dir::open_path((*self.dir.fd()?).as_fd(), &self.name)
    }

    /// Opens a regular file for reading. Fails with EIO for an object of any other type.
    pub fn open_read(&self) -> Result<OwnedFd> {
        self.open(rustix::fs::OFlags::RDONLY)
    }

    /// Opens a regular file. Fails with EIO for an object of any other type.
    pub fn open(&self, flags: rustix::fs::OFlags) -> Result<OwnedFd> {
        let dir = self.dir.fd()?;
        match self.dir.layer().has_no_devices() {
            true => sys::content::open_nodev((*dir).as_fd(), &self.name, flags),
            false => sys::content::open((*dir).as_fd(), &self.name, flags),
        }
    }

    /// Returns the attributes of the object. Does not follow links.
    pub fn stat(&self) -> Result<Stat> {
        sys::stat::stat_at((*self.dir.fd()?).as_fd(), &self.name)
    }

    /// Returns the target of a symbolic link.
    pub fn readlink(&self) -> Result<Vec<u8>> {
        sys::dir::readlink((*self.dir.fd()?).as_fd(), &self.name)
    }

    /// Whether both are the same name in the same directory of the same layer.
    pub fn is_same_location(&self, other: &Self) -> bool {
        self.name == other.name && self.dir.is_same_location(&other.dir)
    }

    /// Returns all xattrs on disk, including markers.
    pub fn xattrs(&self) -> Result<Xattrs> {
        sys::xattr::all(self.open_path()?.as_fd())
    }
}

impl DirNode {
    /// Whether both are merged from the same directories. Then everything below them is equal as well.
    pub fn is_same_location(&self, other: &Self) -> bool {
        self.locs.len() == other.locs.len()
            && self
                .locs
                .iter()
                .zip(&other.locs)
                .all(|(one, two)| one.is_same_location(two))
    }

    /// Reopens the parent directories for a walk that returns to them ([`LayerDir::leave`]).
    pub fn leave(&self) {
        self.locs.iter().for_each(|loc| loc.leave());
    }

    /// Returns all xattrs on disk, including markers.
    pub fn xattrs(&self) -> Result<Xattrs> {
        let top = self
            .locs
            .first()
            .ok_or(crate::Error::Damaged("a directory that is in no layer"))?;
        sys::xattr::all((*top.fd()?).as_fd())
    }
}

impl FileNode {
    /// Returns the location of the content.
    pub fn data_loc(&self) -> &Loc {
        self.data.as_ref().unwrap_or(&self.loc)
    }
}

/// Removes the marker xattrs from a list. The remaining ones have their names on disk.
///
/// The record of attributes that could not be stored remains: it belongs to the object, not to the layer.
pub fn without_markers(space: XattrSpace, mut on_disk: Xattrs) -> Xattrs {
    let value = |xattr: &str| {
        let found = on_disk.iter().find(|(name, _)| name == xattr.as_bytes());
        Ok::<_, Infallible>(found.map(|(_, value)| value.clone()))
    };
    let Ok(hidden) = space.internal_xattr(value);
    on_disk.retain(|(name, _)| {
        name == space.recorded().as_bytes()
            || space.to_mount(name).is_some()
                && hidden.is_none_or(|hidden| name != hidden.as_bytes())
    });
    on_disk
}

/// Removes the marker xattrs from a list, and unescapes the names of the others, as they are visible on a mount.
pub fn user_xattrs(space: XattrSpace, on_disk: Xattrs) -> Xattrs {
    without_markers(space, on_disk)
        .into_iter()
        .filter_map(|(name, value)| Some((space.to_mount(&name)?.into_owned(), value)))
        .collect()
}
