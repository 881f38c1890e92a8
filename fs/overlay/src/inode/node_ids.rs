//! Replacement node ids.
//!
//! A node id is the number by which the kernel knows an inode (FUSE_LOOKUP). It is the inode's own number, unless the
//! object was open when its content moved: processes that have it open then keep the old node id, with the kernel's
//! caches for it, and further opens get a new one. To achieve this, the daemon fails the open with ESTALE; the kernel
//! looks the name up again and gets the new node id. `st_ino` does not change, because it is transmitted separately.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use cowl_layers::locks::Mutex;

use super::object::Inode;
use super::values::{NodeIdValue, encode};
use crate::ledger::{Kind, Ledger, Word};

/// The range of replacement node ids: both top bits are set. Numbers from other file systems have only the second bit
/// set, substitute numbers only the first.
const RANGE: u64 = 3 << 62;

/// Whether the kernel knows an inode by its own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OwnNumber {
    Known,
    Forgotten,
}

/// The inodes that have a replacement node id.
#[derive(Debug, Default)]
pub(super) struct NodeIds {
    /// Whether any was ever assigned, which saves the lock on most mounts.
    any: AtomicBool,
    maps: Mutex<NodeIdMaps>,
}

#[derive(Debug, Default)]
struct NodeIdMaps {
    /// Inodes with their lookup counts, by replacement node id.
    inodes: HashMap<u64, (Arc<Inode>, u64)>,
    /// The newest replacement node id of an inode, by its own number.
    newest: HashMap<u64, u64>,
    /// The number of node ids assigned so far.
    assigned: u64,
    ledger: Option<Arc<Ledger>>,
}

impl NodeIds {
    /// Records all node ids, and every change from now on, in a ledger.
    pub(super) fn attach(&self, ledger: &Arc<Ledger>) {
        let mut maps = self.maps.lock();
        maps.ledger = Some(ledger.clone());
        for node_id in maps.inodes.keys() {
            maps.note(*node_id);
        }
    }

    /// Whether `ino` is a replacement node id.
    pub(super) fn is_replacement(ino: u64) -> bool {
        ino & RANGE == RANGE
    }

    /// Returns the inode with the replacement node id `ino`.
    pub(super) fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        let maps = self.maps.lock();
        maps.inodes.get(&ino).map(|(inode, _)| inode.clone())
    }

    /// Returns the node id for replies about the inode with the number `own`.
    pub(super) fn current(&self, own: u64) -> u64 {
        if !self.any.load(Ordering::Acquire) {
            return own;
        }
        self.maps.lock().newest.get(&own).copied().unwrap_or(own)
    }

    /// Assigns a new node id to an inode, unless its current one is not `old` any more.
    pub(super) fn replace(&self, inode: &Arc<Inode>, old: u64) {
        let mut maps = self.maps.lock();
        let current = maps.newest.get(&inode.ino()).copied();
        if current.unwrap_or(inode.ino()) != old {
            return;
        }
        let node_id = RANGE | maps.assigned;
        maps.assigned += 1;
        maps.newest.insert(inode.ino(), node_id);
        maps.inodes.insert(node_id, (inode.clone(), 0));
        maps.note(node_id);
        // The kernel cannot forget a node id that it never got, so the replaced one is dropped here.
        if let Some(current) = current
            && maps
                .inodes
                .get(&current)
                .is_some_and(|(_, count)| *count == 0)
        {
            maps.inodes.remove(&current);
        }
        if let Some(current) = current {
            maps.note(current);
        }
        self.any.store(true, Ordering::Release);
    }

    /// Increments the lookup count of a node id, for a reply that contains it.
    pub(super) fn count_lookup(&self, inode: &Arc<Inode>, node_id: u64) {
        let mut maps = self.maps.lock();
        maps.inodes
            .entry(node_id)
            .or_insert_with(|| (inode.clone(), 0))
            .1 += 1;
        maps.note(node_id);
    }

    /// Subtracts `count` from the lookup count of a node id (FUSE_FORGET), and drops the node id at zero.
    ///
    /// The newest node id is retained as long as the kernel knows the inode by its own number: the kernel repeats a
    /// lookup, and forgets the first reply at once.
    pub(super) fn forget(&self, node_id: u64, count: u64, own: OwnNumber) {
        let mut maps = self.maps.lock();
        if let Some((_, lookups)) = maps.inodes.get_mut(&node_id) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 && !(own == OwnNumber::Known && maps.is_newest(node_id)) {
                maps.remove(node_id);
            }
            maps.note(node_id);
        }
    }

    /// Whether the lookup count of a node id is zero.
    pub(super) fn is_forgotten(&self, node_id: u64) -> bool {
        let maps = self.maps.lock();
        maps.inodes
            .get(&node_id)
            .is_none_or(|(_, count)| *count == 0)
    }

    /// Drops the newest node id of an inode that the kernel forgot by its own number, if the lookup count of that node
    /// id is zero as well.
    pub(super) fn drop_unused(&self, own: u64) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut maps = self.maps.lock();
        if let Some(node_id) = maps.newest.get(&own).copied()
            && maps
                .inodes
                .get(&node_id)
                .is_some_and(|(_, count)| *count == 0)
        {
            maps.remove(node_id);
        }
    }
}

