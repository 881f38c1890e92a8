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

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use rustix::thread::CapabilitySet;

use crate::idmap::IdMap;
use crate::inode::{DirState, FileState, Identity, Inode, InodeTable, State};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::{Layer, LayerDir, Upper};
use cowl_layers::name::Name;
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::early::Early;
use cowl_layers::sys::order::Order;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;

pub use attr::{Attr, SETID, SetAttr};
pub use cookies::END;
pub use files::{FileHandle, OpenHow, Writer};
pub use push::PushError;
pub use readdir::{DirEntry, Listing};
pub use rename::RenameFlags;

/// What a caller of the overlay is allowed and wants, beside the operation itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user id, as the mount shows it.
    pub uid: u32,
    /// File system group id, as the mount shows it.
    pub gid: u32,
    /// Bits that new objects lose.
    pub umask: u32,
    /// The thread that asks, for what the protocol does not tell of it; 0 where it can't be seen.
    pub pid: u32,
}

/// Choices that hold for a whole mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Behaviour {
    /// A change of attributes alone copies no data.
    pub metacopy: bool,
    /// A power cut may cost what was not synced, copied-up files included; fsync does nothing.
    pub volatile: bool,
    /// POSIX ACLs are neither shown nor taken.
    pub no_acl: bool,
    /// Every file shows one link.
    pub static_nlink: bool,
    /// User ids.
    pub uids: IdMap,
    /// Group ids.
    pub gids: IdMap,
}

/// The layers of the moment.
#[derive(Debug)]
struct Stack {
    view: View,
    upper: Option<Arc<Upper>>,
}

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
    stack: RwLockReadGuard<'a, Stack>,
    /// Objects of which the kernel may cache attributes that hold no longer; see [`Op::take_stale`].
    stale: RefCell<Vec<Arc<Inode>>>,
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
            stack: RwLock::new(Stack { view, upper }),
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
        let stack = self.stack.get_mut();
        stack.view = stack.view.clone().over_data(data);
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
            stack: self.stack.read(),
            stale: RefCell::default(),
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
        let mut layers = stack.view.layers().iter().chain(stack.view.data_only());
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
        let upper = stack.upper.as_ref().map(|u| u.layer.path().to_path_buf());
        let lowers = stack
            .view
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
        self.stale.take()
    }

    /// Lists an object for [`Op::take_stale`].
    fn note_stale(&self, inode: &Arc<Inode>) {
        let mut stale = self.stale.borrow_mut();
        if !stale.iter().any(|other| Arc::ptr_eq(other, inode)) {
            stale.push(inode.clone());
        }
    }

    fn view(&self) -> &View {
        &self.stack.view
    }

    /// The layer that is written; EROFS without one.
    fn upper(&self) -> Result<&Arc<Upper>> {
        self.stack.upper.as_ref().ok_or(Error::Errno(Errno::ROFS))
    }

    fn is_upper(&self, layer: &Arc<Layer>) -> bool {
        let upper = self.stack.upper.as_ref();
        upper.is_some_and(|upper| Arc::ptr_eq(&upper.layer, layer))
    }

    /// A folder's place in the upper.
    fn upper_dir<'d>(&self, dir: &'d DirState) -> Option<&'d Arc<LayerDir>> {
        dir.locs.first().filter(|loc| self.is_upper(loc.layer()))
    }

    fn in_upper(&self, file: &FileState) -> bool {
        self.is_upper(file.loc.dir.layer())
    }

    /// The inode with this number; ESTALE when nobody knows it.
    pub fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        self.overlay
            .inodes
            .get(ino)
            .ok_or(Error::Errno(Errno::STALE))
    }

    /// Whether a power cut may cost what was not synced.
    fn volatile(&self) -> bool {
        self.overlay.behaviour.volatile
    }

    /// In which order what is made gets to the disk.
    fn order(&self) -> Result<Order> {
        if self.volatile() {
            return Ok(Order::Careless);
        }
        Ok(self.upper()?.order())
    }

    /// When write-back is started early.
    fn early(&self) -> Result<Early> {
        if self.volatile() {
            return Ok(Early::default());
        }
        Ok(self.upper()?.early())
    }

    /// Runs `make` with the caller's ids, as they lie on disk, to make something new.
    fn as_creator<T>(&self, caller: Caller, make: impl FnMut() -> Result<T>) -> Result<T> {
        sys::creds::as_creator(self.on_disk(caller)?, make)
    }

    /// The caller's ids as they lie on disk.
    fn on_disk(&self, caller: Caller) -> Result<sys::creds::Identity> {
        let ids = &self.overlay.behaviour;
        let overflow = Error::Errno(Errno::OVERFLOW);
        Ok(sys::creds::Identity {
            uid: ids.uids.to_disk(caller.uid).ok_or(overflow)?,
            gid: ids.gids.to_disk(caller.gid).ok_or(overflow)?,
            umask: caller.umask,
        })
    }

    /// Whether the caller belongs to a group of the disk: by its own or a supplementary one (the kernel's
    /// in_group_p). The protocol brings the first alone.
    fn is_member(&self, caller: Caller, gid: u32) -> Result<bool> {
        let ids = &self.overlay.behaviour.gids;
        if ids.to_disk(caller.gid) == Some(gid) {
            return Ok(true);
        }
        let groups = sys::process::groups(caller.pid)?;
        Ok(groups
            .into_iter()
            .any(|group| ids.to_disk(group) == Some(gid)))
    }

    /// Whether the caller has a capability, which the protocol does not tell. User 0 has it where that
    /// can't be seen.
    fn is_capable(&self, caller: Caller, which: CapabilitySet) -> Result<bool> {
        let told = sys::process::has_capability(caller.pid, which)?;
        Ok(told.unwrap_or(caller.uid == 0))
    }

    /// statvfs of the file system that is written, else of the topmost layer's.
    pub fn statfs(&self) -> Result<rustix::fs::StatVfs> {
        let layer = self
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
