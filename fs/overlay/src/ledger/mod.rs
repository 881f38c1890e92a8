//! The ledger: the state of a mount in shared memory, always current, so that a successor can serve the mount after the
//! process was killed (docs/format.md, docs/decisions/0035).
//!
//! Each part is recorded before the reply that reports it to the kernel. So the ledger never has less than the kernel
//! knows. This module knows only blocks, values and requests; the modules that own a part of the state encode it.

mod blocks;
mod content;
mod slots;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_layers::error::Result;
use cowl_layers::locks::Mutex;
use cowl_layers::sys::shared::SharedMemory;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use blocks::Blocks;
pub(crate) use blocks::{Block, Found};
pub(crate) use content::LedgerContent;
pub use content::LedgerError;
pub use slots::Change;
use slots::Slots;
pub(crate) use slots::{FoundSlot, Intent};

/// `cowlled` and the version. Must be changed with each change of the content.
const MAGIC: u64 = u64::from_le_bytes(*b"cowlled\x03");
/// The size of the memory, of which only the used pages exist.
const LARGEST: usize = 16 << 30;
/// The sizes that are tried if a limit of the process prevents a larger one.
const SMALLER: [usize; 4] = [4 << 30, 1 << 30, 128 << 20, SMALLEST];
const SMALLEST: usize = 16 << 20;
/// The index of the word with the magic number.
const MAGIC_AT: usize = 0;
/// The index of the word with the end of the blocks.
const USED_AT: usize = 1;
/// The index of the first word of [`Word`].
const WORDS_AT: usize = 2;
const SLOTS_AT: usize = 64;
const BLOCKS_AT: usize = SLOTS_AT + slots::ALL_WORDS;

/// The bit of a request's id that the kernel sets when it sends the request again (FUSE_UNIQUE_RESEND).
pub const RESENT: u64 = 1 << 63;

thread_local! {
    /// The slot of the request that this thread handles.
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
    /// The predecessor's record of that request, if it received it as well.
    static RESUMED: RefCell<Option<FoundSlot>> = const { RefCell::new(None) };
}

/// A part of the state that is one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// Whether the ledger is complete: 1, or 0 if a part could not be recorded.
    Complete,
    /// The key of directory offsets.
    Key0,
    Key1,
    /// The number of assigned substitute numbers.
    Substitutes,
    /// Whether layers have left the stack.
    Reused,
    /// The number of assigned node ids.
    NodeIds,
    /// The number of pushed layers.
    Pushes,
    /// Whether a request was answered.
    Answered,
}

/// The type of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// An inode that the kernel knows: its place. The count is the lookup count.
    Inode = 1,
    /// A number that is not on disk.
    Number,
    /// A replacement node id. The count is the lookup count.
    NodeId,
    /// A held ctime.
    Ctime,
    /// The visible times during a copy-up.
    Copying,
    /// The place of an object whose last name is about to be removed.
    Nameless,
    /// Names with equal hashes in a directory.
    Collision,
    /// The layers.
    Stack,
    /// An open file; recorded by the daemon.
    Handle,
    /// The state of a file for passthrough; recorded by the daemon.
    Backing,
    /// The capabilities that a write removes from a file, which restores them.
    Capabilities,
}

/// The layers of a stack, by their ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackIds {
    /// The stack, topmost first; then the data-only layers; then those that are in use although they are not in the
    /// stack any more.
    pub layers: Vec<u64>,
    /// The number of layers in the stack.
    pub stack: usize,
    /// The number of data-only layers.
    pub data_only: usize,
    /// Whether the topmost layer is written.
    pub has_upper: bool,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Inode,
        Self::Number,
        Self::NodeId,
        Self::Ctime,
        Self::Copying,
        Self::Nameless,
        Self::Collision,
        Self::Stack,
        Self::Handle,
        Self::Backing,
        Self::Capabilities,
    ];

    /// Returns the type with this number.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// Holds descriptors of objects without a name, in a process that survives this one.