/// The replacement node ids, for the record of state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeIdsRecord {
    /// The number of the inode and the lookup count, by node id.
    pub(crate) inodes: BTreeMap<u64, (u64, u64)>,
    /// The newest node id, by the number of the inode.
    pub(crate) newest: BTreeMap<u64, u64>,
    pub(crate) assigned: u64,
}

impl NodeIds {
    pub(super) fn to_record(&self) -> NodeIdsRecord {
        // Whether any was assigned follows from the maps.
        let Self { any: _, maps } = self;
        let NodeIdMaps {
            inodes,
            newest,
            assigned,
            // The successor has one of its own.
            ledger: _,
        } = &*maps.lock();
        let inode = |(node_id, (inode, lookups)): (&u64, &(Arc<Inode>, u64))| {
            (*node_id, (inode.ino(), *lookups))
        };
        NodeIdsRecord {
            inodes: inodes.iter().map(inode).collect(),
            newest: newest
                .iter()
                .map(|(ino, node_id)| (*ino, *node_id))
                .collect(),
            assigned: *assigned,
        }
    }

    /// Creates the node ids of a record; `None` if it names an inode that `find` does not find.
    pub(super) fn from_record(
        record: &NodeIdsRecord,
        find: impl Fn(u64) -> Option<Arc<Inode>>,
    ) -> Option<Self> {
        let inode = |(node_id, (ino, lookups)): (&u64, &(u64, u64))| {
            Some((*node_id, (find(*ino)?, *lookups)))
        };
        let maps = NodeIdMaps {
            inodes: record.inodes.iter().map(inode).collect::<Option<_>>()?,
            newest: record.newest.clone().into_iter().collect(),
            assigned: record.assigned,
            ledger: None,
        };
        Some(Self {
            any: AtomicBool::new(record.assigned > 0),
            maps: Mutex::new(maps),
        })
    }
}

impl NodeIdMaps {
    fn is_newest(&self, node_id: u64) -> bool {
        let inode = self.inodes.get(&node_id);
        inode.is_some_and(|(inode, _)| self.newest.get(&inode.ino()) == Some(&node_id))
    }

    fn remove(&mut self, node_id: u64) {
        if self.is_newest(node_id)
            && let Some((inode, _)) = self.inodes.get(&node_id)
        {
            self.newest.remove(&inode.ino());
        }
        self.inodes.remove(&node_id);
        self.note(node_id);
    }

    /// Records the state of a node id in the ledger.
    fn note(&self, node_id: u64) {
        let Some(ledger) = &self.ledger else { return };
        ledger.set(Word::NodeIds, self.assigned);
        match self.inodes.get(&node_id) {
            Some((inode, lookups)) => {
                let value = NodeIdValue {
                    ino: inode.ino(),
                    lookups: *lookups,
                    is_newest: self.is_newest(node_id),
                };
                ledger.put(Kind::NodeId, node_id, &encode(&value));
            }
            None => ledger.delete(Kind::NodeId, node_id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DirState, Identity, InodeState, InodeTable, OnConflict};
    use super::*;
    use cowl_layers::sys::stat::FileKind;

    fn insert_known(table: &InodeTable, ino: u64) -> Arc<Inode> {
        let identity = Identity { dev: 1, ino };
        let state = InodeState::Dir(DirState {
            locs: Arc::from([]),
            redirect: None,
            alias: None,
            removed: false,
            identity,
        });
        let make = |ino| Inode::new(ino, FileKind::Directory, state);
        let (inode, _) = table
            .intern(ino, identity, OnConflict::Renumber, make)
            .unwrap();
        table.count_lookup(&inode);
        inode
    }

    #[test]
    fn newest_node_id_is_retained_while_the_kernel_knows_the_inode() {
        let table = InodeTable::default();
        let inode = insert_known(&table, 7);
        table.replace_node_id(&inode, 7);
        let second = table.node_id(&inode);
        assert!(second != 7 && table.get(second).is_some_and(|found| found.ino() == 7));
        // A late request with the old node id does not cause a second replacement.
        table.replace_node_id(&inode, 7);
        assert_eq!(table.node_id(&inode), second);
        // The kernel forgets the reply to its first lookup before it repeats the lookup.
        table.count_lookup_as(&inode, second);
        table.forget(second, 1, |_| {});
        assert!(table.is_forgotten(second));
        assert_eq!(table.node_id(&inode), second);
        table.count_lookup_as(&inode, second);
        table.replace_node_id(&inode, second);
        let third = table.node_id(&inode);
        assert!(third != second && table.get(second).is_some());
        table.forget(second, 1, |_| {});
        assert!(table.get(second).is_none());
        table.count_lookup_as(&inode, third);
        drop(inode);
        table.forget(7, 1, |_| {});
        assert!(table.get(third).is_some_and(|found| found.ino() == 7));
        table.forget(third, 1, |_| {});
        assert!(table.get(third).is_none() && table.get(7).is_none() && table.is_empty());
    }

    #[test]
    fn unused_node_id_is_dropped_with_the_inode() {
        let table = InodeTable::default();
        let inode = insert_known(&table, 7);
        table.replace_node_id(&inode, 7);
        let second = table.node_id(&inode);
        drop(inode);
        table.forget(7, 1, |_| {});
        assert!(table.get(second).is_none() && table.is_empty());
    }
}
