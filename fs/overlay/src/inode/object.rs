//! Inodes and their state.

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use cowl_layers::locks::{Mutex, RwLock};
use smallvec::SmallVec;

use super::flags::{Facts, Flags, NO_CAPABILITIES, PLAIN_DATA};
use super::identity::Identity;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_layers::view::Loc;

/// The longest time, in seconds, that a program is expected to pause in the middle of readdir.
const LISTING_PAUSE: u32 = 60;

/// Returns the seconds since the first call, plus one.
fn seconds() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u32::try_from(START.elapsed().as_secs() + 1).unwrap_or(u32::MAX)
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// For writing.
    pub write: bool,
    /// Truncated to size 0.
    pub truncate: bool,
    /// For execve(2): the kernel denies writing to the file while this is open.
    pub exec: bool,
    /// Reading does not update the access time.
    pub keep_atime: bool,
}

/// The number of names of a file that are remembered. Callers that need all names query the layers; this state
/// is copied for every operation.
const KNOWN_NAMES: usize = 8;

/// A name under which an object shows.
#[derive(Clone, Debug)]
pub(crate) struct Alias {
    /// The directory.
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

/// Locations and name of a directory.
#[derive(Clone, Debug)]
pub(crate) struct DirState {
    /// Topmost first.
    pub locs: Arc<[Arc<LayerDir>]>,
    /// The redirect at the topmost location.
    pub redirect: Option<Redirect>,
    /// `None` for the root, and for a removed directory.
    pub alias: Option<Alias>,
    pub removed: bool,
    pub identity: Identity,
}

/// Location and names of an object that is not a directory.
#[derive(Clone, Debug)]
pub(crate) struct FileState {
    pub loc: Loc,
    /// The content's location if that is elsewhere.
    pub data: Option<Box<Loc>>,
    /// The redirect at `loc`.
    pub redirect: Option<Box<Redirect>>,
    /// Names that are known, at most [`KNOWN_NAMES`]; the object may have more.
    pub aliases: SmallVec<[Alias; 1]>,
    /// Its last name was removed: `anchor` (upper) or `loc` (lower) still leads to it.
    pub orphan: bool,
    /// Leads to it since the last name that was known was removed.
    pub anchor: Option<Arc<OwnedFd>>,
    /// The number of names under which a lower file with several links shows, once they were counted. It holds
    /// while the file is not in the upper: any change of its names copies it up.
    pub visible: Option<NonZeroU64>,
    pub identity: Identity,
}

/// Times that are shown instead of the layer's.
#[derive(Clone, Copy, Debug)]
pub(crate) enum TimesOverride {
    /// During a copy-up.
    Always { ctime: Time, mtime: Option<Time> },
    /// While the layer has `real`.
    For { real: Time, shown: Time },
}

/// An object of the overlay.
#[derive(Debug)]
pub struct Inode {
    ino: u64,
    pub(super) state: RwLock<InodeState>,
    by_kind: ByKind,
    facts: Facts,
    pub(super) times: Mutex<Option<Box<TimesOverride>>>,
    /// The number of changes of `times`: see [`Inode::times_version`].
    pub(super) times_version: AtomicU32,
}

/// The parts of an inode that depend on its type. The small ones lie beside the discriminant: millions of inodes
/// are held when a large tree was walked.
#[derive(Debug)]
enum ByKind {
    Dir {
        copying: Mutex<()>,
        flags: Flags,
        /// TimesOverride for one change of the names in the directory.
        names: Mutex<()>,
        /// The number of copy-ups of objects in the directory, so that a concurrent lookup notices one.
        generation: AtomicU32,
        /// When a name was last removed, in [`seconds`]; 0 for never.
        last_removal: AtomicU32,
    },
    File {
        copying: Mutex<()>,
        flags: Flags,
        kind: FileKind,
        /// The number of times the content moved, so that open descriptors follow it.
        version: AtomicU32,
        /// The number of descriptors that may write.
        writers: AtomicU32,
        /// The number of opens for execve(2); the kernel keeps one open while the program runs.
        execs: AtomicU32,
    },
}

impl Inode {
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