pub trait Custodian: Send + Sync + std::fmt::Debug {
    /// Takes a descriptor into custody under a number. When this returns, it is held.
    fn deposit(&self, number: u64, descriptor: BorrowedFd<'_>) -> Result<()>;
    /// Releases the descriptor with this number, some time later.
    fn release(&self, number: u64);
}

/// The state of a mount in shared memory.
#[derive(Debug)]
pub struct Ledger {
    memory: SharedMemory,
    blocks: Blocks,
    slots: Slots,
    /// The blocks of values, by type and key.
    values: Mutex<FxHashMap<(Kind, u64), Block>>,
    is_complete: AtomicBool,
    custodian: Arc<dyn Custodian>,
    /// The descriptors in custody: their addresses in this process, by number.
    deposited: Mutex<FxHashMap<u64, usize>>,
    /// The requests that the predecessor did not answer, with their slots, until the kernel sends them again.
    unanswered: Mutex<BTreeMap<u64, (usize, FoundSlot)>>,
}

impl Ledger {
    /// Returns an error if the limits of this process do not permit a ledger.
    pub fn check() -> Result<()> {
        SharedMemory::create("cowl-ledger", SMALLEST).map(drop)
    }

    /// Creates an empty ledger.
    pub fn create(custodian: Arc<dyn Custodian>) -> Result<Self> {
        let mut created = SharedMemory::create("cowl-ledger", LARGEST);
        for size in SMALLER {
            if created.is_ok() {
                break;
            }
            created = SharedMemory::create("cowl-ledger", size);
        }
        let memory = created?;
        let blocks = Blocks::new(&memory, USED_AT, BLOCKS_AT);
        memory.store(MAGIC_AT, MAGIC);
        let ledger = Self {
            memory,
            blocks,
            slots: Slots::new(SLOTS_AT),
            values: Mutex::default(),
            is_complete: AtomicBool::new(true),
            custodian,
            deposited: Mutex::default(),
            unanswered: Mutex::default(),
        };
        ledger.set(Word::Complete, 1);
        Ok(ledger)
    }

    /// Returns the descriptor of the memory, for a successor.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Whether the ledger has everything that a successor needs.
    pub fn is_complete(&self) -> bool {
        self.is_complete.load(Ordering::Acquire)
    }

    /// Records that a part of the state is not in the ledger, which a successor then cannot use.
    pub fn give_up(&self, reason: &str) {
        if self.is_complete.swap(false, Ordering::AcqRel) {
            self.set(Word::Complete, 0);
            log::warn!("the mount will end if this process is killed: {reason}");
        }
    }

    pub(crate) fn set(&self, word: Word, value: u64) {
        self.memory.store(WORDS_AT + word as usize, value);
    }

    /// Adds a block with a count. Returns `None` if it cannot be recorded.
    pub(crate) fn add(&self, kind: Kind, key: u64, payload: &[u8], count: u32) -> Option<Block> {
        let block = self
            .blocks
            .add(&self.memory, (kind as u8, key), payload, count);
        if block.is_none() {
            self.give_up("its state is too large for the shared memory");
        }
        block
    }

    /// Replaces the payload of a block, and returns the new block. The caller must prevent a concurrent change.
    pub(crate) fn replace(&self, block: Block, payload: &[u8]) -> Block {
        let new = self.blocks.replace(&self.memory, block, payload);
        new.unwrap_or_else(|| {
            self.give_up("its state is too large for the shared memory");
            block
        })
    }

    /// Removes a block.
    pub(crate) fn remove(&self, block: Block) {
        self.blocks.remove(&self.memory, block);
    }

    /// Returns the count of a block.
    pub(crate) fn count(&self, block: Block) -> u32 {
        block.count(&self.memory)
    }

    /// Returns the content of a block.
    pub(crate) fn content(&self, block: Block) -> Found {
        block.content(&self.memory)
    }

    /// Returns the first byte of a block's payload; 0 if that is empty.
    pub(crate) fn first_byte(&self, block: Block) -> u8 {
        block.first_byte(&self.memory)
    }

    /// Changes the count of a block. The caller must prevent a concurrent change.
    pub(crate) fn set_count(&self, block: Block, count: u32) {
        block.set_count(&self.memory, count);
    }

    /// Records a value, in the place of an earlier one with this type and key.
    pub fn put(&self, kind: Kind, key: u64, value: &[u8]) {
        let mut values = self.values.lock();
        match values.get(&(kind, key)).copied() {
            Some(block) => {
                let new = self.replace(block, value);
                values.insert((kind, key), new);
            }
            None => {
                if let Some(block) = self.add(kind, key, value, 0) {
                    values.insert((kind, key), block);
                }
            }
        }
    }

