//! Access to a single layer, without merging; see [`crate::view`] for the merged tree.

mod descriptors;
mod dir;
mod foreign;
mod handed_over;
mod inherit;
pub mod journal;
mod list;
pub mod lock;
pub mod moves;
mod private;
mod probe;
mod recorded;
#[cfg(test)]
mod recorded_tests;
mod upper;
mod upper_dirs;
mod whiteout;
mod work;
pub mod zero_device;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use dir::{LayerDir, Moving};
pub use handed_over::{LayerRecord, UpperRecord};
pub use inherit::{InheritedLayer, LayerTraits};
pub use list::{LayerEntry, list, number_at};
pub use probe::{LayerObject, Markers, Probe, probe};
pub use recorded::{InvalidRecord, OriginalAttributes, RecordedAttributes, StoredAttributes};
pub use upper::Upper;
pub use whiteout::WhiteoutForm;
pub use work::{Staged, WorkDir};

use private::Reached;

use crate::error::{Errno, Error, Result};
use crate::format::XattrSpace;
use crate::setup::SetupError;
use crate::shown::Show as _;
use crate::sys;

/// A layer: a directory tree whose root is open. Only the topmost layer of a stack is written.
#[derive(Clone, Debug)]
pub struct Layer {
    path: PathBuf,
    root: Arc<OwnedFd>,
    id: u64,
    file_system: u64,
    dev: u64,
    ino: u64,
    space: XattrSpace,
    foreign: bool,
    /// Whether the root was opened through a mount with `nodev`.
    no_devices: bool,
    /// Whether the warning about names that may be foreign markers was logged.
    warned: Arc<AtomicBool>,
}

impl Layer {
    /// Opens the layer at `path`, whose marker xattrs are in the namespace `space`.
    pub fn open(path: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        let at = |error| SetupError::at("cannot use the layer", path, error);
        let (root, reached) = private::for_reading(path).map_err(at)?;
        let found = Self::from_root(path, root, space).map_err(at)?;
        Ok(Arc::new(Self {
            no_devices: reached == Reached::PrivateMount,
            ..found
        }))
    }

    /// Returns the layer with the ids of its file system, for an overlay that maps them itself.
    ///
    /// Before Linux 6.15, and without privilege, the ids are those of the layer's mount, which may be idmapped.
    #[must_use]
    pub fn without_id_map(self: Arc<Self>) -> Arc<Self> {
        match self.root_without_id_map() {
            Ok(root) => self.reached_as(root, Reached::PrivateMount),
            Err(error) => {
                log::debug!(
                    "the ids of {} are those of its mount: {error}",
                    self.path.shown()
                );
                self
            }
        }
    }

    fn root_without_id_map(&self) -> Result<OwnedFd> {
        let root = private::without_id_map(&self.path)?;
        let stat = sys::stat::stat_fd(&root)?;
        // Another directory can be at the path by now.
        match (stat.dev, stat.ino) == (self.dev, self.ino) {
            true => Ok(root),
            false => Err(Error::Errno(Errno::STALE)),
        }
    }

    /// Returns the layer with this root directory.
    fn from_root(path: &Path, root: OwnedFd, space: XattrSpace) -> Result<Self> {
        let stat = sys::stat::stat_fd(&root)?;
        let born = sys::stat::birth_time(&root)?.unwrap_or_default();
        let file_system = match sys::stat::statvfs(&root)?.f_fsid {
            // FUSE has no fsid. Without a substitute, inode numbers of two such file systems would collide.
            0 => path_id(path),
            id => id,
        };
        let id = mix(&[
            file_system,
            stat.ino,
            born.secs.cast_unsigned(),
            u64::from(born.nanos),
        ]);
        Ok(Self {
            path: path.to_path_buf(),
            root: Arc::new(root),
            id,
            file_system,
            dev: stat.dev,
            ino: stat.ino,
            space,
            foreign: false,
            no_devices: false,
            warned: Arc::default(),
        })
    }

