//! The state of a mount.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use cowl_layers::locks::{Mutex, RwLock, RwLockWriteGuard};

use crate::content::{ContentDescriptors, FileHandle, OpenCounts};
use crate::inode::{DirState, Identity, Inode, InodeState, InodeTable, OnConflict};
use crate::listing::{Cookies, Listings};
use crate::names::LinkIndex;
use crate::names::absent::LastAbsent;
use crate::names::deep::DeepDirs;
use crate::reach::{OverlayOptions, Stack};
use cowl_layers::error::{Error, Result};
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;

/// The longest time that a change of the stack waits for running operations.
const STACK_TIMEOUT: Duration = Duration::from_secs(10);
/// The duration of one attempt to lock the stack.
///
/// New operations wait during an attempt, so it must be shorter than a long copy that holds the lock.
const LOCK_ATTEMPT: Duration = Duration::from_millis(20);

/// An overlay of several layers, independent of a mount.
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
    pub(crate) descriptors: Arc<ContentDescriptors>,
    /// The number of files that the kernel may write to without a request to the daemon (passthrough).
    pub(crate) passthrough_writers: Arc<AtomicU32>,
    /// Shared locks on the lower layers, held until the mount ends.
    pub(crate) locks: Mutex<Vec<Arc<LayerLock>>>,
    /// Layers that are not in the stack any more, with their locks. They contain objects without a name.
    pub(crate) retained: Mutex<Vec<(Arc<Layer>, Arc<LayerLock>)>>,
}

impl Overlay {
    /// Creates an overlay of `lowers`, topmost first, and an optional upper layer. Without one it is read-only.
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
                "the root inode is in the table before it was created",
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
            descriptors: ContentDescriptors::new(),
            passthrough_writers: Arc::default(),
            locks: Mutex::default(),
            retained: Mutex::default(),
        })
    }

    /// Adds data-only layers below the lower layers, topmost first.
    #[must_use]
    pub fn with_data_layers(mut self, data: Vec<Arc<Layer>>) -> Self {
        self.stack.get_mut().add_data_layers(data);
        self
    }

    /// Holds these locks on layers until the mount ends.
    pub fn hold_locks(&self, locks: Vec<Arc<LayerLock>>) {
        self.locks.lock().extend(locks);
    }

    /// Makes the locks of the upper layer those of this process, whose predecessor has ended.
    pub fn assume_locks(&self) {
        if let Some(upper) = self.stack.read().writable() {
            upper.assume_locks();
        }
    }

    /// Locks the stack when no operation runs; `None` if that takes too long.
    pub(crate) fn lock_stack(&self) -> Option<RwLockWriteGuard<'_, Stack>> {
        let deadline = Instant::now() + STACK_TIMEOUT;
        loop {
            if let Some(stack) = self.stack.try_write_for(LOCK_ATTEMPT) {
                return Some(stack);
            }
            if Instant::now() > deadline {
                return None;
            }
        }
    }

    /// Releases the layers that other layers have replaced and that nothing refers to any more. Returns the number of
    /// those that remain.
    pub fn release_unused_layers(&self) -> usize {
        let mut retained = self.retained.lock();
        // Each location of an object in the layer refers to it.
        retained.retain(|(layer, _)| Arc::strong_count(layer) > 1);
        retained.len()
    }

    /// Returns the root directory.
    pub fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    /// Subtracts `count` from the lookup count of an inode (FUSE_FORGET), and drops the inode at zero.
    pub fn forget(&self, ino: u64, count: u64) {
        self.inodes.forget(ino, count);
        if self.inodes.shrink() {
            sys::process::give_memory_back();
        }
    }

    /// Returns the table of known inodes.
    pub fn inodes(&self) -> &InodeTable {
        &self.inodes
    }

    /// Returns the options of this mount.
    pub fn options(&self) -> &OverlayOptions {
        &self.options
    }

    /// Closes a file handle.
    pub fn close(&self, handle: &FileHandle) {
        self.descriptors.remove_user(handle);
        self.opens.count_close(handle);
    }

    /// Returns the node ids of the files that a process has open for writing.
    pub fn inodes_with_writers(&self) -> Vec<u64> {
        self.inodes.with_writers()
    }

    /// Returns the counter of the files in the upper that the kernel may write to without a request (passthrough).
    ///
    /// The caller must increment it during the operation that permits such writes. While it is not 0, no layer can be
    /// pushed.
    pub fn passthrough_writers(&self) -> Arc<AtomicU32> {
        self.passthrough_writers.clone()
    }

    /// Whether any layer is on an overlayfs of the kernel.
    pub fn is_on_overlayfs(&self) -> bool {
        let stack = self.stack.read();
        let mut layers = stack.view().layers().iter().chain(stack.view().data_only());
        layers.any(|layer| match sys::stat::is_on_overlayfs(layer.root_fd()) {
            Ok(is) => is,
            Err(error) => {
                let path = layer.path().shown();
                log::warn!("cannot determine the file system type of {path}: {error}");
                false
            }
        })
    }

    /// Returns the number of files open only for reading, and the number of those open for writing.
    pub fn open_files(&self) -> (u32, u32) {
        (self.opens.readers(), self.opens.writers())
    }

    /// Returns the path of the upper layer, and those of the lower layers, topmost first.
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
