//! Atomic flags of an inode, and cached facts about its object.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// The fact that the object has no file capabilities.
pub(crate) const NO_CAPABILITIES: u32 = 1;
/// The fact that the content is in a read-only layer and is neither a program nor a library.
pub(crate) const PLAIN_DATA: u32 = 2;

/// Set from a copy-up, or from the removal of the metacopy marker, until a sync has persisted that change of the name.
const UNSYNCED_NAME: u8 = 1;
/// Set once a reply to the kernel contained S_ISUID in the mode.
const SETUID_SHOWN: u8 = 2;
/// Set once a reply to the kernel contained S_ISGID in the mode.
const SETGID_SHOWN: u8 = 4;
/// Set from a truncation until the next close, which must start writeback of the data written since.
const TRUNCATED: u8 = 8;
/// Set from a removal of the file capabilities, while the file is open for writing, until the next change of attributes.
const CAPABILITIES_REMOVED: u8 = 16;
/// Set from the first open of the file.
const OPENED: u8 = 32;

/// The flags of an inode. They use one byte, because millions of inodes may be known.
#[derive(Debug, Default)]
pub struct Flags(AtomicU8);

impl Flags {
    fn set(&self, flags: u8, order: Ordering) {
        self.0.fetch_or(flags, order);
    }

    fn has(&self, flag: u8) -> bool {
        self.0.load(Ordering::Acquire) & flag != 0
    }

    /// Returns the flags for the record of state. It does not contain opens: [`Self::from_bits`] assumes one.
    pub(super) fn bits(&self) -> u8 {
        self.0.load(Ordering::SeqCst) & !OPENED
    }

    /// Returns flags for an inode of which nothing is known: each one is as it causes more work.
    pub(super) fn unknown() -> Self {
        Self(AtomicU8::new(
            UNSYNCED_NAME | SETUID_SHOWN | SETGID_SHOWN | TRUNCATED | OPENED,
        ))
    }

    /// Creates the flags of a record. The file may have been opened.
    pub(super) fn from_bits(bits: u8) -> Self {
        Self(AtomicU8::new(bits | OPENED))
    }

    /// Records an open of the file. Returns whether it is the first one since the kernel has known the inode.
    pub fn note_open(&self) -> bool {
        self.0.fetch_or(OPENED, Ordering::AcqRel) & OPENED == 0
    }

    /// Records that the name is not durable, after a copy-up.
    pub(crate) fn set_unsynced_name(&self) {
        self.set(UNSYNCED_NAME, Ordering::Release);
    }

    /// Records a sync of the content and the name.
    pub(crate) fn clear_unsynced_name(&self) {
        self.0.fetch_and(!UNSYNCED_NAME, Ordering::Release);
    }

    /// Whether the name is not durable yet: a sync of the content alone is not sufficient.
    pub fn has_unsynced_name(&self) -> bool {
        self.has(UNSYNCED_NAME)
    }

    /// Records a truncation of the file.
    pub(crate) fn set_truncated(&self) {
        self.set(TRUNCATED, Ordering::Release);
    }

    /// Records a close of the file after a truncation.
    pub(crate) fn clear_truncated(&self) {
        self.0.fetch_and(!TRUNCATED, Ordering::Release);
    }

    /// Whether the file was truncated and has not been closed since.
    pub fn is_truncated(&self) -> bool {
        self.has(TRUNCATED)
    }

    /// Records that a request removed the file capabilities while the file was open for writing.
    pub(crate) fn set_capabilities_removed(&self) {
        self.set(CAPABILITIES_REMOVED, Ordering::Release);
    }

    /// Returns whether a request removed the file capabilities since the last call.
    pub(crate) fn take_capabilities_removed(&self) -> bool {
        let before = self.0.fetch_and(!CAPABILITIES_REMOVED, Ordering::AcqRel);
        before & CAPABILITIES_REMOVED != 0
    }

    /// Records that a reply contains the setuid and setgid bits in `bits`. The caller must call this before it sends the
    /// reply.
    pub fn note_setid_shown(&self, bits: u32) {
        let setuid = if bits & 0o4000 != 0 { SETUID_SHOWN } else { 0 };
        let setgid = if bits & 0o2000 != 0 { SETGID_SHOWN } else { 0 };
        self.set(setuid | setgid, Ordering::SeqCst);
    }

    /// Returns the setuid and setgid bits that the kernel's cached mode may contain.
    pub fn setid_shown(&self) -> u32 {
        let flags = self.0.load(Ordering::SeqCst);
        let setuid = if flags & SETUID_SHOWN != 0 { 0o4000 } else { 0 };
        let setgid = if flags & SETGID_SHOWN != 0 { 0o2000 } else { 0 };
        setuid | setgid
    }
}

/// A cache of facts about an object: [`NO_CAPABILITIES`] and [`PLAIN_DATA`]. The remaining bits are a counter of
/// invalidations.
#[derive(Debug, Default)]
pub struct Facts(AtomicU32);

/// A snapshot of the facts and of the invalidation counter, which [`Facts::note`] compares with the current ones.
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

    /// Whether the content is known to be in a read-only layer and to be neither a program nor a library.
    pub(crate) fn is_plain_data(&self) -> bool {
        self.has(PLAIN_DATA)
    }

    /// Returns a snapshot of the facts. The caller must take it before it inspects the object for [`Facts::note`].
    pub fn snapshot(&self) -> FactsSnapshot {
        FactsSnapshot(self.0.load(Ordering::Acquire))
    }

    /// Caches facts that were determined after the snapshot `before`.
    ///
    /// Discards them if any fact was invalidated or added since, because they may be stale: an object can change
    /// while another thread inspects it.
    pub(crate) fn note(&self, before: FactsSnapshot, facts: u32) {
        let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
        let noted = self
            .0
            .compare_exchange(before.0, before.0 | facts, order, failed);
        if noted.is_err() {
            log::trace!("discarded a fact about an inode that changed during its inspection");
        }
    }

    /// Caches that the content is in a read-only layer and is neither a program nor a library.
    ///
    /// Further opens for reading then defer opening the content until a request needs it, because the kernel may have
    /// cached all of it.
    pub fn note_plain_data(&self, before: FactsSnapshot) {
        self.note(before, PLAIN_DATA);
    }

    /// Invalidates facts that an event may end.
    ///
    /// If the event is a separate system call, the caller must invalidate them both before and after it.
    pub(crate) fn forget(&self, facts: u32) {
        let next = |known: u32| Some((known & !facts).wrapping_add(PLAIN_DATA << 1));
        // Always succeeds, because the closure always returns a value.
        let _before = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }
}