    /// Opens a layer in which the markers of fuse-overlayfs and of container image layers are read as well.
    pub fn open_foreign(path: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        let mut layer = Arc::unwrap_or_clone(Self::open(path, space)?);
        layer.foreign = true;
        Ok(Arc::new(layer))
    }

    /// Returns the same layer by another descriptor of its root directory, on the same mount.
    fn opened_as(self: Arc<Self>, root: OwnedFd) -> Arc<Self> {
        let mut layer = Arc::unwrap_or_clone(self);
        layer.root = Arc::new(root);
        Arc::new(layer)
    }

    /// Returns the same layer by a descriptor of its root directory on another mount.
    fn reached_as(self: Arc<Self>, root: OwnedFd, reached: Reached) -> Arc<Self> {
        let mut layer = Arc::unwrap_or_clone(self.opened_as(root));
        layer.no_devices = reached == Reached::PrivateMount;
        Arc::new(layer)
    }

    /// Returns the layer's id, a hash of the file system's id and the root's inode number and birth time.
    ///
    /// It identifies the layer, does not depend on the path, and is constant as long as the root directory exists.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the path that the layer was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the device number of the root.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// Returns the namespace of the marker xattrs.
    pub fn space(&self) -> XattrSpace {
        self.space
    }

    /// Whether the markers of fuse-overlayfs and of container image layers are read.
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Whether the layer is accessed through a mount with `nodev`, on which the kernel refuses to open devices.
    pub fn has_no_devices(&self) -> bool {
        self.no_devices
    }

    /// Logs a warning about a name that fuse-overlayfs would treat as a marker, once for each layer.
    fn warn_of_likely_marker(&self, name: &[u8]) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!(
                "the layer {} contains the name {}: if it is a whiteout of fuse-overlayfs or a container image, \
                 mount with the option fuse_overlayfs",
                self.path.shown(),
                name.shown()
            );
        }
    }

    /// Logs a warning about a name that cannot be created because it would be a marker, once for each layer.
    pub fn warn_of_refused_marker(&self, name: &[u8]) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!(
                "cannot create {} in the layer {}: names that begin with .wh. are whiteouts; mount with the option \
                 nofuse_overlayfs to use them as ordinary names",
                name.shown(),
                self.path.shown()
            );
        }
    }

    /// Returns the descriptor of the root directory, which may be O_PATH.
    pub fn root_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Returns the root directory.
    pub fn root_dir(self: &Arc<Self>) -> Arc<LayerDir> {
        LayerDir::root(self.clone())
    }

    /// Returns the visible inode number of the inode `ino` of this layer.
    ///
    /// On the file system `base_dev` of the topmost layer, that is `ino` itself. Otherwise it is a hash of the file
    /// system's id and `ino`, so that numbers of two file systems do not collide and do not depend on the layer's
    /// position in the stack.
    pub fn number(&self, base_dev: u64, ino: u64) -> u64 {
        if self.dev == base_dev {
            ino
        } else {
            (mix(&[self.file_system, ino]) >> 2) | (1 << 62)
        }
    }
}

/// Returns a substitute for the id of a file system that has none: a hash of the layer's path.
fn path_id(path: &Path) -> u64 {
    let canonical = path.canonicalize();
    let bytes = canonical.as_deref().unwrap_or(path).as_os_str().as_bytes();
    let words: Vec<u64> = bytes.iter().map(|byte| u64::from(*byte)).collect();
    mix(&words)
}

/// Hashes 64-bit words with FNV-1a and a final mixing step.
///
/// Must not change: the layer ids in `cowl.ino` xattrs are computed with it.
fn mix(words: &[u64]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in words.iter().flat_map(|word| word.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^ (hash >> 29)
}

impl XattrSpace {
    /// Returns the namespace that this process can write.
    ///
    /// `trusted.*` needs CAP_SYS_ADMIN in the initial user namespace, which is recognized by its complete id map.
    pub fn detect() -> Self {
        if sys::process::is_initial_admin() {
            Self::Trusted
        } else {
            Self::User
        }
    }
}
