//! What a stack of trees shows: the merged view, read-only, without a mount and without root.
//!
//! It keeps nothing between two calls. The overlay adds inodes and writing; the snapshot manager
//! compares, exports and flattens with it.

mod listing;
mod lookup;
mod names;
#[cfg(test)]
mod names_tests;
mod path;
pub mod resolve;

pub use listing::Line;
pub use names::{Known, PlaceNames};
pub use path::LayerPath;

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::error::Result;
use crate::format::{NumberMark, Redirect, XattrSpace};
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

/// One name of a folder.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The name.
    pub name: Name,
    /// Its type; for a whiteout (raw listings only) a character device.
    pub kind: FileKind,
    /// The number that it shows.
    pub ino: u64,
    /// The name is hidden here (raw listings only).
    pub whiteout: bool,
}

/// What a name means.
#[derive(Clone, Debug)]
pub enum Found {
    /// No layer has it.
    Absent,
    /// A layer hides it.
    Whiteout,
    /// A folder.
    Dir(DirNode),
    /// Anything else.
    File(FileNode),
}

/// A folder of the view.
#[derive(Clone, Debug)]
pub struct DirNode {
    /// Where it lies, topmost first, never empty; the attributes are the first one's.
    pub locs: Vec<Arc<LayerDir>>,
    /// The path under which layers below this view's last would be asked; `None`: they would not be.
    pub below: Option<LayerPath>,
    /// The redirect mark on the topmost place.
    pub redirect: Option<Redirect>,
    /// Attributes on disk.
    pub stat: Stat,
    /// The number that it shows.
    pub ino: u64,
}

/// What is no folder.
#[derive(Clone, Debug)]
pub struct FileNode {
    /// Where its name, owner, mode, times and attributes lie.
    pub loc: Loc,
    /// Where its content lies when that is elsewhere (metacopy).
    pub data: Option<Loc>,
    /// Its content lies below this view, at `below`.
    pub data_missing: bool,
    /// See [`DirNode::below`].
    pub below: Option<LayerPath>,
    /// The redirect mark at `loc`.
    pub redirect: Option<Redirect>,
    /// Attributes, with size and blocks of the content.
    pub stat: Stat,
    /// The number that it shows.
    pub ino: u64,
}

/// A name in a folder of one layer.
#[derive(Clone, Debug)]
pub struct Loc {
    /// The folder.
    pub dir: Arc<LayerDir>,
    /// The name.
    pub name: Name,
}

/// Attributes with their values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

impl View {
    /// A whole stack, topmost first: below its last layer there is nothing.
    pub fn new(layers: Vec<Arc<Layer>>) -> Self {
        Self::with(layers, Extent::Whole)
    }

    /// A range of a stack: there are further layers below.
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

    /// The same over data-only layers, topmost first: nothing in them shows, but a metacopy with a path
    /// for a redirect finds its content there when no other layer has it.
    #[must_use]
    pub fn over_data(mut self, data: Vec<Arc<Layer>>) -> Self {
        self.data = data;
        self
    }

    /// The data-only layers, topmost first.
    pub fn data_only(&self) -> &[Arc<Layer>] {
        &self.data
    }

    /// The layers, topmost first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The root folder, merged of all layers' roots.
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

    /// The number that an object shows: the one that it kept from before a copy-up, as long as the
    /// layer that lent it is in the stack; else its own.
    pub fn number(&self, layer: &Layer, stat: &Stat, mark: Option<NumberMark>) -> u64 {
        self.number_of(layer, stat.ino, mark)
    }

    fn number_of(&self, layer: &Layer, ino: u64, mark: Option<NumberMark>) -> u64 {
        if let Some(mark) = mark
            && let Some(lender) = self.layers.iter().find(|l| l.id() == mark.layer)
        {
            return lender.number(self.base_dev, mark.ino);
        }
        layer.number(self.base_dev, ino)
    }
}

impl Loc {
    /// An O_PATH descriptor.
    pub fn open_path(&self) -> Result<OwnedFd> {
        sys::dir::open_path((*self.dir.fd()?).as_fd(), &self.name)
    }

    /// Opens the regular file for reading.
    pub fn open_read(&self) -> Result<OwnedFd> {
        self.open(rustix::fs::OFlags::RDONLY)
    }

    /// Opens the regular file; EIO where it is anything else.
    pub fn open(&self, flags: rustix::fs::OFlags) -> Result<OwnedFd> {
        let dir = self.dir.fd()?;
        match self.dir.layer().has_no_devices() {
            true => sys::content::open_nodev((*dir).as_fd(), &self.name, flags),
            false => sys::content::open((*dir).as_fd(), &self.name, flags),
        }
    }

    /// lstat.
    pub fn stat(&self) -> Result<Stat> {
        sys::stat::stat_at((*self.dir.fd()?).as_fd(), &self.name)
    }

    /// The target of a symbolic link.
    pub fn readlink(&self) -> Result<Vec<u8>> {
        sys::dir::readlink((*self.dir.fd()?).as_fd(), &self.name)
    }

    /// Whether both are the same name in the same folder of the same layer.
    pub fn same_place(&self, other: &Self) -> bool {
        self.name == other.name && self.dir.same_place(&other.dir)
    }

    /// All attributes as they lie on disk, marks included.
    pub fn xattrs(&self) -> Result<Xattrs> {
        sys::xattr::all(self.open_path()?.as_fd())
    }
}

impl DirNode {
    /// Whether both lie at the same places: then everything below them is the same too.
    pub fn same_place(&self, other: &Self) -> bool {
        self.locs.len() == other.locs.len()
            && self
                .locs
                .iter()
                .zip(&other.locs)
                .all(|(one, two)| one.same_place(two))
    }

    /// Keeps the directories above open for a walk that goes back up ([`LayerDir::leave`]).
    pub fn leave(&self) {
        self.locs.iter().for_each(|loc| loc.leave());
    }

    /// All attributes as they lie on disk, marks included.
    pub fn xattrs(&self) -> Result<Xattrs> {
        let top = self
            .locs
            .first()
            .ok_or(crate::Error::Damaged("a folder that lies nowhere"))?;
        sys::xattr::all((*top.fd()?).as_fd())
    }
}

impl FileNode {
    /// Where its content lies.
    pub fn data_loc(&self) -> &Loc {
        self.data.as_ref().unwrap_or(&self.loc)
    }
}

/// Drops overlay's marks. What stays has the names that it has on disk.
pub fn without_marks(space: XattrSpace, mut on_disk: Xattrs) -> Xattrs {
    let value = |mark: &str| {
        let found = on_disk.iter().find(|(name, _)| name == mark.as_bytes());
        Ok::<_, Infallible>(found.map(|(_, value)| value.clone()))
    };
    let Ok(ours) = space.not_a_users(value);
    on_disk.retain(|(name, _)| {
        space.to_mount(name).is_some() && ours.is_none_or(|ours| name != ours.as_bytes())
    });
    on_disk
}

/// Drops overlay's marks and puts escaped names back to what a user set.
pub fn user_xattrs(space: XattrSpace, on_disk: Xattrs) -> Xattrs {
    without_marks(space, on_disk)
        .into_iter()
        .filter_map(|(name, value)| Some((space.to_mount(&name)?.into_owned(), value)))
        .collect()
}
