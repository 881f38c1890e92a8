//! The state of a mount.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use cowl_layers::locks::{Mutex, RwLock, RwLockWriteGuard};

use crate::content::{ContentDescriptors, FileHandle, InodeKey, OpenCounts};
use crate::inode::{DirState, Identity, Inode, InodeState, InodeTable, OnConflict, encode};
use crate::ledger::{FoundSlot, Kind, Ledger, StackIds, Word};
use crate::listing::{Cookies, Listings, Walk};
use crate::names::LinkIndex;
use crate::names::absent::LastAbsent;
use crate::names::deep::DeepDirs;
use crate::names::prefetched::Prefetched;
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
    pub(crate) prefetched: Prefetched,
    pub(crate) walk: Walk,
    pub(crate) opens: OpenCounts,
    pub(crate) descriptors: Arc<ContentDescriptors>,
    /// The number of files that the kernel may write to without a request to the daemon (passthrough).
    pub(crate) passthrough_writers: Arc<AtomicU32>,
    /// A value with a second reference while a push that failed is being undone.
    pub(crate) undoing: Arc<()>,
    /// Shared locks on the lower layers, held until the mount ends.
    pub(crate) locks: Mutex<Vec<Arc<LayerLock>>>,
    /// Layers that are not in the stack any more, with their locks. They contain objects without a name.
    pub(crate) retained: Mutex<Vec<(Arc<Layer>, Arc<LayerLock>)>>,
    /// The requests that a killed predecessor did not answer, until there is a ledger for them.
    pub(crate) unanswered: Mutex<Vec<FoundSlot>>,
}

/// Locks a stack when no operation runs; `None` if that takes too long.
pub(crate) fn lock_stack(stack: &RwLock<Stack>) -> Option<RwLockWriteGuard<'_, Stack>> {
    let deadline = Instant::now() + STACK_TIMEOUT;
    loop {
        if let Some(stack) = stack.try_write_for(LOCK_ATTEMPT) {
            return Some(stack);
        }
        if Instant::now() > deadline {
            return None;
        }
    }
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
        let state = InodeState::Dir(DirState::root(node));
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
            prefetched: Prefetched::default(),
            walk: Walk::default(),
            opens: OpenCounts::default(),
            descriptors: ContentDescriptors::new(),
            passthrough_writers: Arc::default(),
            undoing: Arc::default(),
            locks: Mutex::default(),
            retained: Mutex::default(),
            unanswered: Mutex::default(),
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

    /// Releases the locks on all layers. To be called when the mount has ended.
    ///
    /// Otherwise they would be held until the process has exited, which a thread that syncs a file system delays.
    pub fn release_locks(&self) {
        if let Some(upper) = self.stack.read().writable()
            && let Err(error) = upper.unlock()
        {
            log::warn!("cannot unlock the upper layer: {error}");
        }
        // Dropping a lock releases it.
        self.locks.lock().clear();
        self.retained.lock().clear();
    }

    /// Records the layers in the ledger.
    pub(crate) fn note_stack(&self, stack: &Stack) {
        let Some(ledger) = self.inodes.ledger() else {
            return;
        };
        let (layers, data) = (stack.view().layers(), stack.view().data_only());
        let retained = self.retained.lock();
        let others = retained.iter().map(|(layer, _)| layer);
        let ids = StackIds {
            layers: (layers.iter().chain(data).chain(others))
                .map(|layer| layer.id())
                .collect(),
            stack: layers.len(),
            data_only: data.len(),
            has_upper: stack.writable().is_some(),
        };
        ledger.set(Word::Pushes, u64::from(self.opens.record()));
        ledger.put(Kind::Stack, 0, &encode(&ids));
    }

    /// Makes the locks of the upper layer those of this process, whose predecessor has ended.
    pub fn assume_locks(&self) {
        if let Some(upper) = self.stack.read().writable() {
            upper.assume_locks();
        }
    }

    /// Releases the layers that other layers have replaced and that nothing refers to any more. Returns the number of
    /// those that remain.
    pub fn release_unused_layers(&self) -> usize {
        let stack = self.stack.read();
        let mut retained = self.retained.lock();
        let before = retained.len();
        let mut released = Vec::new();
        // Each location of an object in the layer refers to it.
        retained.retain(|one| {
            let is_used = Arc::strong_count(&one.0) > 1;
            if !is_used {
                released.push(one.clone());
            }
            is_used
        });
        let remaining = retained.len();
        drop(retained);
        if remaining < before {
            self.note_stack(&stack);
        }
        // A successor must not look for a layer that is not locked any more.
        drop(released);
        remaining
    }

    /// Returns the root directory.
    pub fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    /// Subtracts `count` from the lookup count of an inode (FUSE_FORGET), and drops the inode at zero.
    pub fn forget(&self, ino: u64, count: u64) {
        self.inodes.forget(ino, count, |inode| {
            if self.opens.are_unknown() {
                self.descriptors.close_unopened(InodeKey::new(inode));
            }
        });
        if self.inodes.shrink() {
            sys::process::give_memory_back();
        }
    }

    /// Returns the table of known inodes.
    pub fn inodes(&self) -> &InodeTable {
        &self.inodes
    }

    /// Returns the ledger in which the state is recorded, if there is one.
    pub fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.inodes.ledger()
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

    /// Records that an open file was closed, without closing anything, for a file of which that has ended the process.
    pub fn abandon(&self, handle: Arc<FileHandle>) {
        self.opens.count_close(&handle);
        std::mem::forget(handle);
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

    /// Returns the number of files open only for reading, and the number of those open for writing; `None` if the
    /// kernel opens files without a request.
    pub fn open_files(&self) -> Option<(u32, u32)> {
        let counts = (self.opens.readers(), self.opens.writers());
        (!self.opens.are_unknown()).then_some(counts)
    }

    /// Returns the ids of all layers in use, also of those that are not in the stack any more.
    pub fn layer_ids(&self) -> Vec<u64> {
        let stack = self.stack.read();
        let retained = self.retained.lock();
        let (layers, data) = (stack.view().layers(), stack.view().data_only());
        let others = retained.iter().map(|(layer, _)| layer);
        let all = layers.iter().chain(data).chain(others);
        all.map(|layer| layer.id()).collect()
    }

    /// Returns the upper layer, and the other layers in use.
    pub fn layers(&self) -> (Option<Arc<Upper>>, Vec<Arc<Layer>>) {
        let stack = self.stack.read();
        let upper = stack.writable().cloned();
        let layers = stack
            .view()
            .layers()
            .iter()
            .skip(usize::from(upper.is_some()));
        let retained = self.retained.lock();
        let retained = retained.iter().map(|(layer, _)| layer);
        let layers = layers.chain(stack.view().data_only()).chain(retained);
        (upper.clone(), layers.cloned().collect())
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