    /// Removes a value, if there is one.
    pub fn delete(&self, kind: Kind, key: u64) {
        let removed = self.values.lock().remove(&(kind, key));
        if let Some(block) = removed {
            self.remove(block);
        }
    }

    /// Takes a descriptor of an object that is about to lose its name into custody, under its inode number.
    pub(crate) fn deposit(&self, ino: u64, descriptor: &Arc<OwnedFd>) {
        let address = Arc::as_ptr(descriptor).addr();
        if self.deposited.lock().insert(ino, address) == Some(address) {
            return;
        }
        if let Err(error) = self.custodian.deposit(ino, descriptor.as_fd()) {
            self.give_up(&format!("a descriptor cannot be kept: {error}"));
        }
    }

    /// Releases the descriptor of an object, if it is in custody.
    pub(crate) fn release(&self, ino: u64) {
        if self.deposited.lock().remove(&ino).is_some() {
            self.custodian.release(ino);
        }
    }

    /// Begins a request that must not be executed twice. The thread must not begin another one before it drops the
    /// result, which it does after the reply.
    pub fn begin(self: &Arc<Self>, unique: u64) -> RequestSlot {
        let mut resumed = None;
        if unique & RESENT != 0 {
            resumed = self.unanswered.lock().remove(&(unique & !RESENT));
        }
        let (slot, found) = match resumed {
            Some((slot, found)) => (Some(slot), Some(found)),
            None => (self.free_slot(unique & !RESENT), None),
        };
        CURRENT.set(slot);
        RESUMED.set(found);
        RequestSlot {
            ledger: self.clone(),
            slot,
        }
    }

    fn free_slot(&self, unique: u64) -> Option<usize> {
        let slot = self.slots.begin(&self.memory, unique);
        slot.or_else(|| {
            // The kernel sends unanswered requests at once, so this one was answered.
            let (_, (slot, _)) = self.unanswered.lock().pop_first()?;
            self.slots.end(&self.memory, slot);
            self.slots.begin(&self.memory, unique)
        })
    }

    /// Whether the predecessor received the request of this thread as well, and intended this change.
    pub(crate) fn is_resumed(&self, change: Change) -> bool {
        RESUMED.with_borrow(|found| found.as_ref().and_then(|found| found.change) == Some(change))
    }

    /// Returns the number of the object that the predecessor intended to rename.
    pub(crate) fn resumed_object(&self) -> Option<u64> {
        RESUMED.with_borrow(|found| found.as_ref().map(|found| found.object))
    }

    /// Takes the number of the handle that the predecessor assigned in the request of this thread.
    pub fn take_resumed_handle(&self) -> Option<u64> {
        RESUMED.with_borrow_mut(|found| {
            let handle = std::mem::take(&mut found.as_mut()?.handle);
            (handle != 0).then_some(handle)
        })
    }

    /// Records the intent of the request of this thread, directly before the change is committed.
    pub(crate) fn intend(&self, intent: &Intent<'_>) {
        if let Some(slot) = CURRENT.get() {
            self.slots.intend(&self.memory, slot, intent);
        }
    }

    /// Withdraws the intent of the request of this thread, because the change failed.
    pub(crate) fn withdraw(&self) {
        if let Some(slot) = CURRENT.get() {
            self.slots.withdraw(&self.memory, slot);
        }
    }

    /// Records the number of the handle that the request of this thread assigned.
    pub fn note_handle(&self, handle: u64) {
        if let Some(slot) = CURRENT.get() {
            self.slots.set_handle(&self.memory, slot, handle);
        }
    }

    /// Records the requests that the predecessor did not answer.
    pub(crate) fn retain(&self, found: Vec<FoundSlot>) {
        let mut unanswered = self.unanswered.lock();
        for one in found {
            let Some(slot) = self.slots.begin(&self.memory, one.unique) else {
                return;
            };
            self.slots.set_handle(&self.memory, slot, one.handle);
            if let Some(change) = one.change {
                let intent = Intent {
                    change,
                    parents: one.parents,
                    names: (&one.names.0, &one.names.1),
                    object: one.object,
                };
                self.slots.intend(&self.memory, slot, &intent);
            }
            unanswered.insert(one.unique, (slot, one));
        }
    }

    /// Returns the requests that the predecessor did not answer, and that the kernel has not sent again yet.
    pub(crate) fn unanswered(&self) -> Vec<FoundSlot> {
        let unanswered = self.unanswered.lock();
        unanswered
            .values()
            .map(|(_, found)| found.clone())
            .collect()
    }

