//! The inode of an object: state, locks, counters.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cowl_layers::locks::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::flags::{Facts, Flags, NO_CAPABILITIES, PLAIN_DATA};
use super::identity::Identity;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::process::uptime_seconds;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_layers::view::{DirNode, Loc};

/// The longest time, in seconds, that a program is expected to pause in the middle of readdir.
const LISTING_PAUSE: u32 = 60;

/// The options of an open, from the flags of open(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Whether the file is opened for writing.
    pub write: bool,
    /// Whether the file is truncated to size 0.
    pub truncate: bool,
    /// Whether the file is opened by execve(2). The kernel denies writes to it while it is open.
    pub exec: bool,
    /// Whether reads leave the access time unchanged (O_NOATIME).
    pub keep_atime: bool,
}

impl OpenOptions {
    /// The options of a file that is only read.
    pub const READ: Self = Self {
        write: false,
        truncate: false,
        exec: false,
        keep_atime: false,
    };
    /// The options of a file that is written.
    pub const WRITE: Self = Self {
        write: true,
        ..Self::READ
    };
}

/// The maximum number of names recorded for a file.
///
/// It is small because the state is cloned in every operation. Callers that need all names query the layers.
const MAX_ALIASES: usize = 8;

/// A visible name of an object, as a dentry of the kernel: parent directory and name.
#[derive(Clone, Debug)]
pub(crate) struct Alias {
    /// The parent directory.
    pub parent: Arc<Inode>,
    /// The name in it.
    pub name: Name,
}

/// The state of an object of any type.
#[derive(Debug)]
pub(crate) enum InodeState {
    Dir(DirState),
    File(FileState),
}

/// The locations and the name of a directory.
#[derive(Clone, Debug)]
pub(crate) struct DirState {
    /// The merged directories in the layers, topmost first.
    pub locs: Arc<[Arc<LayerDir>]>,
    /// The redirect xattr at the topmost location.
    pub redirect: Option<Redirect>,
    /// The name; `None` for the root and for a removed directory.
    pub alias: Option<Alias>,
    /// Whether the directory was removed while something still references it.
    pub removed: bool,
    pub identity: Identity,
}

impl DirState {
    /// Returns the state of the root directory.
    pub(crate) fn root(node: DirNode) -> Self {
        Self {
            locs: node.locs.into(),
            redirect: None,
            alias: None,
            removed: false,
            identity: Identity::from_stat(&node.stat),
        }
    }
}

/// The location and the names of an object that is not a directory.
#[derive(Clone, Debug)]
pub(crate) struct FileState {
    /// The location of the name, attributes and xattrs.
    pub loc: Loc,
    /// The location of the content, if different (metacopy).
    pub data: Option<Box<Loc>>,
    /// The redirect xattr at `loc`.
    pub redirect: Option<Box<Redirect>>,
    /// The known names, at most [`MAX_ALIASES`]; the object may have more.
    pub aliases: SmallVec<[Alias; 1]>,
    /// Whether the last name was removed. The object is then accessible by `anchor` (upper) or `loc` (lower).
    pub orphan: bool,
    /// A descriptor of the object, since the last known name was removed.
    pub anchor: Option<Arc<OwnedFd>>,
    /// The cached number of visible names of a lower file with several links. It is valid as long as the file is not
    /// in the upper, because any change of its names copies it up.
    pub visible: Option<NonZeroU64>,
    pub identity: Identity,
}

/// Visible times that differ from those on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TimesOverride {
    /// During a copy-up.
    Always { ctime: Time, mtime: Option<Time> },
    /// As long as the ctime on disk is `real`.
    WhileCtime { real: Time, visible: Time },
}

/// An object of the overlay.
#[derive(Debug)]
pub struct Inode {
    pub(super) ino: u64,
    pub(super) state: RwLock<InodeState>,
    pub(super) by_kind: ByKind,
    pub(super) facts: Facts,
    pub(super) times: Mutex<Option<Box<TimesOverride>>>,
    /// The version of `times`; see [`Inode::times_version`].
    pub(super) times_version: AtomicU32,
}

