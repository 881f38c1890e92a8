//! The file system itself: what every operation means, in process, with no mount and no root.
//!
//! It knows nothing of the FUSE protocol (the daemon translates) and makes system calls through
//! [`cowl_layers::sys`] only. An operation runs on an [`Op`], which holds the stack still while it lasts;
//! [`Overlay::push_layer`] waits for all of them.

mod absent;
mod attr;
mod cookies;
mod copy_up;
mod create;
mod deep;
mod files;
mod hardlinks;
pub mod idmap;
mod index;
pub mod inode;
mod lookup;
pub mod plan;
mod push;
mod reach;
mod readdir;
#[cfg(test)]
mod readdir_tests;
mod remove;
mod rename;
mod stage;
mod times;
mod traits;
mod xattr;
mod zero_device;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::inode::{DirState, Identity, Inode, InodeTable, State};
use crate::reach::{Context, Stack};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::{Layer, Upper};
use cowl_layers::name::Name;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::View;

pub use attr::{Attr, SETID, SetAttr};
pub use cookies::END;
pub use files::{FileHandle, OpenHow, Writer};
pub use push::PushError;
pub use reach::{Behaviour, Caller};
pub use readdir::{DirEntry, Listing};
pub use rename::RenameFlags;

/// A mounted stack, without the mount.
#[derive(Debug)]
pub struct Overlay {
    stack: RwLock<Stack>,
    behaviour: Behaviour,
    inodes: InodeTable,
    root: Arc<Inode>,
    links: hardlinks::LinkIndex,
    cookies: cookies::Cookies,
    listings: readdir::Listings,
    deep: deep::DeepFolders,
    absent: absent::Absent,
    writers: AtomicU32,
    readers: AtomicU32,
    /// How many files the kernel may write to without asking here.
    unattended: Arc<AtomicU32>,
    /// How many layers were pushed; changed with the stack.
    pushes: AtomicU32,
    /// Shared locks on the layers that are only read, held for as long as the mount lives.
    locks: Mutex<Vec<OwnedFd>>,
}

/// One operation: the stack does not change while it lives.
#[derive(Debug)]
pub struct Op<'a> {
    overlay: &'a Overlay,
    cx: Context<'a>,
}

impl Overlay {
    /// An overlay of `lowers` (topmost first) under an optional upper.
    pub fn new(
        upper: Option<Arc<Upper>>,
        lowers: Vec<Arc<Layer>>,
        behaviour: Behaviour,
    ) -> Result<Self> {
        let mut layers: Vec<Arc<Layer>> = upper.iter().map(|upper| upper.layer.clone()).collect();
        layers.extend(lowers);
        let view = View::new(layers);
        let node = view.root()?;
        let identity = Identity::of(&node.stat);
        let state = State::Dir(DirState {
            locs: node.locs.into(),
            redirect: None,
            alias: None,
            removed: false,
            identity,
        });
        let inodes = InodeTable::default();
        let (root, _) = inodes
            .intern(1, identity, true, |ino| {
                Inode::new(ino, FileKind::Directory, state)
            })
            .ok_or(Error::Damaged(
                "a root folder that is known before it is made",
            ))?;
        inodes.remember(&root);
        Ok(Self {
            stack: RwLock::new(Stack::new(view, upper)),
            behaviour,
            inodes,
            root,
            links: hardlinks::LinkIndex::default(),
            cookies: cookies::Cookies::default(),
            listings: readdir::Listings::default(),
            deep: deep::DeepFolders::default(),
            absent: absent::Absent::default(),
            writers: AtomicU32::new(0),
            pushes: AtomicU32::new(0),
            readers: AtomicU32::new(0),
            unattended: Arc::default(),
            locks: Mutex::default(),
        })
    }

    /// The same over data-only layers, topmost first.
    #[must_use]
    pub fn over_data(mut self, data: Vec<Arc<Layer>>) -> Self {
        self.stack.get_mut().put_over_data(data);
        self
    }

    /// Keeps locks on layers until the mount ends.
    pub fn keep_locks(&self, locks: Vec<OwnedFd>) {
        self.locks.lock().extend(locks);
    }

    /// Begins an operation. A thread must not begin a second one inside it.
    pub fn begin(&self) -> Op<'_> {
        Op {
            overlay: self,
            cx: Context::new(&self.stack, &self.behaviour),
        }
    }

    /// The root folder.
    pub fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    /// The kernel forgot `count` of its lookups of an inode.
    pub fn forget(&self, ino: u64, count: u64) {
        self.inodes.forget(ino, count);
        if self.inodes.made_room() {
            sys::process::give_memory_back();
        }
    }

    /// The inodes that are known.
    pub fn inodes(&self) -> &InodeTable {
        &self.inodes
    }

    /// The choices of this mount.
    pub fn behaviour(&self) -> &Behaviour {
        &self.behaviour
    }

    /// The files that somebody has open for writing.
    pub fn written(&self) -> Vec<u64> {
        self.inodes.written()
    }

    /// How many files of the upper may be written to without [`Op::write`]: to be counted by whoever lets
    /// that happen, inside of an operation. While there is one, no layer can be pushed.
    pub fn unattended(&self) -> Arc<AtomicU32> {
        self.unattended.clone()
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

    /// How many descriptors are open: for reading only, and for writing.
    pub fn open_files(&self) -> (u32, u32) {
        (
            self.readers.load(Ordering::Acquire),
            self.writers.load(Ordering::Acquire),
        )
    }

    /// The paths of the layer that is written, and of those below, topmost first.
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

impl Op<'_> {
    /// Returns the objects whose cached attributes must be invalidated before this operation is answered,
    /// and forgets them.
    ///
    /// The kernel invalidates by itself what a request changes by its kind: the times and the size after a
    /// write, the change time after setxattr(2), everything of a parent directory. Listed here is the rest.
    pub fn take_stale(&self) -> Vec<Arc<Inode>> {
        self.cx.take_stale()
    }

    /// What the disk says of an object, and nothing else.
    pub fn stat_now(&self, inode: &Inode) -> Result<Stat> {
        reach::stat_on_disk(inode)
    }

    /// The inode with this number; ESTALE when nobody knows it.
    pub fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        self.overlay
            .inodes
            .get(ino)
            .ok_or(Error::Errno(Errno::STALE))
    }

    /// statvfs of the file system that is written, else of the topmost layer's.
    pub fn statfs(&self) -> Result<rustix::fs::StatVfs> {
        let layer = self
            .cx
            .stack
            .view()
            .layers()
            .first()
            .ok_or(Error::Damaged("a stack without layers"))?;
        sys::stat::statvfs(layer.root_fd())
    }

    /// Finds an object by its path from the root, component by component.
    pub fn find(&self, path: &[u8]) -> Result<Arc<Inode>> {
        let mut inode = self.overlay.root.clone();
        for part in path.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            inode = self
                .lookup(&inode, &Name::new(part)?)?
                .ok_or(Error::NOT_FOUND)?;
        }
        Ok(inode)
    }
}
