//! The inodes of a predecessor whose objects were not located yet (docs/decisions/0035).
//!
//! Such an inode is only a block in the ledger. Nothing in this process refers to it except for the places of others of
//! its kind, by its number. Every operation on an object needs its inode, and so locates the object first, by the inode
//! number or by a lookup of any of its names. Therefore the recorded place remains true until then.

use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::identity::Identity;
use super::inode_block::InodeBlock;
use super::ledger::drop_entry;
use super::object::{Inode, InodeState};
use super::record::InodeRecord;
use super::shards::{InodeTable, SHARDS, TableEntry};
use crate::ledger::{Block, Ledger};
use cowl_layers::error::{Error, Result};
use cowl_layers::sys::stat::{FileKind, Time};

/// The content of the table under a number.
pub(crate) enum Whereabouts {
    /// An inode.
    Inode(Arc<Inode>),
    /// An inode whose object was not located yet.
    Recorded(InodeBlock),
    /// Nothing.
    Unknown,
}

/// An object that was found on disk.
#[derive(Debug)]
pub(crate) struct FoundState {
    /// The number of its own.
    pub(crate) own: u64,
    pub(crate) identity: Identity,
    pub(crate) kind: FileKind,
    /// The ctime on disk.
    pub(crate) ctime: Time,
    pub(crate) state: InodeState,
}

/// The inodes of a table whose objects were not located yet.
#[derive(Clone, Copy, Debug)]
pub struct Unlocated<'t>(&'t InodeTable);

/// Takes over a ledger with the blocks of its inodes, none of which is located yet.
pub(crate) fn adopt(table: &mut InodeTable, ledger: &Arc<Ledger>, blocks: &[(u64, Block)]) {
    table.ledger = ledger.clone().into();
    table.is_locating = true.into();
    for shard in &mut table.shards {
        // The numbers are spread evenly, or nearly so.
        shard
            .get_mut()
            .reserve(blocks.len() / SHARDS + blocks.len() / 64);
    }
    for (ino, block) in blocks {
        // Nothing else has access to the table, so no lock is necessary.
        let at = usize::try_from(ino % SHARDS as u64).unwrap_or(0);
        let Some(shard) = table.shards.get_mut(at) else {
            continue;
        };
        match shard.get_mut().entry(*ino) {
            Entry::Vacant(free) => {
                free.insert(TableEntry::Unlocated { block: *block });
            }
            Entry::Occupied(mut known) => {
                // The predecessor ended while it exchanged one block for another.
                let other = known.get().block().filter(|other| other != block);
                let Some(other) = other else { continue };
                if ledger.count(*block) >= ledger.count(other) {
                    known.insert(TableEntry::Unlocated { block: *block });
                    ledger.remove(other);
                } else {
                    ledger.remove(*block);
                }
            }
        }
    }
    table.known = table.len().into();
}

impl<'t> Unlocated<'t> {
    /// Returns the inodes of this table.
    pub fn of(table: &'t InodeTable) -> Self {
        Self(table)
    }

    /// Whether there may be any.
    pub(crate) fn may_exist(self) -> bool {
        self.0.is_locating.load(Ordering::Acquire)
    }

    /// Returns the numbers of the inodes that the kernel knows and whose objects were not located yet.
    pub fn numbers(self) -> Vec<u64> {
        let mut found = Vec::new();
        if !self.may_exist() {
            return found;
        }
        for shard in &self.0.shards {
            let shard = shard.lock();
            let known = shard.iter().filter(|(_, entry)| {
                matches!(entry, TableEntry::Unlocated { .. })
                    && entry.lookups(self.0.ledger.get()) > 0
            });
            found.extend(known.map(|(ino, _)| *ino));
        }
        found
    }

    /// Returns what the table has under a number. Fails if the block in the ledger is damaged.
    pub(crate) fn whereabouts(self, ino: u64) -> Result<Whereabouts> {
        let shard = self.0.shard(ino).lock();
        let Some(entry) = shard.get(&ino) else {
            return Ok(Whereabouts::Unknown);
        };
        if let Some(inode) = entry.living() {
            return Ok(Whereabouts::Inode(inode));
        }
        let (Some(ledger), Some(block)) = (self.0.ledger.get(), entry.block_to_locate(self.0))
        else {
            return Ok(Whereabouts::Unknown);
        };
        InodeBlock::decode(&ledger.content(block))
            .map(Whereabouts::Recorded)
            .ok_or(Error::Damaged("the place of an inode in the ledger"))
    }

    /// Returns the visible number of an object whose own number is `own`; `None` if that is reserved for another one.
    pub(crate) fn number(self, identity: Identity, own: u64) -> Option<u64> {
        self.0.substitutes.lock().find(identity, own)
    }

    /// Whether an object with this number of its own can be the one with the number `ino`.
    pub(crate) fn may_be(self, identity: Identity, own: u64, ino: u64) -> bool {
        self.0.substitutes.lock().may_be(identity, own, ino)
    }

    /// Creates the inode of an object that was found. `shown_in_copy` is the ctime that was visible during a copy-up.
    pub(crate) fn recovered(
        &self,
        ino: u64,
        block: &InodeBlock,
        found: FoundState,
        shown_in_copy: Option<Time>,
    ) -> Arc<Inode> {
        let during_copy = shown_in_copy.map(|shown| (found.ctime, shown));
        let held = during_copy.or_else(|| self.0.ctimes.lock().peek(&ino).copied());
        let of_object = (ino, found.identity, found.kind);
        let record = InodeRecord::recovered(of_object, block.lookups, block.version, held);
        Inode::from_record(&record, found.state)
    }

    /// Inserts an inode whose object was located. Returns the one that another thread inserted meanwhile, if any; `None`
    /// if the kernel has forgotten the inode.
    pub(crate) fn insert_located(self, inode: &Arc<Inode>) -> Option<Arc<Inode>> {
        let ino = inode.ino();
        let mut shard = self.0.shard(ino).lock();
        let entry = shard.get_mut(&ino)?;
        if let Some(other) = entry.living() {
            return Some(other);
        }
        let block = entry.block_to_locate(self.0)?;
        *entry = TableEntry::with_block(inode, block, self.0.ledger.get());
        Some(inode.clone())
    }

    /// Drops an inode whose object was not found. Returns the inode instead if another thread has located it meanwhile,
    /// perhaps to change its name.
    pub(crate) fn drop_lost(self, ino: u64) -> Option<Arc<Inode>> {
        let mut shard = self.0.shard(ino).lock();
        let entry = shard.get(&ino)?;
        if let Some(inode) = entry.living() {
            return Some(inode);
        }
        if entry.block_to_locate(self.0).is_some() {
            log::debug!("the object of inode {ino} does not exist any more");
            drop_entry(self.0, &mut shard, ino);
        }
        None
    }

    /// Drops the directories that were retained for objects that were not located yet. The caller has located all of
    /// those that the kernel knows.
    pub(crate) fn end_locating(self) {
        if !self.0.is_locating.swap(false, Ordering::AcqRel) {
            return;
        }
        for shard in &self.0.shards {
            let mut shard = shard.lock();
            let is_unlocated = |entry: &TableEntry| matches!(entry, TableEntry::Unlocated { .. });
            let left = shard.iter().filter(|(_, entry)| is_unlocated(entry));
            let left: Vec<u64> = left.map(|(ino, _)| *ino).collect();
            for ino in left {
                drop_entry(self.0, &mut shard, ino);
            }
        }
    }
}
