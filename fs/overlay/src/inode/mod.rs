//! What is kept of an object that somebody has looked up: where it lies now, under which names it is
//! known, who has it open. No system calls.
//!
//! Locks, in the order in which they may be taken: an inode's `copying` (long), a folder's `names`
//! (one change of names), any inode's `state`, two of them by their numbers (over no system call but the
//! one that changes the object's own name).

mod renewed;
mod table;

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;

use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::{FileKind, Stat, Time};
use cowl_layers::view::Loc;

pub use table::InodeTable;

/// How many names of one file are remembered. All that need all of them ask the layers; this state is
/// copied for every operation.
const KNOWN_NAMES: usize = 8;

/// So many seconds a program may rest in the middle of a listing.
const LATELY: u32 = 60;

/// It has no file capabilities.
pub(crate) const BARE: u32 = 1;
/// Its content is no program's or library's, and lies in a layer that is only read.
pub(crate) const PLAIN: u32 = 2;

/// Its name leads to a copy, or its mark to content below is gone, and no sync has brought that to the disk yet.
const UNSYNCED_NAME: u8 = 1;
/// A file; the kernel was ever answered with S_ISUID in its mode.
const SETUID_SHOWN: u8 = 2;
/// A file; the kernel was ever answered with S_ISGID in its mode.
const SETGID_SHOWN: u8 = 4;
/// It was truncated, and write-back of what is written next is to be started when it is closed.
const REWRITTEN: u8 = 8;

/// Seconds since this was first asked, and one.
fn seconds() -> u32 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u32::try_from(START.elapsed().as_secs() + 1).unwrap_or(u32::MAX)
}

/// Which object on disk this is: device and inode number of the place that gives its attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Device.
    pub dev: u64,
    /// Inode number there.
    pub ino: u64,
}

impl Identity {
    /// The object that was found with these attributes.
    pub fn of(stat: &Stat) -> Self {
        Self {
            dev: stat.dev,
            ino: stat.ino,
        }
    }
}

/// A name under which an object is known.
#[derive(Clone, Debug)]
pub struct Alias {
    /// The folder.
    pub parent: Arc<Inode>,
    /// The name in it.
    pub name: Name,
}

/// An object of the overlay.
#[derive(Debug)]
pub struct Inode {
    ino: u64,
    kind: FileKind,
    state: RwLock<State>,
    /// One copy-up of this object at a time. Held while data is copied.
    pub(crate) copying: Mutex<()>,
    /// Folders: one change of the names in it at a time.
    pub(crate) names: Mutex<()>,
    /// Folders: counts copy-ups of what is in it, so that a lookup beside one notices.
    /// Files: counts how often the content moved, so that open descriptors follow it.
    turn: AtomicU32,
    /// Files: how many descriptors may write.
    writers: AtomicU32,
    /// Files: how many opens for execve(2) there are; the kernel keeps one for as long as the program runs.
    /// Folders: when a name in it was last removed, in seconds of [`seconds`]; 0 for never.
    runs_or_lost: AtomicU32,
    /// [`UNSYNCED_NAME`], [`SETUID_SHOWN`], [`SETGID_SHOWN`] and [`REWRITTEN`]. One byte: there are as many of these
    /// as objects are known.
    flags: AtomicU8,
    /// What is known of it, [`BARE`] and [`PLAIN`], for as long as it holds: whenever something may end that, the
    /// rest of the bits count on.
    known: AtomicU32,
    /// Times that are shown instead of the layer's.
    held: Mutex<Option<Box<Held>>>,
    /// Counts how often that changed, so that who read the layer's times before notices.
    held_turn: AtomicU32,
}

/// Times that are shown instead of the layer's, because a copy-up moved those, which is no change to anybody.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Held {
    /// While it lasts.
    Always { ctime: Time, mtime: Option<Time> },
    /// For as long as the layer says `real`.
    For { real: Time, shown: Time },
}

/// Where an object lies.
#[derive(Debug)]
pub(crate) enum State {
    Dir(DirState),
    File(FileState),
}

/// Where a folder lies.
#[derive(Clone, Debug)]
pub(crate) struct DirState {
    /// Topmost first.
    pub locs: Arc<[Arc<LayerDir>]>,
    /// The redirect mark on the topmost place.
    pub redirect: Option<Redirect>,
    /// `None` for the root, and for a removed folder.
    pub alias: Option<Alias>,
    pub removed: bool,
    pub identity: Identity,
}

