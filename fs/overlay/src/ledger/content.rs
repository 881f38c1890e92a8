//! The ledger of a process that has ended, and its continuation by a successor.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use cowl_layers::locks::Mutex;
use cowl_layers::sys::shared::SharedMemory;
use rustc_hash::FxHashMap;

use super::blocks::{Block, Blocks, Found};
use super::slots::{self, FoundSlot, Slots};
use super::{
    BLOCKS_AT, Custodian, Kind, Ledger, MAGIC, MAGIC_AT, SLOTS_AT, USED_AT, WORDS_AT, Word,
};

/// The content of a ledger, read by a successor.
#[derive(Debug)]
pub(crate) struct LedgerContent {
    memory: SharedMemory,
    blocks: Blocks,
    /// The inodes, with their blocks. A number has several blocks if the process ended in the middle of a change.
    pub(crate) inodes: Vec<(u64, Block)>,
    values: FxHashMap<(Kind, u64), Block>,
    /// The requests in progress, with the numbers of their slots.
    pub(crate) slots: Vec<(usize, FoundSlot)>,
}

/// The reason why a ledger cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// It is not a ledger, or one of another version.
    #[error("it is not a ledger of this version")]
    Version,
    /// A part could not be recorded.
    #[error("the ledger is incomplete")]
    Incomplete,
    /// The content is damaged.
    #[error("the ledger is damaged")]
    Damaged,
    /// It cannot be mapped.
    #[error("cannot map the ledger: {0}")]
    Io(#[from] cowl_layers::error::Error),
}

impl LedgerContent {
    /// Reads a ledger, whose writer has ended, and repairs what the end has interrupted.
    pub(crate) fn read(descriptor: OwnedFd) -> Result<Self, LedgerError> {
        let memory = open(descriptor)?;
        let (mut inodes, mut values) = (Vec::new(), FxHashMap::default());
        let (mut superseded, mut is_damaged) = (Vec::new(), false);
        let blocks =
            Blocks::adopt(
                &memory,
                USED_AT,
                BLOCKS_AT,
                |block, kind, key| match Kind::from_number(kind) {
                    Some(Kind::Inode) => inodes.push((key, block)),
                    Some(kind) => superseded.extend(values.insert((kind, key), block)),
                    None => is_damaged = true,
                },
            );
        let blocks = blocks.filter(|_| !is_damaged).ok_or(LedgerError::Damaged)?;
        for block in superseded {
            blocks.remove(&memory, block);
        }
        let slots = slots::read(&memory, SLOTS_AT);
        Ok(Self {
            memory,
            blocks,
            inodes,
            values,
            slots,
        })
    }

    /// Returns one word of a ledger, without the rest.
    pub(crate) fn word_of(descriptor: OwnedFd, word: Word) -> Result<u64, LedgerError> {
        Ok(open(descriptor)?.load(WORDS_AT + word as usize))
    }

    pub(crate) fn word(&self, word: Word) -> u64 {
        self.memory.load(WORDS_AT + word as usize)
    }

    /// Returns all values: type, key and content.
    pub(crate) fn values(&self) -> impl Iterator<Item = (Kind, u64, Vec<u8>)> {
        let content = |block: &Block| block.content(&self.memory).payload;
        (self.values.iter()).map(move |((kind, key), block)| (*kind, *key, content(block)))
    }

    /// Returns the value with this type and key.
    pub(crate) fn value(&self, kind: Kind, key: u64) -> Option<Found> {
        let block = self.values.get(&(kind, key))?;
        Some(block.content(&self.memory))
    }

    /// Returns the first byte of a block's payload; 0 if that is empty.
    pub(crate) fn first_byte(&self, block: Block) -> u8 {
        block.first_byte(&self.memory)
    }

    /// Replaces the content of `bytes` by the payload of a block.
    pub(crate) fn payload(&self, block: Block, bytes: &mut Vec<u8>) {
        block.payload(&self.memory, bytes);
    }

    /// Returns the ledger, which continues in the same memory. No request was answered yet by its process.
    ///
    /// `deposited` are the numbers of the descriptors in custody.
    pub(crate) fn into_ledger(
        self,
        custodian: Arc<dyn Custodian>,
        deposited: impl Iterator<Item = u64>,
    ) -> Ledger {
        let slots = Slots::adopt(SLOTS_AT, &self.slots);
        let unanswered =
            (self.slots.into_iter()).map(|(slot, found)| (found.unique, (slot, found)));
        let ledger = Ledger {
            memory: self.memory,
            blocks: self.blocks,
            slots,
            values: Mutex::new(self.values),
            is_complete: AtomicBool::new(true),
            custodian,
            // No descriptor of this process has the address 0, so each one is handed over again.
            deposited: Mutex::new(deposited.map(|number| (number, 0)).collect()),
            unanswered: Mutex::new(unanswered.collect()),
        };
        ledger.set(Word::Answered, 0);
        ledger
    }
}

/// Maps a ledger, which must be complete.
fn open(descriptor: OwnedFd) -> Result<SharedMemory, LedgerError> {
    let memory = SharedMemory::open(descriptor)?;
    if memory.load(MAGIC_AT) != MAGIC {
        return Err(LedgerError::Version);
    }
    if memory.load(WORDS_AT + Word::Complete as usize) != 1 {
        return Err(LedgerError::Incomplete);
    }
    Ok(memory)
}
