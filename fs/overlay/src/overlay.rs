//! The state of a mount.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use parking_lot::{Mutex, RwLock};

use crate::content::{ContentDescriptors, FileHandle, OpenCounts};
use crate::inode::{DirState, Identity, Inode, InodeState, InodeTable, OnConflict};
use crate::listing::{Cookies, Listings};
use crate::names::LinkIndex;
use crate::names::absent::LastAbsent;
use crate::names::deep::DeepDirs;
use crate::reach::{OverlayOptions, Stack};
use cowl_layers::error::{Error, Result};
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;

/// A mounted stack, without the mount.
#[derive(Debug)]
pub struct Overlay {
    pub(crate) stack: RwLock<Stack>,
    pub(crate) options: OverlayOptions,
    pub(crate) inodes: InodeTable,
    pub(crate) root: Arc<Inode>,
    pub(crate) links: LinkIndex,
    pub(crate) cookies: Cookies,
    pub(crate) listings: Listings,
    pub(crate) deep: DeepDirs,
    pub(crate) absent: LastAbsent,
    pub(crate) opens: OpenCounts,
    pub(crate) descriptors: ContentDescriptors,
    /// The number of files that the kernel may write to without a request.
    pub(crate) passthrough_writers: Arc<AtomicU32>,
    /// Shared locks on the layers that are only read, held while the mount lives.
    pub(crate) locks: Mutex<Vec<OwnedFd>>,
}

impl Overlay {
    /// Returns an overlay of `lowers` (topmost first) under an optional upper.
    pub fn new(
        upper: Option<Arc<Upper>>,
        lowers: Vec<Arc<Layer>>,
        options: OverlayOptions,
    ) -> Result<Self> {
        let mut layers: Vec<Arc<Layer>> = upper.iter().map(|upper| upper.layer.clone()).collect();
        layers.extend(lowers);
        let view = View::new(layers);
        let node = view.root()?;
        let identity = Identity::from_stat(&node.stat);
        let state = InodeState::Dir(DirState {
            locs: node.locs.into(),
            redirect: None,
            alias: None,
            removed: false,
            identity,
        });
        let inodes = InodeTable::default();
        let (root, _) = inodes
            .intern(1, identity, OnConflict::Renumber, |ino| {
                Inode::new(ino, FileKind::Directory, state)
            })
            .ok_or(Error::Damaged(
                "a root folder that is known before it is made",
            ))?;
        inodes.count_lookup(&root);
        Ok(Self {
            stack: RwLock::new(Stack::new(view, upper)),
            options,
            inodes,
            root,
            links: LinkIndex::default(),
            cookies: Cookies::default(),
            listings: Listings::default(),
            deep: DeepDirs::default(),
            absent: LastAbsent::default(),
            opens: OpenCounts::default(),
            descriptors: ContentDescriptors::default(),
            passthrough_writers: Arc::default(),
            locks: Mutex::default(),
        })
    }

    /// Puts the overlay over data-only layers, topmost first.
    #[must_use]
    pub fn with_data_layers(mut self, data: Vec<Arc<Layer>>) -> Self {
        self.stack.get_mut().add_data_layers(data);
        self
    }

    /// Holds locks on layers until the mount ends.
    pub fn hold_locks(&self, locks: Vec<OwnedFd>) {
        self.locks.lock().extend(locks);
    }

    /// Returns the root directory.
    pub fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    /// Records that the kernel forgot `count` of its lookups of an inode.
    pub fn forget(&self, ino: u64, count: u64) {
        self.inodes.forget(ino, count);
        if self.inodes.shrink() {
            sys::process::give_memory_back();
        }
    }

    /// Returns the inodes that are known.
    pub fn inodes(&self) -> &InodeTable {
        &self.inodes
    }

    /// Returns the options of this mount.
    pub fn options(&self) -> &OverlayOptions {
        &self.options
    }

    /// Closes half of the cached descriptors of files' contents, to be called when the process has none left. Returns
    /// their number.
    pub fn evict_descriptors(&self) -> usize {
        self.descriptors.evict_half()
    }

    /// Closes a file.
    pub fn close(&self, handle: &FileHandle) {
        self.descriptors.remove_user(handle);
        self.opens.count_close(handle);
    }

    /// Returns the files that a process has open for writing.
    pub fn inodes_with_writers(&self) -> Vec<u64> {
        self.inodes.with_writers()
    }

    /// Returns the counter of the files of the upper that may be written to without a request. The caller that
    /// allows such writes must count them, inside of an operation. While there is one, no layer can be pushed.
    pub fn passthrough_writers(&self) -> Arc<AtomicU32> {
        self.passthrough_writers.clone()
    }

    /// Whether a layer lies on an overlayfs of the kernel.
    pub fn is_on_overlayfs(&self) -> bool {
        let stack = self.stack.read();
        let mut layers = stack.view().layers().iter().chain(stack.view().data_only());
        layers.any(|layer| match sys::stat::is_on_overlayfs(layer.root_fd()) {
            Ok(is) => is,
            Err(error) => {
                log::warn!("cannot ask what {} lies on: {error}", layer.path().shown());
                false
            }
        })
    }

    /// Returns the number of open descriptors: for reading only, and for writing.
    pub fn open_files(&self) -> (u32, u32) {
        (self.opens.readers(), self.opens.writers())
    }

    /// Returns the paths of the layer that is written, and of those below, topmost first.
    pub fn layer_paths(&self) -> (Option<PathBuf>, Vec<PathBuf>) {
        let stack = self.stack.read();
        let upper = stack.writable().map(|u| u.layer.path().to_path_buf());
        let lowers = stack
            .view()
            .layers()
            .iter()
            .skip(usize::from(upper.is_some()));
        let lowers = lowers.map(|layer| layer.path().to_path_buf()).collect();
        (upper, lowers)
    }
}
