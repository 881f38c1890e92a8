//! One tree on disk, and the stack that such trees make. No merging: that is [`crate::view`].

mod descriptors;
mod dir;
mod foreign;
pub mod journal;
mod list;
pub mod lock;
mod private;
mod probe;
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
pub use list::{LayerEntry, list, number_at};
pub use probe::{Markers, Probe, Seen, probe};
pub use upper::Upper;
pub use whiteout::WhiteoutForm;
pub use work::{Staged, WorkDir};

use private::Reached;

use crate::format::XattrSpace;
use crate::setup::SetupError;
use crate::shown::Show as _;
use crate::sys;

/// One tree: a folder somewhere, opened once. Only the topmost of a stack is ever written.
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
    /// Its root was reached through a mount with `nodev`.
    no_devices: bool,
    /// It was said that names in it look like marks.
    warned: Arc<AtomicBool>,
}

impl Layer {
    /// Opens the tree at `path`, whose markers lie in `space`. Opening takes no lock and changes nothing.
    pub fn open(path: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        let at = |error| SetupError::at("cannot use the layer", path, error);
        let (root, reached) = private::for_reading(path).map_err(at)?;
        let stat = sys::stat::stat_fd(&root).map_err(at)?;
        let born = sys::stat::birth_time(&root)
            .map_err(at)?
            .unwrap_or_default();
        let file_system = match sys::stat::statvfs(&root).map_err(at)?.f_fsid {
            // FUSE has no id to tell, and numbers of two such file systems must not meet.
            0 => place_id(path),
            id => id,
        };
        let id = mix(&[
            file_system,
            stat.ino,
            born.secs.cast_unsigned(),
            u64::from(born.nanos),
        ]);
        Ok(Arc::new(Self {
            path: path.to_path_buf(),
            root: Arc::new(root),
            id,
            file_system,
            dev: stat.dev,
            ino: stat.ino,
            space,
            foreign: false,
            no_devices: reached == Reached::PrivateMount,
            warned: Arc::default(),
        }))
    }

    /// Like [`Layer::open`], with the markers of fuse-overlayfs and of tar layers.
    pub fn open_foreign(path: &Path, space: XattrSpace) -> Result<Arc<Self>, SetupError> {
        let mut layer = Arc::unwrap_or_clone(Self::open(path, space)?);
        layer.foreign = true;
        Ok(Arc::new(layer))
    }

    /// Returns the same layer by another descriptor of its root directory.
    fn opened_as(self: Arc<Self>, root: OwnedFd, reached: Reached) -> Arc<Self> {
        let mut layer = Arc::unwrap_or_clone(self);
        layer.root = Arc::new(root);
        layer.no_devices = reached == Reached::PrivateMount;
        Arc::new(layer)
    }

    /// A number that stays the layer's own as long as its root folder lives, whatever its path, and
    /// is no other layer's: made of the file system's id and the root's inode and birth time.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device its root lies on.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// Where its marks lie.
    pub fn space(&self) -> XattrSpace {
        self.space
    }

    /// Whether marks of fuse-overlayfs and of tar layers count.
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Whether the kernel refuses to open devices in it, because it was reached through a mount with `nodev`.
    pub fn has_no_devices(&self) -> bool {
        self.no_devices
    }

    /// Told when a name is met that another program would take for a mark; says so once.
    fn note_likely_mark(&self, name: &[u8]) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            log::warn!(
                "the layer {} has the name {}: if fuse-overlayfs or a container image made it, it hides \
                 something, and the mount wants the option fuse_overlayfs",
                self.path.shown(),
                name.escape_ascii()
            );
        }
    }

    /// The root folder's O_PATH descriptor.
    pub fn root_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The root folder.
    pub fn root_dir(self: &Arc<Self>) -> Arc<LayerDir> {
        LayerDir::root(self.clone())
    }

    /// The number that an inode of this layer shows: its own on the file system of the topmost
    /// layer, else one made of the file system's id and its own, so that two file systems do not
    /// meet and the layer's place in the stack does not matter.
    pub fn number(&self, base_dev: u64, ino: u64) -> u64 {
        if self.dev == base_dev {
            ino
        } else {
            (mix(&[self.file_system, ino]) >> 2) | (1 << 62)
        }
    }
}

/// What stands for a file system's id where there is none: the layer's place.
fn place_id(path: &Path) -> u64 {
    let place = path.canonicalize();
    let place = place.as_deref().unwrap_or(path).as_os_str().as_bytes();
    let words: Vec<u64> = place.iter().map(|byte| u64::from(*byte)).collect();
    mix(&words)
}

/// FNV-1a over 64-bit words, finished so that all bits count. Part of the format: the ids in number
/// marks are made with it.
fn mix(words: &[u64]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in words.iter().flat_map(|word| word.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash ^ (hash >> 29)
}

impl XattrSpace {
    /// The space that this process can write: trusted.* asks for CAP_SYS_ADMIN in the initial user
    /// namespace, whose id map is the whole range.
    pub fn detect() -> Self {
        if sys::process::is_initial_admin() {
            Self::Trusted
        } else {
            Self::User
        }
    }
}
