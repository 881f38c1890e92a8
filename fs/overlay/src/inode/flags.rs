//! Flags of an object, and facts that were found out about it.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// A fact: the object has no file capabilities.
pub(crate) const NO_CAPABILITIES: u32 = 1;
/// A fact: the content is not that of a program or library, and lies in a layer that is only read.
pub(crate) const PLAIN_DATA: u32 = 2;

/// The name leads to a copy, or the marker of content below was removed, and no sync has persisted that yet.
const UNSYNCED_NAME: u8 = 1;
/// The kernel was ever answered with S_ISUID in the mode.
const SETUID_SHOWN: u8 = 2;
/// The kernel was ever answered with S_ISGID in the mode.
const SETGID_SHOWN: u8 = 4;
/// The file was truncated, and write-back of the data written next is to be started when it is closed.
const REWRITTEN: u8 = 8;

/// Flags of a file. One byte: there is one of these for each known object.
#[derive(Debug, Default)]
pub struct Flags(AtomicU8);

impl Flags {
    fn set(&self, flags: u8, order: Ordering) {
        self.0.fetch_or(flags, order);
    }

    fn has(&self, flag: u8) -> bool {
        self.0.load(Ordering::Acquire) & flag != 0
    }

    /// Records a copy-up: a sync of the content alone would not persist the name.
    pub(crate) fn set_unsynced_name(&self) {
        self.set(UNSYNCED_NAME, Ordering::Release);
    }

    /// Records a sync of the whole file.
    pub(crate) fn clear_unsynced_name(&self) {
        self.0.fetch_and(!UNSYNCED_NAME, Ordering::Release);
    }

    /// Whether a sync of the content alone would not persist the name.
    pub fn has_unsynced_name(&self) -> bool {
        self.has(UNSYNCED_NAME)
    }

    /// Records a truncation.
    pub(crate) fn set_truncated(&self) {
        self.set(REWRITTEN, Ordering::Release);
    }

    /// Records the last close after a truncation.
    pub(crate) fn clear_truncated(&self) {
        self.0.fetch_and(!REWRITTEN, Ordering::Release);
    }

    /// Whether the file was truncated and not closed since.
    pub fn is_truncated(&self) -> bool {
        self.has(REWRITTEN)
    }

    /// Records that a reply shows these setuid and setgid bits; to be called before the reply.
    pub fn note_setid_shown(&self, bits: u32) {
        let setuid = if bits & 0o4000 != 0 { SETUID_SHOWN } else { 0 };
        let setgid = if bits & 0o2000 != 0 { SETGID_SHOWN } else { 0 };
        self.set(setuid | setgid, Ordering::SeqCst);
    }

    /// Returns the setuid and setgid bits that the mode in the kernel's cache may have.
    pub fn setid_shown(&self) -> u32 {
        let flags = self.0.load(Ordering::SeqCst);
        let setuid = if flags & SETUID_SHOWN != 0 { 0o4000 } else { 0 };
        let setgid = if flags & SETGID_SHOWN != 0 { 0o2000 } else { 0 };
        setuid | setgid
    }
}

/// Facts about an object, [`NO_CAPABILITIES`] and [`PLAIN_DATA`]. The remaining bits count the events that may have ended one.
#[derive(Debug, Default)]
pub struct Facts(AtomicU32);

/// The facts at one time, for [`Facts::note`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FactsSnapshot(u32);

impl Facts {
    fn has(&self, fact: u32) -> bool {
        self.0.load(Ordering::Acquire) & fact != 0
    }

    /// Whether the object is known to have no file capabilities.
    pub(crate) fn has_no_capabilities(&self) -> bool {
        self.has(NO_CAPABILITIES)
    }

    /// Whether the content is known to be neither a program's nor a library's, and to lie in a layer that is
    /// only read.
    pub(crate) fn is_plain_data(&self) -> bool {
        self.has(PLAIN_DATA)
    }

    /// Returns the present facts; to be called before another one is found out.
    pub fn snapshot(&self) -> FactsSnapshot {
        FactsSnapshot(self.0.load(Ordering::Acquire))
    }

    /// Records facts that were found out since `before`, unless an event meanwhile may have ended them.
    pub(crate) fn note(&self, before: FactsSnapshot, facts: u32) {
        let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
        let noted = self
            .0
            .compare_exchange(before.0, before.0 | facts, order, failed);
        if noted.is_err() {
            log::trace!("an inode changes while it is examined");
        }
    }

    /// Records that the content is neither a program's nor a library's, and lies in a layer that is only read:
    /// the next open for reading need not open the content before a request needs it, because the kernel may
    /// have all of it cached.
    pub fn note_plain_data(&self, before: FactsSnapshot) {
        self.note(before, PLAIN_DATA);
    }

    /// Forgets facts that an event may end; before and after the event where that is a call of its own.
    pub(crate) fn forget(&self, facts: u32) {
        let next = |known: u32| Some((known & !facts).wrapping_add(PLAIN_DATA << 1));
        // Never refused: there is always a next one.
        let _before = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }
}