    /// Returns the largest handle that the predecessor assigned in a request that it did not answer; 0 if there is none.
    pub fn last_unanswered_handle(&self) -> u64 {
        let unanswered = self.unanswered.lock();
        let handles = unanswered.values().map(|(_, found)| found.handle);
        handles.max().unwrap_or(0)
    }

    /// Records that a request was answered.
    pub fn note_answered(&self) {
        self.set(Word::Answered, 1);
    }

    /// Returns the size of the blocks in bytes.
    pub fn size(&self) -> u64 {
        self.blocks.end(&self.memory) * 8
    }
}

/// The slot of a request, until its reply was sent.
#[derive(Debug)]
pub struct RequestSlot {
    ledger: Arc<Ledger>,
    slot: Option<usize>,
}

impl Drop for RequestSlot {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            if CURRENT.get() == Some(slot) {
                CURRENT.set(None);
                RESUMED.set(None);
            }
            self.ledger.slots.end(&self.ledger.memory, slot);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Holds no descriptors.
    #[derive(Debug, Default)]
    pub(crate) struct NoCustodian;

    impl Custodian for NoCustodian {
        fn deposit(&self, _: u64, _: BorrowedFd<'_>) -> Result<()> {
            Ok(())
        }

        fn release(&self, _: u64) {}
    }

    fn read(ledger: &Ledger) -> std::result::Result<LedgerContent, LedgerError> {
        LedgerContent::read(ledger.descriptor().try_clone_to_owned().unwrap())
    }

    #[test]
    fn successor_reads_values_words_and_requests() {
        let ledger = Arc::new(Ledger::create(Arc::new(NoCustodian)).unwrap());
        ledger.set(Word::Pushes, 3);
        ledger.put(Kind::Ctime, 5, b"first");
        ledger.put(Kind::Ctime, 5, b"second");
        ledger.put(Kind::Ctime, 6, b"gone");
        ledger.delete(Kind::Ctime, 6);
        let request = ledger.begin(77);
        ledger.intend(&Intent {
            change: Change::Remove,
            parents: (1, 0),
            names: (b"name", b""),
            object: 0,
        });
        let content = read(&ledger).unwrap();
        assert_eq!(content.word(Word::Pushes), 3);
        let values: Vec<_> = content.values().collect();
        assert_eq!(values, [(Kind::Ctime, 5, b"second".to_vec())]);
        assert_eq!(content.slots[0].1.unique, 77);
        assert_eq!(content.slots[0].1.names.0, b"name");
        drop(request);
        assert!(read(&ledger).unwrap().slots.is_empty());
        // Without a request there is nothing to record it in.
        ledger.withdraw();
        ledger.note_handle(1);
        assert!(read(&ledger).unwrap().slots.is_empty());
    }

    #[test]
    fn successor_continues_the_ledger() {
        let old = Arc::new(Ledger::create(Arc::new(NoCustodian)).unwrap());
        old.put(Kind::Ctime, 5, b"first");
        old.add(Kind::Inode, 7, b"place", 3).unwrap();
        old.note_answered();
        let _request = old.begin(77);
        let content = read(&old).unwrap();
        assert_eq!(content.inodes.len(), 1);
        let new = Arc::new(content.into_ledger(Arc::new(NoCustodian), [9].into_iter()));
        new.put(Kind::Ctime, 5, b"second");
        new.release(9);
        let content = read(&new).unwrap();
        assert_eq!(content.word(Word::Answered), 0);
        let values: Vec<_> = content.values().collect();
        assert_eq!(values, [(Kind::Ctime, 5, b"second".to_vec())]);
        let (_, block) = content.inodes[0];
        assert_eq!((new.count(block), new.first_byte(block)), (3, b'p'));
        // The kernel sends the request again, and it gets its slot.
        drop(new.begin(77 | RESENT));
        assert!(read(&new).unwrap().slots.is_empty());
    }

    #[test]
    fn incomplete_ledger_is_refused() {
        let ledger = Ledger::create(Arc::new(NoCustodian)).unwrap();
        assert!(ledger.is_complete());
        ledger.put(Kind::Ctime, 5, &[0; 100_000]);
        assert!(!ledger.is_complete());
        assert!(matches!(read(&ledger), Err(LedgerError::Incomplete)));
    }
}