/// The parts of an inode that depend on its type.
///
/// Small fields are inside the variants, next to the discriminant, to save memory: millions of inodes can be known
/// after a walk of a large tree.
#[derive(Debug)]
pub(super) enum ByKind {
    Dir {
        copying: Mutex<()>,
        flags: Flags,
        /// TimesOverride for one change of the names in the directory.
        names: Mutex<()>,
        /// The number of copy-ups of objects in the directory, by which a concurrent lookup detects a stale result.
        generation: AtomicU32,
        /// The time of the last removal of a name, in seconds since the machine started; 0 for never.
        last_removal: AtomicU32,
    },
    File {
        copying: Mutex<()>,
        flags: Flags,
        kind: FileKind,
        /// The version of the content, incremented each time that it moves, so that open files are reopened at its new
        /// location.
        version: AtomicU32,
        /// The number of opens for writing.
        writers: AtomicU32,
        /// The number of opens by execve(2). The kernel holds the file open while the program runs.
        execs: AtomicU32,
    },
}

/// Runs `run` if the content of `inode` still has the version `version` and its size is that of the inode; it does not
/// move until `run` returns.
pub fn while_content_stays<T>(inode: &Inode, version: u32, run: impl FnOnce() -> T) -> Option<T> {
    let state = inode.state.read();
    // The size that a metacopy shows is not checked with its content.
    let is_whole = matches!(&*state, InodeState::File(file) if file.data.is_none());
    (is_whole && inode.content_version() == version).then(run)
}

impl Inode {
    /// Creates an inode with the number `ino`.
    pub(crate) fn new(ino: u64, kind: FileKind, state: InodeState) -> Arc<Self> {
        let (copying, flags) = (Mutex::new(()), Flags::default());
        let by_kind = match kind {
            FileKind::Directory => ByKind::Dir {
                copying,
                flags,
                names: Mutex::new(()),
                generation: AtomicU32::new(0),
                last_removal: AtomicU32::new(0),
            },
            kind => ByKind::File {
                copying,
                flags,
                kind,
                version: AtomicU32::new(0),
                writers: AtomicU32::new(0),
                execs: AtomicU32::new(0),
            },
        };
        Arc::new(Self {
            ino,
            state: RwLock::new(state),
            by_kind,
            facts: Facts::default(),
            times: Mutex::new(None),
            times_version: AtomicU32::new(0),
        })
    }

    /// Returns the visible inode number, which is also the node id unless that was replaced
    /// ([`super::InodeTable::node_id`]).
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Returns the type of the object.
    pub fn kind(&self) -> FileKind {
        match &self.by_kind {
            ByKind::Dir { .. } => FileKind::Directory,
            ByKind::File { kind, .. } => *kind,
        }
    }