    /// Returns the number by which the kernel and every program know the object.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Returns the object's type.
    pub fn kind(&self) -> FileKind {
        match &self.by_kind {
            ByKind::Dir { .. } => FileKind::Directory,
            ByKind::File { kind, .. } => *kind,
        }
    }

    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.by_kind, ByKind::Dir { .. })
    }

    /// Returns the lock that is held during a copy-up of this object.
    pub(crate) fn copying(&self) -> &Mutex<()> {
        match &self.by_kind {
            ByKind::Dir { copying, .. } | ByKind::File { copying, .. } => copying,
        }
    }

    /// Returns the lock that is held during a change of the names in this directory; ENOTDIR for any other
    /// object.
    pub(crate) fn names(&self) -> Result<&Mutex<()>> {
        match &self.by_kind {
            ByKind::Dir { names, .. } => Ok(names),
            ByKind::File { .. } => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Returns the flags that last until they are cleared.
    pub fn flags(&self) -> &Flags {
        match &self.by_kind {
            ByKind::Dir { flags, .. } | ByKind::File { flags, .. } => flags,
        }
    }

    /// Returns what was found out about the object, which lasts until the object changes.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Returns a directory's state; ENOTDIR for any other object.
    pub(crate) fn dir(&self) -> Result<DirState> {
        match &*self.state.read() {
            InodeState::Dir(dir) => Ok(dir.clone()),
            InodeState::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Returns a directory's locations, topmost first; `None` if it was removed.
    pub(crate) fn locations(&self) -> Result<Option<Arc<[Arc<LayerDir>]>>> {
        match &*self.state.read() {
            InodeState::Dir(dir) if dir.removed => Ok(None),
            InodeState::Dir(dir) => Ok(Some(dir.locs.clone())),
            InodeState::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Keeps the directories above a directory open for a walk that goes back up ([`LayerDir::leave`]).
    pub fn leave(&self) {
        if let InodeState::Dir(dir) = &*self.state.read() {
            dir.locs.iter().for_each(|loc| loc.leave());
        }
    }

    /// Returns the number of a directory's parent; the root's own.
    pub(crate) fn parent_ino(&self) -> u64 {
        match &*self.state.read() {
            InodeState::Dir(dir) => dir.alias.as_ref().map_or(self.ino, |a| a.parent.ino()),
            InodeState::File(_) => self.ino,
        }
    }

    /// Returns a file's state; EISDIR for a directory.
    pub(crate) fn file(&self) -> Result<FileState> {
        match &*self.state.read() {
            InodeState::File(file) => Ok(file.clone()),
            InodeState::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Changes a directory's state.
    pub(crate) fn update_dir<T>(&self, change: impl FnOnce(&mut DirState) -> T) -> Result<T> {
        match &mut *self.state.write() {
            InodeState::Dir(dir) => Ok(change(dir)),
            InodeState::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Changes a file's state.
    pub(crate) fn update_file<T>(&self, change: impl FnOnce(&mut FileState) -> T) -> Result<T> {
        match &mut *self.state.write() {
            InodeState::File(file) => Ok(change(file)),
            InodeState::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Changes a file's state so that its content lies elsewhere.
    ///
    /// The version advances in the same critical section: a reader that sees the new state and then reads the
    /// version gets the new one. (With the old one it would take a descriptor of the new content for the old.)
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

    /// Changes the state of one object, or of two, together with a name on the disk: concurrent readers wait,
    /// and never see the one without the other.
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

    /// Returns the device and inode number of the object on disk.
    pub fn identity(&self) -> Identity {
        match &*self.state.read() {
            InodeState::Dir(dir) => dir.identity,
            InodeState::File(file) => file.identity,
        }
    }

    /// Records one more name of a file, or the present name of a directory.
    pub(crate) fn add_alias(&self, alias: Alias) {
        self.state.write().add_alias(alias);
    }

    /// Records the location of a file that was found: one that only its anchor led to has a location again.
    pub(crate) fn restore_location(&self, loc: Loc) -> Result<()> {
        let lost = match &*self.state.read() {
            InodeState::File(file) => file.anchor.is_some() && !file.orphan,
            InodeState::Dir(_) => false,
        };
        if lost {
            self.update_file(|file| file.loc = loc)?;
        }
        Ok(())
    }

    /// Returns the number of copy-ups of objects in this directory; 0 for any other object.
    pub(crate) fn generation(&self) -> u32 {
        match &self.by_kind {
            ByKind::Dir { generation, .. } => generation.load(Ordering::Acquire),
            ByKind::File { .. } => 0,
        }
    }

    /// Counts a copy-up of an object in this directory.
    pub(crate) fn advance_generation(&self) {
        if let ByKind::Dir { generation, .. } = &self.by_kind {
            generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Records that a name in this directory was removed or moved away.
    pub fn note_removal(&self) {
        if let ByKind::Dir { last_removal, .. } = &self.by_kind {
            last_removal.store(seconds(), Ordering::Relaxed);
        }
    }

    /// Whether a name was removed so recently that a program may be in the middle of a listing that has it.
    pub fn has_recent_removal(&self) -> bool {
        match &self.by_kind {
            ByKind::Dir { last_removal, .. } => {
                let last = last_removal.load(Ordering::Relaxed);
                last > 0 && seconds() - last <= LISTING_PAUSE
            }
            ByKind::File { .. } => false,
        }
    }

    /// Returns the version of a file's content: a descriptor that was opened at another version reads the
    /// content from before. 0 for a directory.
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

    /// Whether a program is running from the file.
    pub fn is_executing(&self) -> bool {
        match &self.by_kind {
            ByKind::File { execs, .. } => execs.load(Ordering::SeqCst) > 0,
            ByKind::Dir { .. } => false,
        }
    }

    /// Counts an open of a file. Of two threads that each count an open and then check for the other's, at least
    /// one sees it: hence the memory order of all of these.
    pub fn count_open(&self, how: OpenOptions) {
        if let ByKind::File { writers, execs, .. } = &self.by_kind {
            if how.write {
                writers.fetch_add(1, Ordering::SeqCst);
            }
            if how.exec {
                execs.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Counts the close of an open that [`Inode::count_open`] counted.
    pub fn count_close(&self, how: OpenOptions) {
        if let ByKind::File { writers, execs, .. } = &self.by_kind {
            if how.write {
                writers.fetch_sub(1, Ordering::AcqRel);
            }
            if how.exec {
                execs.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        // A long chain of directories that all end here would drop recursively, one stack frame each.
        let mut open = self.state.get_mut().take_parents();
        while let Some(parent) = open.pop() {
            if let Some(mut parent) = Arc::into_inner(parent) {
                open.append(&mut parent.state.get_mut().take_parents());
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
                    if file.aliases.len() >= KNOWN_NAMES {
                        file.aliases.remove(0);
                    }
                    file.aliases.push(alias);
                }
            }
        }
    }

    /// Takes the directories out that this object keeps alive.
    pub(super) fn take_parents(&mut self) -> Vec<Arc<Inode>> {
        match self {
            Self::Dir(dir) => dir.alias.take().map(|a| a.parent).into_iter().collect(),
            Self::File(file) => file.aliases.drain(..).map(|a| a.parent).collect(),
        }
    }
}