/// Where anything else lies.
#[derive(Clone, Debug)]
pub(crate) struct FileState {
    pub loc: Loc,
    /// The content's place when that is elsewhere.
    pub data: Option<Box<Loc>>,
    /// The redirect mark at `loc`.
    pub redirect: Option<Box<Redirect>>,
    /// Names that are known, at most [`KNOWN_NAMES`]; the object may have more.
    pub aliases: SmallVec<[Alias; 1]>,
    /// Its last name was removed: `anchor` (upper) or `loc` (lower) still leads to it.
    pub orphan: bool,
    /// Leads to it since the last name that was known went.
    pub anchor: Option<Arc<OwnedFd>>,
    /// How many names of a lower file with several links show, once they were counted. It holds as long
    /// as the file is not in the upper: any change of its names brings it there.
    pub visible: Option<NonZeroU64>,
    pub identity: Identity,
}

impl Inode {
    pub(crate) fn new(ino: u64, kind: FileKind, state: State) -> Arc<Self> {
        Arc::new(Self {
            ino,
            kind,
            state: RwLock::new(state),
            copying: Mutex::new(()),
            names: Mutex::new(()),
            turn: AtomicU32::new(0),
            writers: AtomicU32::new(0),
            runs_or_lost: AtomicU32::new(0),
            flags: AtomicU8::new(0),
            known: AtomicU32::new(0),
            held: Mutex::new(None),
            held_turn: AtomicU32::new(0),
        })
    }

    /// The number by which the kernel and every program know it.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Its type.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Whether it is a folder.
    pub fn is_dir(&self) -> bool {
        self.kind == FileKind::Directory
    }