    /// Whether the object is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.by_kind, ByKind::Dir { .. })
    }

    /// Returns the lock that is held during a copy-up of this object.
    pub(crate) fn copying(&self) -> &Mutex<()> {
        match &self.by_kind {
            ByKind::Dir { copying, .. } | ByKind::File { copying, .. } => copying,
        }
    }

    /// Returns the lock that is held during a change of the names in this directory. Fails with ENOTDIR for any other
    /// object.
    pub(crate) fn names(&self) -> Result<&Mutex<()>> {
        match &self.by_kind {
            ByKind::Dir { names, .. } => Ok(names),
            ByKind::File { .. } => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Returns the flags of the inode.
    pub fn flags(&self) -> &Flags {
        match &self.by_kind {
            ByKind::Dir { flags, .. } | ByKind::File { flags, .. } => flags,
        }
    }

    /// Returns the cached facts about the object, which are invalidated when it changes.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Returns a copy of a directory's state. Fails with ENOTDIR for any other object.
    pub(crate) fn dir(&self) -> Result<DirState> {
        match &*self.state.read() {
            InodeState::Dir(dir) => Ok(dir.clone()),
            InodeState::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Returns the locations of a directory, topmost first; `None` if it was removed. Fails with ENOTDIR for any other
    /// object.
    pub(crate) fn locations(&self) -> Result<Option<Arc<[Arc<LayerDir>]>>> {
        match &*self.state.read() {
            InodeState::Dir(dir) if dir.removed => Ok(None),
            InodeState::Dir(dir) => Ok(Some(dir.locs.clone())),
            InodeState::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Caches descriptors of the parent directories, for a walk that returns to them ([`LayerDir::leave`]).
    pub fn leave(&self) {
        if let InodeState::Dir(dir) = &*self.state.read() {
            dir.locs.iter().for_each(|loc| loc.leave());
        }
    }

    /// Returns the inode number of a directory's parent; for the root its own number.
    pub(crate) fn parent_ino(&self) -> u64 {
        match &*self.state.read() {
            InodeState::Dir(dir) => dir.alias.as_ref().map_or(self.ino, |a| a.parent.ino()),
            InodeState::File(_) => self.ino,
        }
    }

    /// Returns a copy of a file's state. Fails with EISDIR for a directory.
    pub(crate) fn file(&self) -> Result<FileState> {
        match &*self.state.read() {
            InodeState::File(file) => Ok(file.clone()),
            InodeState::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Modifies a directory's state. Fails with ENOTDIR for any other object.
    pub(crate) fn update_dir<T>(&self, change: impl FnOnce(&mut DirState) -> T) -> Result<T> {
        match &mut *self.state.write() {
            InodeState::Dir(dir) => Ok(change(dir)),
            InodeState::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Modifies a file's state. Fails with EISDIR for a directory.
    pub(crate) fn update_file<T>(&self, change: impl FnOnce(&mut FileState) -> T) -> Result<T> {
        match &mut *self.state.write() {
            InodeState::File(file) => Ok(change(file)),
            InodeState::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Modifies a file's state so that its content has another location, and increments the content version.
    ///
    /// Both happen in one critical section. Otherwise a reader could open the new content and record the old version
    /// for it.
    pub(crate) fn update_content(&self, change: impl FnOnce(&mut FileState)) -> Result<()> {
        match (&mut *self.state.write(), &self.by_kind) {
            (InodeState::File(file), ByKind::File { version, .. }) => {
                version.fetch_add(1, Ordering::AcqRel);
                self.facts.forget(NO_CAPABILITIES | PLAIN_DATA);
                change(file);
                Ok(())
            }
            _ => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Modifies the states of this inode and of `other` while their locks are held, together with a name on disk.
    ///
    /// Concurrent readers wait, so that they never observe only one of both changes.
    pub(crate) fn update_states<T>(
        &self,
        other: Option<&Self>,
        change: impl FnOnce(&mut InodeState, Option<&mut InodeState>) -> Result<T>,
    ) -> Result<T> {
        match other {
            None => change(&mut self.state.write(), None),
            Some(other) if self.ino < other.ino => {
                let mut own = self.state.write();
                change(&mut own, Some(&mut other.state.write()))
            }
            Some(other) => {
                let mut others = other.state.write();
                change(&mut self.state.write(), Some(&mut others))
            }
        }
    }

    /// Returns the identity of the object on disk.
    pub fn identity(&self) -> Identity {
        match &*self.state.read() {
            InodeState::Dir(dir) => dir.identity,
            InodeState::File(file) => file.identity,
        }
    }

    /// Records an additional name of a file, or the current name of a directory.
    pub(crate) fn add_alias(&self, alias: Alias) {
        self.state.write().add_alias(alias);
    }

    /// Records the location of a file that a lookup found, if the file was accessible only by its anchor before.
    pub(crate) fn restore_location(&self, loc: Loc) -> Result<()> {
        let has_no_location = match &*self.state.read() {
            InodeState::File(file) => file.anchor.is_some() && !file.orphan,
            InodeState::Dir(_) => false,
        };
        if has_no_location {
            self.update_file(|file| file.loc = loc)?;
        }
        Ok(())
    }

    /// Returns the generation of this directory, which changes with each copy-up of an object in it; 0 for any other
    /// object.
    pub(crate) fn generation(&self) -> u32 {
        match &self.by_kind {
            ByKind::Dir { generation, .. } => generation.load(Ordering::Acquire),
            ByKind::File { .. } => 0,
        }
    }

    /// Advances the generation of this directory, after a copy-up of an object in it.
    pub(crate) fn advance_generation(&self) {
        if let ByKind::Dir { generation, .. } = &self.by_kind {
            generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Records the time of the removal of a name from this directory, also by a rename.
    pub fn note_removal(&self) {
        if let ByKind::Dir { last_removal, .. } = &self.by_kind {
            last_removal.store(uptime_seconds().max(1), Ordering::Relaxed);
        }
    }

    /// Whether a name was removed so recently that a process may still be reading a listing that contains it.
    pub fn has_recent_removal(&self) -> bool {
        match &self.by_kind {
            ByKind::Dir { last_removal, .. } => {
                let last = last_removal.load(Ordering::Relaxed);
                last > 0 && uptime_seconds().saturating_sub(last) <= LISTING_PAUSE
            }
            ByKind::File { .. } => false,
        }
    }

    /// Returns the version of a file's content; 0 for a directory. A descriptor that was opened at another version refers
    /// to the content at its previous location.
    pub fn content_version(&self) -> u32 {
        match &self.by_kind {
            ByKind::File { version, .. } => version.load(Ordering::Acquire),
            ByKind::Dir { .. } => 0,
        }
    }

    /// Whether a process has the file open for writing.
    pub fn has_writers(&self) -> bool {
        match &self.by_kind {
            ByKind::File { writers, .. } => writers.load(Ordering::SeqCst) > 0,
            ByKind::Dir { .. } => false,
        }
    }

    /// Whether a process is executing the file.
    pub fn is_executing(&self) -> bool {
        match &self.by_kind {
            ByKind::File { execs, .. } => execs.load(Ordering::SeqCst) > 0,
            ByKind::Dir { .. } => false,
        }
    }

    /// Counts an open of a file.
    ///
    /// Uses sequentially consistent ordering: of two threads that each count an open and then check for an open by the
    /// other, at least one must observe the other's.
    pub fn count_open(&self, options: OpenOptions) {
        if let ByKind::File { writers, execs, .. } = &self.by_kind {
            if options.write {
                writers.fetch_add(1, Ordering::SeqCst);
            }
            if options.exec {
                execs.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Subtracts an open that [`Inode::count_open`] counted.
    pub fn count_close(&self, options: OpenOptions) {
        if let ByKind::File { writers, execs, .. } = &self.by_kind {
            if options.write {
                writers.fetch_sub(1, Ordering::AcqRel);
            }
            if options.exec {
                execs.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

/// Moves the state of `fresh`, an inode that no other thread has access to, to `known`, which has the same type.
///
/// If the content has another location, increments the content version.
pub(super) fn take_state(known: &Inode, fresh: &Inode) {
    let mut state = known.state.write();
    let mut fresh = fresh.state.write();
    if let (InodeState::File(old), InodeState::File(new)) = (&*state, &*fresh)
        && let ByKind::File { version, .. } = &known.by_kind
        && (old.identity != new.identity || !old.data_loc().is_same_location(new.data_loc()))
    {
        version.fetch_add(1, Ordering::AcqRel);
    }
    known.facts.forget(NO_CAPABILITIES | PLAIN_DATA);
    std::mem::swap(&mut *state, &mut *fresh);
}

impl Drop for Inode {
    fn drop(&mut self) {
        // Recursive drops of a long chain of parent directories would overflow the stack.
        let mut pending = self.state.get_mut().take_parents();
        while let Some(parent) = pending.pop() {
            if let Some(mut parent) = Arc::into_inner(parent) {
                pending.append(&mut parent.state.get_mut().take_parents());
            }
        }
    }
}

impl InodeState {
    pub(super) fn add_alias(&mut self, alias: Alias) {
        match self {
            Self::Dir(dir) => dir.alias = Some(alias),
            Self::File(file) => {
                let known =
                    |a: &Alias| a.name == alias.name && Arc::ptr_eq(&a.parent, &alias.parent);
                if !file.aliases.iter().any(known) {
                    if file.aliases.len() >= MAX_ALIASES {
                        file.aliases.remove(0);
                    }
                    file.aliases.push(alias);
                }
            }
        }
    }

    /// Removes and returns the references to parent directories.
    pub(super) fn take_parents(&mut self) -> Vec<Arc<Inode>> {
        match self {
            Self::Dir(dir) => dir.alias.take().map(|a| a.parent).into_iter().collect(),
            Self::File(file) => file.aliases.drain(..).map(|a| a.parent).collect(),
        }
    }
}
