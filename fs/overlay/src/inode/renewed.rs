//! Second numbers. The kernel can be made to continue with an object under another number while a process has it
//! open under the old one, which then keeps its caches: the kernel gets the reply that the old number is stale, looks
//! the name up again, and gets the new number. `st_ino` stays the same: it is transmitted separately.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cowl_layers::locks::Mutex;

use super::object::Inode;

/// The range of these numbers. Those of other file systems have the second bit alone, substitutes the first.
const RANGE: u64 = 3 << 62;

/// Whether the kernel knows an object by its own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OwnNumber {
    Known,
    Forgotten,
}

/// Objects that have another number than their own.
#[derive(Debug, Default)]
pub(super) struct Renewed {
    /// Whether there ever was one: most mounts never see any.
    any: AtomicBool,
    maps: Mutex<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    /// By the new number, with the kernel's count of lookups.
    inodes: HashMap<u64, (Arc<Inode>, u64)>,
    /// The newest number of an object, by its own.
    newest: HashMap<u64, u64>,
    given: u64,
}

impl Renewed {
    /// Whether this is such a number.
    pub(super) fn has(ino: u64) -> bool {
        ino & RANGE == RANGE
    }

    pub(super) fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        let maps = self.maps.lock();
        maps.inodes.get(&ino).map(|(inode, _)| inode.clone())
    }

    /// Returns the number under which the kernel must know the object with the number `own`.
    pub(super) fn number(&self, own: u64) -> u64 {
        if !self.any.load(Ordering::Acquire) {
            return own;
        }
        self.maps.lock().newest.get(&own).copied().unwrap_or(own)
    }

    /// Gives an object another number than `old` for the kernel, unless it has one already.
    pub(super) fn renew(&self, inode: &Arc<Inode>, old: u64) {
        let mut maps = self.maps.lock();
        let now = maps.newest.get(&inode.ino()).copied();
        if now.unwrap_or(inode.ino()) != old {
            return;
        }
        let number = RANGE | maps.given;
        maps.given += 1;
        maps.newest.insert(inode.ino(), number);
        maps.inodes.insert(number, (inode.clone(), 0));
        // The number that it replaces, if the kernel never got it.
        if let Some(now) = now
            && maps.inodes.get(&now).is_some_and(|(_, count)| *count == 0)
        {
            maps.inodes.remove(&now);
        }
        self.any.store(true, Ordering::Release);
    }

    /// Counts a reply that gives it to the kernel.
    pub(super) fn remember(&self, inode: &Arc<Inode>, number: u64) {
        let mut maps = self.maps.lock();
        maps.inodes
            .entry(number)
            .or_insert_with(|| (inode.clone(), 0))
            .1 += 1;
    }

    /// The kernel forgot `count` of its lookups under this number. It stays while the kernel knows the object by
    /// its own: the kernel asks twice, and forgets the first answer at once.
    pub(super) fn forget(&self, number: u64, count: u64, own: OwnNumber) {
        let mut maps = self.maps.lock();
        if let Some((_, lookups)) = maps.inodes.get_mut(&number) {
            *lookups = lookups.saturating_sub(count);
            if *lookups == 0 && !(own == OwnNumber::Known && maps.is_newest(number)) {
                maps.remove(number);
            }
        }
    }

    /// Whether the kernel knows nothing under this number.
    pub(super) fn is_forgotten(&self, number: u64) -> bool {
        let maps = self.maps.lock();
        maps.inodes
            .get(&number)
            .is_none_or(|(_, count)| *count == 0)
    }

    /// Records that the kernel forgot the object under its own number: the newest is dropped too if the kernel does
    /// not know it either.
    pub(super) fn forgotten(&self, own: u64) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut maps = self.maps.lock();
        if let Some(number) = maps.newest.get(&own).copied()
            && maps
                .inodes
                .get(&number)
                .is_some_and(|(_, count)| *count == 0)
        {
            maps.remove(number);
        }
    }
}

impl Maps {
    fn is_newest(&self, number: u64) -> bool {
        let inode = self.inodes.get(&number);
        inode.is_some_and(|(inode, _)| self.newest.get(&inode.ino()) == Some(&number))
    }

    fn remove(&mut self, number: u64) {
        if self.is_newest(number)
            && let Some((inode, _)) = self.inodes.get(&number)
        {
            self.newest.remove(&inode.ino());
        }
        self.inodes.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DirState, Identity, InodeState, InodeTable, OnConflict};
    use super::*;
    use cowl_layers::sys::stat::FileKind;

    fn known(table: &InodeTable, ino: u64) -> Arc<Inode> {
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
    fn the_newest_number_lasts_while_the_kernel_knows_the_object() {
        let table = InodeTable::default();
        let inode = known(&table, 7);
        table.replace_node_id(&inode, 7);
        let second = table.node_id(&inode);
        assert!(second != 7 && table.get(second).is_some_and(|found| found.ino() == 7));
        // Who comes late with the old one is no reason for a third.
        table.replace_node_id(&inode, 7);
        assert_eq!(table.node_id(&inode), second);
        // The kernel forgets the first answer before it asks again.
        table.count_lookup_as(&inode, second);
        table.forget(second, 1);
        assert!(table.is_forgotten(second));
        assert_eq!(table.node_id(&inode), second);
        table.count_lookup_as(&inode, second);
        table.replace_node_id(&inode, second);
        let third = table.node_id(&inode);
        assert!(third != second && table.get(second).is_some());
        table.forget(second, 1);
        assert!(table.get(second).is_none());
        table.count_lookup_as(&inode, third);
        drop(inode);
        table.forget(7, 1);
        assert!(table.get(third).is_some_and(|found| found.ino() == 7));
        table.forget(third, 1);
        assert!(table.get(third).is_none() && table.get(7).is_none() && table.is_empty());
    }

    #[test]
    fn a_number_that_the_kernel_never_asked_for_goes_with_the_object() {
        let table = InodeTable::default();
        let inode = known(&table, 7);
        table.replace_node_id(&inode, 7);
        let second = table.node_id(&inode);
        drop(inode);
        table.forget(7, 1);
        assert!(table.get(second).is_none() && table.is_empty());
    }
}