    /// A folder's state; ENOTDIR for anything else.
    pub(crate) fn dir(&self) -> Result<DirState> {
        match &*self.state.read() {
            State::Dir(dir) => Ok(dir.clone()),
            State::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Where a folder lies, topmost first; `None` when it was removed.
    pub(crate) fn places(&self) -> Result<Option<Arc<[Arc<LayerDir>]>>> {
        match &*self.state.read() {
            State::Dir(dir) if dir.removed => Ok(None),
            State::Dir(dir) => Ok(Some(dir.locs.clone())),
            State::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Keeps the directories above a directory open for a walk that goes back up ([`LayerDir::leave`]).
    pub fn leave(&self) {
        if let State::Dir(dir) = &*self.state.read() {
            dir.locs.iter().for_each(|loc| loc.leave());
        }
    }

    /// The number of the folder above a folder; the root's own.
    pub(crate) fn parent_ino(&self) -> u64 {
        match &*self.state.read() {
            State::Dir(dir) => dir.alias.as_ref().map_or(self.ino, |a| a.parent.ino()),
            State::File(_) => self.ino,
        }
    }

    /// A file's state; EISDIR for a folder.
    pub(crate) fn file(&self) -> Result<FileState> {
        match &*self.state.read() {
            State::File(file) => Ok(file.clone()),
            State::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Changes a folder's state.
    pub(crate) fn change_dir<T>(&self, change: impl FnOnce(&mut DirState) -> T) -> Result<T> {
        match &mut *self.state.write() {
            State::Dir(dir) => Ok(change(dir)),
            State::File(_) => Err(Error::Errno(Errno::NOTDIR)),
        }
    }

    /// Changes a file's state.
    pub(crate) fn change_file<T>(&self, change: impl FnOnce(&mut FileState) -> T) -> Result<T> {
        match &mut *self.state.write() {
            State::File(file) => Ok(change(file)),
            State::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Changes a file's state so that its content lies elsewhere.
    ///
    /// The turn advances in the same critical section: a reader that sees the new state and then asks for the
    /// turn gets the new one. (With the old one it would take a descriptor of the new content for the old.)
    pub(crate) fn change_content(&self, change: impl FnOnce(&mut FileState)) -> Result<()> {
        match &mut *self.state.write() {
            State::File(file) => {
                self.turn.fetch_add(1, Ordering::AcqRel);
                self.unknown(BARE | PLAIN);
                change(file);
                Ok(())
            }
            State::Dir(_) => Err(Error::Errno(Errno::ISDIR)),
        }
    }

    /// Changes the state of one object, or of two, together with a name on the disk: who asks meanwhile
    /// waits, and never sees the one without the other.
    pub(crate) fn change_name<T>(
        &self,
        other: Option<&Self>,
        change: impl FnOnce(&mut State, Option<&mut State>) -> Result<T>,
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

    /// Device and inode number of the object on disk.
    pub fn identity(&self) -> Identity {
        match &*self.state.read() {
            State::Dir(dir) => dir.identity,
            State::File(file) => file.identity,
        }
    }

    /// Notes one more name of a file, or the present name of a folder.
    pub(crate) fn add_alias(&self, alias: Alias) {
        match &mut *self.state.write() {
            State::Dir(dir) => dir.alias = Some(alias),
            State::File(file) => {
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

    /// Told where a file was found: one that only its anchor led to has a place again.
    pub(crate) fn found_again(&self, loc: Loc) -> Result<()> {
        let lost = match &*self.state.read() {
            State::File(file) => file.anchor.is_some() && !file.orphan,
            State::Dir(_) => false,
        };
        if lost {
            self.change_file(|file| file.loc = loc)?;
        }
        Ok(())
    }

    pub(crate) fn turn(&self) -> u32 {
        self.turn.load(Ordering::Acquire)
    }

    pub(crate) fn next_turn(&self) {
        self.turn.fetch_add(1, Ordering::AcqRel);
    }

    /// Told when a name in this folder is removed or moved away.
    pub fn lost_name(&self) {
        self.runs_or_lost.store(seconds(), Ordering::Relaxed);
    }

    /// Whether that was so lately that somebody may be in the middle of a listing with the name in it.
    pub fn lost_name_lately(&self) -> bool {
        let lost = self.runs_or_lost.load(Ordering::Relaxed);
        lost > 0 && seconds() - lost <= LATELY
    }

    /// Counter of content changes; a reader that was opened at another value reads the content from before.
    pub fn data_turn(&self) -> u32 {
        self.turn.load(Ordering::Acquire)
    }

    /// The change time to show where the layer says `real`.
    pub(crate) fn shown_ctime(&self, real: Time) -> Time {
        match self.held.lock().as_deref().copied() {
            Some(Held::Always { ctime, .. }) => ctime,
            Some(Held::For { real: held, shown }) if held == real => shown,
            _ => real,
        }
    }

    /// The modification time to show where the layer says `real`.
    pub(crate) fn shown_mtime(&self, real: Time) -> Time {
        match self.held.lock().as_deref().copied() {
            Some(Held::Always {
                mtime: Some(mtime), ..
            }) => mtime,
            _ => real,
        }
    }

    /// Changes whenever other times are held than before.
    pub(crate) fn held_turn(&self) -> u32 {
        self.held_turn.load(Ordering::Acquire)
    }

    /// Whether other times than the layer's are or were shown.
    pub(crate) fn held_ever(&self) -> bool {
        self.held_turn() > 0 || self.holds_ctime()
    }

    /// From here on these times are shown, whatever the layer says. Returns what was held before.
    pub(crate) fn hold_times(&self, ctime: Time, mtime: Option<Time>) -> Option<Held> {
        let mut now = self.held.lock();
        self.held_turn.fetch_add(1, Ordering::AcqRel);
        let before = now.replace(Box::new(Held::Always { ctime, mtime }));
        // What ends with another copy-up is nothing to come back to.
        let before = before.map(|held| *held);
        before.filter(|held| !matches!(held, Held::Always { .. }))
    }

    /// The end of [`Self::hold_times`], unless a real change ended it before.
    pub(crate) fn hold_instead(&self, held: Option<Held>) -> bool {
        let mut now = self.held.lock();
        let still = matches!(now.as_deref(), Some(Held::Always { .. }));
        if still {
            *now = held.map(Box::new);
            self.held_turn.fetch_add(1, Ordering::AcqRel);
        }
        still
    }

    /// From here on `shown` is shown where the layer says `real`.
    pub(crate) fn hold_ctime(&self, real: Time, shown: Time) {
        *self.held.lock() = Some(Box::new(Held::For { real, shown }));
    }

    /// Whether another change time than the layer's is shown.
    pub(crate) fn holds_ctime(&self) -> bool {
        self.held.lock().is_some()
    }

    /// Told of every real change: the layer's change time counts again. (A clock that stands still
    /// between a copy-up and the change could not tell the two apart.)
    pub(crate) fn changed(&self) {
        *self.held.lock() = None;
    }

    /// Whether it is known to have no file capabilities.
    pub(crate) fn is_bare(&self) -> bool {
        self.known.load(Ordering::Acquire) & BARE != 0
    }

    /// Whether its content is known to be nothing but data, and to lie in a layer that is only read.
    pub(crate) fn is_plain(&self) -> bool {
        self.known.load(Ordering::Acquire) & PLAIN != 0
    }

    /// To be asked before something is found out, for [`Self::found`].
    pub fn known(&self) -> u32 {
        self.known.load(Ordering::Acquire)
    }

    /// Told what was found, [`BARE`] or [`PLAIN`], since `before` was asked for. When something changes
    /// meanwhile it is not noted.
    pub(crate) fn found(&self, before: u32, what: u32) {
        let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
        let noted = self
            .known
            .compare_exchange(before, before | what, order, failed);
        if noted.is_err() {
            log::trace!("{} changes", self.ino);
        }
    }

    /// Told when something may end what was found, before and after it is done where that is a call of its own.
    pub(crate) fn unknown(&self, what: u32) {
        let next = |known: u32| Some((known & !what).wrapping_add(PLAIN << 1));
        // Never refused: there is always a next one.
        let _before = self
            .known
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// Told after a copy-up.
    pub(crate) fn named_anew(&self) {
        self.flags.fetch_or(UNSYNCED_NAME, Ordering::Release);
    }

    /// Marks it as truncated, or as closed since.
    pub(crate) fn set_rewritten(&self, rewritten: bool) {
        match rewritten {
            true => self.flags.fetch_or(REWRITTEN, Ordering::Release),
            false => self.flags.fetch_and(!REWRITTEN, Ordering::Release),
        };
    }

    /// Whether it was truncated and not closed since.
    pub fn is_rewritten(&self) -> bool {
        self.flags.load(Ordering::Acquire) & REWRITTEN != 0
    }

    /// Whether a sync of its content alone would not bring its name to the disk.
    pub fn has_unsynced_name(&self) -> bool {
        self.flags.load(Ordering::Acquire) & UNSYNCED_NAME != 0
    }

    /// Told after a sync of all of it.
    pub(crate) fn synced(&self) {
        self.flags.fetch_and(!UNSYNCED_NAME, Ordering::Release);
    }

    /// Whether somebody has it open for writing.
    pub fn is_written(&self) -> bool {
        self.writers.load(Ordering::SeqCst) > 0
    }

    /// Notes that a reply shows it with these setuid and setgid bits; to be called before the reply.
    pub fn shown_with_setid(&self, bits: u32) {
        let setuid = if bits & 0o4000 != 0 { SETUID_SHOWN } else { 0 };
        let setgid = if bits & 0o2000 != 0 { SETGID_SHOWN } else { 0 };
        self.flags.fetch_or(setuid | setgid, Ordering::SeqCst);
    }

    /// Returns the setuid and setgid bits that the mode in the kernel's cache may have.
    pub fn setid_shown(&self) -> u32 {
        let flags = self.flags.load(Ordering::SeqCst);
        let setuid = if flags & SETUID_SHOWN != 0 { 0o4000 } else { 0 };
        let setgid = if flags & SETGID_SHOWN != 0 { 0o2000 } else { 0 };
        setuid | setgid
    }

    /// Whether a program is running from it.
    pub fn is_run(&self) -> bool {
        !self.is_dir() && self.runs_or_lost.load(Ordering::SeqCst) > 0
    }

    /// Counts an open. Of two that count at once and then ask for the other, at least one sees it: hence the
    /// order of all of these.
    pub fn opened(&self, writing: bool, running: bool) {
        if writing {
            self.writers.fetch_add(1, Ordering::SeqCst);
        }
        if running {
            self.runs_or_lost.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Counts the close of an open that [`Inode::opened`] counted.
    pub fn closed(&self, writing: bool, running: bool) {
        if writing {
            self.writers.fetch_sub(1, Ordering::AcqRel);
        }
        if running {
            self.runs_or_lost.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Inode {
    /// Takes the folders out that this object keeps alive.
    fn take_parents(&mut self) -> Vec<Arc<Self>> {
        match self.state.get_mut() {
            State::Dir(dir) => dir.alias.take().map(|a| a.parent).into_iter().collect(),
            State::File(file) => file.aliases.drain(..).map(|a| a.parent).collect(),
        }
    }
}

impl Drop for Inode {
    fn drop(&mut self) {
        // A long chain of folders that all end here would drop recursively, one stack frame each.
        let mut open = self.take_parents();
        while let Some(parent) = open.pop() {
            if let Some(mut parent) = Arc::into_inner(parent) {
                open.append(&mut parent.take_parents());
            }
        }
    }
}

impl State {
    /// A folder lost its name.
    pub(crate) fn removed(&mut self) {
        if let Self::Dir(dir) = self {
            dir.removed = true;
            dir.alias = None;
        }
    }
}

impl FileState {
    /// Notes how many names show, as counted while it was `counted`. A copy-up may have ended meanwhile: what was
    /// counted before it would be shown once the copy is frozen by a snapshot, whatever names were removed since.
    pub(crate) fn note_visible(&mut self, counted: Identity, visible: u64) {
        if self.identity == counted {
            self.visible = NonZeroU64::new(visible);
        }
    }

    /// Where its content lies.
    pub(crate) fn data_loc(&self) -> &Loc {
        self.data.as_deref().unwrap_or(&self.loc)
    }
}

impl DirState {
    /// The topmost place. A folder always lies somewhere.
    pub(crate) fn top(&self) -> Result<&Arc<LayerDir>> {
        self.locs
            .first()
            .ok_or(Error::Damaged("a folder that lies nowhere"))
    }
}
