//! The part of the record of state about the table of inodes (docs/format.md).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cowl_layers::locks::Mutex;
use cowl_layers::sys::stat::Time;
use lru::LruCache;
use serde::{Deserialize, Serialize};

use super::node_ids::{NodeIds, NodeIdsRecord};
use super::object::Inode;
use super::record::InodeRecord;
use super::shards::{InodeTable, TableEntry};
use super::substitutes::{Substitutes, SubstitutesRecord};

/// The table, without the inodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TableRecord {
    pub(crate) substitutes: SubstitutesRecord,
    pub(crate) node_ids: NodeIdsRecord,
    /// The held ctimes by inode number (on disk, visible), the least recently used first.
    pub(crate) ctimes: Vec<(u64, Time, Time)>,
}

impl InodeTable {
    /// Returns the record of the table, and all inodes that anything refers to, with their lookup counts.
    pub(crate) fn record(&self) -> (TableRecord, Vec<(Arc<Inode>, u32)>) {
        let Self {
            shards,
            substitutes,
            ctimes,
            node_ids,
            // The number of inodes, and the time of the next cleanup.
            known: _,
            dropped: _,
            // The successor has one of its own.
            ledger,
            // The caller has located all objects.
            is_locating: _,
        } = self;
        let mut inodes = Vec::new();
        for shard in shards {
            for entry in shard.lock().values() {
                match entry {
                    TableEntry::Weak(inode) | TableEntry::Faded { inode, .. } => {
                        inodes.extend(inode.upgrade().map(|inode| (inode, 0)));
                    }
                    TableEntry::Strong { inode, .. } | TableEntry::Recorded { inode, .. } => {
                        inodes.push((inode.clone(), entry.lookups(ledger.get())));
                    }
                    TableEntry::Unlocated { .. } => {}
                }
            }
        }
        let held = |(ino, (real, shown)): (&u64, &(Time, Time))| (*ino, *real, *shown);
        let record = TableRecord {
            substitutes: substitutes.lock().to_record(),
            node_ids: node_ids.to_record(),
            ctimes: ctimes.lock().iter().rev().map(held).collect(),
        };
        (record, inodes)
    }

    /// Creates the table of a record with these inodes; `None` if it refers to another inode.
    pub(crate) fn from_record(
        record: &TableRecord,
        inodes: &HashMap<u64, Arc<Inode>>,
        records: &[InodeRecord],
    ) -> Option<Self> {
        let mut ctimes = LruCache::unbounded();
        for (ino, real, shown) in &record.ctimes {
            ctimes.put(*ino, (*real, *shown));
        }
        let table = Self {
            substitutes: Mutex::new(Substitutes::from_record(&record.substitutes)),
            node_ids: NodeIds::from_record(&record.node_ids, |ino| inodes.get(&ino).cloned())?,
            ctimes: Mutex::new(ctimes),
            ..Self::default()
        };
        for record in records {
            let inode = inodes.get(&record.ino)?;
            let entry = match record.lookups {
                0 => TableEntry::Weak(Arc::downgrade(inode)),
                lookups => TableEntry::Strong {
                    inode: inode.clone(),
                    lookups,
                },
            };
            table.shard(record.ino).lock().insert(record.ino, entry);
        }
        table.known.store(records.len(), Ordering::Relaxed);
        Some(table)
    }
}

/// Replaces the node ids by those of a record; `None` if it refers to an inode that is not among these.
pub(crate) fn restore_node_ids(
    table: &mut InodeTable,
    record: &NodeIdsRecord,
    inodes: &HashMap<u64, Arc<Inode>>,
) -> Option<()> {
    table.node_ids = NodeIds::from_record(record, |ino| inodes.get(&ino).cloned())?;
    Some(())
}

/// Continues the numbers of the predecessor in its ledger, which the table has taken over.
pub(crate) fn continue_numbers(table: &InodeTable) {
    if let Some(ledger) = table.ledger.get() {
        table.substitutes.lock().attach(ledger);
        table.node_ids.attach(ledger);
    }
}
