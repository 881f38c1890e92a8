//! The table of known inodes by number, with the kernel's lookup counts.
//!
//! A number never refers to two objects at once: an object whose number is taken gets a substitute number, from a
//! separate range, for as long as it is known.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::identity::Identity;
use super::ledger::drop_entry;
use super::node_ids::{NodeIds, OwnNumber};
use super::object::{Inode, TimesOverride, take_state};
use super::shards::{InodeTable, Shard, TableEntry, is_place_of_others};
use super::substitutes::is_substitute;
use super::values::encode;
use crate::ledger::Kind;
use cowl_layers::error::Result;
use cowl_layers::sys::stat::{FileKind, Time};

/// The maximum number of cached ctimes.
const MAX_CTIMES: usize = 1 << 16;
/// The minimum number of dropped inodes before the tables shrink. They use one or two megabytes.
const MIN_DROPPED: usize = 4096;

/// The handling of an object whose number belongs to a different known inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnConflict {
    /// Insert nothing, because it may be the same object during its copy-up.
    Defer,
    /// Assign a substitute number, because it is another object.
    Renumber,
    /// Give the known inode the state of the object, if it has this type: another process may have copied the object up
    /// or moved it. Otherwise assign a substitute number. The state is also updated without a conflict.
    Refresh(FileKind),
}

/// The storage of an object's visible inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberStorage {
    /// The number can be read from disk.
    OnDisk,
    /// The number is not on disk: the table must hold it.
    InMemory,
}

impl InodeTable {
    /// Returns the node ids of the regular files for which `is` returns true.
    pub(crate) fn numbers_of(&self, is: impl Fn(&Inode) -> bool) -> Vec<u64> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let live = shard.values().filter_map(TableEntry::living);
            found.extend(
                live.filter(|inode| inode.kind() == FileKind::Regular && is(inode))
                    .map(|inode| inode.ino()),
            );
        }
        let again = |own: &u64| Some(self.node_ids.current(*own)).filter(|number| number != own);
        let replacements: Vec<u64> = found.iter().filter_map(again).collect();
        found.extend(replacements);
        found
    }

    /// Returns all known inodes.
    pub(crate) fn all(&self) -> Vec<Arc<Inode>> {
        let mut all = Vec::with_capacity(self.known.load(Ordering::Relaxed));
        for shard in &self.shards {
            all.extend(shard.lock().values().filter_map(TableEntry::living));
        }
        all
    }

    /// Returns the inode with the node id `ino`; `None` if it is not known.
    pub fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        if NodeIds::is_replacement(ino) {
            return self.node_ids.get(ino);
        }
        let shard = self.shard(ino).lock();
        shard.get(&ino)?.living()
    }

    /// Returns the inode of the object with the visible number `number`, and whether it is new.
    ///
    /// A new inode is created by `make`. Returns `None` only with [`OnConflict::Defer`].
    pub(crate) fn intern(
        &self,
        number: u64,
        identity: Identity,
        on_conflict: OnConflict,
        make: impl FnOnce(u64) -> Arc<Inode>,
    ) -> Option<(Arc<Inode>, bool)> {
        let recorded = self.substitutes.lock().find(identity, number);
        let renumber = |make| match on_conflict {
            OnConflict::Renumber | OnConflict::Refresh(_) => {
                Some(self.intern_substitute(identity, make))
            }
            OnConflict::Defer => None,
        };
        let Some(ino) = recorded else {
            return renumber(make);
        };
        let mut shard = self.shard(ino).lock();
        let living = shard.get(&ino).and_then(TableEntry::living);
        match living {
            Some(inode) if on_conflict == OnConflict::Refresh(inode.kind()) => {
                drop(shard);
                take_state(&inode, &make(ino));
                Some((inode, false))
            }
            Some(_) if matches!(on_conflict, OnConflict::Refresh(_)) => {
                drop(shard);
                // The substitute may belong to an earlier object with the same inode number on disk.
                self.remove_substitute(identity);
                renumber(make)
            }
            Some(inode) if inode.identity() == identity => Some((inode, false)),
            Some(_) => {
                drop(shard);
                renumber(make)
            }
            None => {
                let inode = make(ino);
                if let Some((real, shown)) = self.ctimes.lock().get(&ino) {
                    inode.override_ctime(*real, *shown);
                }
                let retained = shard.get(&ino);
                match retained.and_then(|entry| entry.block_to_locate(self)) {
                    None => self.insert(&mut shard, &inode),
                    // Another thread has dropped the directory since this one has looked its number up.
                    Some(block) => {
                        let entry = TableEntry::with_block(&inode, block, self.ledger.get());
                        shard.insert(ino, entry);
                        drop(shard);
                        self.note_place(&inode);
                    }
                }
                Some((inode, true))
            }
        }
    }

    fn intern_substitute(
        &self,
        identity: Identity,
        make: impl FnOnce(u64) -> Arc<Inode>,
    ) -> (Arc<Inode>, bool) {
        let mut substitutes = self.substitutes.lock();
        if let Some(ino) = substitutes.get(identity) {
            let mut shard = self.shard(ino).lock();
            match shard.get(&ino).and_then(TableEntry::living) {
                Some(inode) if inode.identity() == identity => return (inode, false),
                Some(_) => {}
                None => {
                    let inode = make(ino);
                    self.insert(&mut shard, &inode);
                    return (inode, true);
                }
            }
        }
        let ino = substitutes.assign(identity);
        let inode = make(ino);
        self.insert(&mut self.shard(ino).lock(), &inode);
        (inode, true)
    }

    /// Inserts an inode.
    ///
    /// Before a map grows, this removes the entries of dropped inodes: [`Self::forget`] cannot remove the entry of an
    /// inode that an operation or an open file still references.
    fn insert(&self, shard: &mut Shard, inode: &Arc<Inode>) {
        if shard.len() >= shard.capacity() {
            let before = shard.len();
            shard.retain(|_, entry| {
                let is_needed = entry.is_alive() || entry.block_to_locate(self).is_some();
                if !is_needed {
                    self.remove_block(entry);
                }
                is_needed
            });
            self.known
                .fetch_sub(before - shard.len(), Ordering::Relaxed);
            // Delays the next cleanup until the number of entries has doubled.
            shard.reserve(shard.len() + 1);
        }
        match shard.insert(inode.ino(), TableEntry::Weak(Arc::downgrade(inode))) {
            Some(replaced) => self.remove_block(&replaced),
            None => self.count_known(),
        }
    }

    /// Runs `change`, which moves an object to another location on disk and sets its identity to `to`. The inode keeps
    /// its number, also if that is a substitute.
    ///
    /// A concurrent lookup finds the inode by either identity: the substitute is registered for the new one before
    /// the change, and removed from the old one after it.
    pub(crate) fn relocate(
        &self,
        inode: &Arc<Inode>,
        to: Identity,
        storage: NumberStorage,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (ino, from) = (inode.ino(), inode.identity());
        let substituted = {
            let mut substitutes = self.substitutes.lock();
            let substituted = substitutes.get(from).is_some();
            if substituted || storage == NumberStorage::InMemory || is_substitute(ino) {
                substitutes.record(to, ino);
            }
            substituted
        };
        let changed = change();
        let left = if changed.is_ok() { from } else { to };
        if (substituted || changed.is_err()) && from != to {
            let mut substitutes = self.substitutes.lock();
            substitutes.remove(left);
            if substituted && changed.is_err() {
                // The reservation of the number was that of the new identity.
                substitutes.record(from, ino);
            }
        }
        // Its content version may have changed, and its location if it has no name.
        self.note_place(inode);
        changed
    }

    /// Reserves the numbers of all known objects whose own number is another one, so that no new object gets them, and
    /// drops the recorded numbers of all other objects. `own_number` returns an object's own number.
    ///
    /// This is necessary when layers leave the stack. The file system reuses their inode numbers for new objects, and
    /// recorded identities of their objects become invalid.
    ///
    /// `known` contains all known inodes; until it returns, no other becomes known.
    pub(crate) fn reserve_numbers(
        &self,
        known: &[Arc<Inode>],
        own_number: impl Fn(Identity) -> Option<u64>,
    ) {
        let named = known
            .iter()
            .filter(|inode| !inode.state.read().is_removed());
        let numbers = named.map(|inode| (inode.identity(), inode.ino()));
        let differing = numbers.filter(|(identity, ino)| own_number(*identity) != Some(*ino));
        self.substitutes.lock().reserve(differing);
    }

    /// Ends [`Inode::override_times`]: from now on `shown` is visible while the ctime on disk is `real`, also if the
    /// inode is forgotten and looked up again.
    pub(crate) fn override_ctime(&self, inode: &Inode, real: Time, shown: Time) {
        let held = TimesOverride::WhileCtime {
            real,
            visible: shown,
        };
        if inode.end_times_override(Some(held)) {
            self.record_ctime(inode, real, shown);
        }
    }

    /// Makes the ctime `shown` visible while the ctime on disk is `real`, also if the inode is forgotten and looked up
    /// again.
    pub(crate) fn show_ctime(&self, inode: &Inode, real: Time, shown: Time) {
        inode.override_ctime(real, shown);
        self.record_ctime(inode, real, shown);
    }

    fn record_ctime(&self, inode: &Inode, real: Time, shown: Time) {
        if is_substitute(inode.ino()) {
            return;
        }
        let mut ctimes = self.ctimes.lock();
        ctimes.put(inode.ino(), (real, shown));
        if let Some(ledger) = self.ledger.get() {
            ledger.put(Kind::Ctime, inode.ino(), &encode(&(real, shown)));
        }
        if ctimes.len() > MAX_CTIMES
            && let Some((dropped, _)) = ctimes.pop_lru()
            && let Some(ledger) = self.ledger.get()
        {
            ledger.delete(Kind::Ctime, dropped);
        }
    }

    fn drop_ctime(&self, ino: u64) {
        let mut ctimes = self.ctimes.lock();
        if ctimes.pop(&ino).is_some()
            && let Some(ledger) = self.ledger.get()
        {
            ledger.delete(Kind::Ctime, ino);
        }
    }

    /// Removes the substitute number of an object whose last name was removed, because a new object may get its inode
    /// number on disk.
    pub(crate) fn remove_substitute(&self, identity: Identity) {
        self.substitutes.lock().remove(identity);
    }

    /// Returns the visible number of an object in a listing, which may not be known. `own` is its own number.
    pub(crate) fn listed_number(&self, identity: Identity, own: u64) -> u64 {
        let mut substitutes = self.substitutes.lock();
        let found = substitutes.find(identity, own);
        found.unwrap_or_else(|| substitutes.assign(identity))
    }

    /// Returns the number of an object whose visible number is not on disk; `None` for any other object.
    #[cfg(test)]
    fn substitute(&self, identity: Identity) -> Option<u64> {
        self.substitutes.lock().get(identity)
    }

    /// Returns the node id for replies about an inode: its own number, or its newest replacement.
    pub fn node_id(&self, inode: &Inode) -> u64 {
        self.node_ids.current(inode.ino())
    }

    /// Assigns a new node id to an inode, unless its current one is not `old` any more. Processes that have the file
    /// open keep the old node id.
    pub fn replace_node_id(&self, inode: &Arc<Inode>, old: u64) {
        self.node_ids.replace(inode, old);
    }

    /// Increments the lookup count of an inode, for a reply that contains it under its own number.
    pub fn count_lookup(&self, inode: &Arc<Inode>) {
        self.count_lookup_as(inode, inode.ino());
    }

    /// Increments the lookup count of an inode, for a reply that contains it under the node id `number`.
    pub fn count_lookup_as(&self, inode: &Arc<Inode>, number: u64) {
        if NodeIds::is_replacement(number) {
            self.node_ids.count_lookup(inode, number);
            return;
        }
        let mut shard = self.shard(inode.ino()).lock();
        if let Some(ledger) = self.ledger.get() {
            match shard.get(&inode.ino()) {
                Some(TableEntry::Recorded { inode: held, block }) if Arc::ptr_eq(held, inode) => {
                    ledger.set_count(*block, ledger.count(*block).saturating_add(1));
                }
                _ => {
                    drop(shard);
                    self.record_lookups(ledger, inode, 1);
                }
            }
            return;
        }
        let entry = shard.entry(inode.ino()).or_insert_with(|| {
            self.count_known();
            TableEntry::Weak(Weak::new())
        });
        match entry {
            TableEntry::Strong {
                inode: held,
                lookups,
            } if Arc::ptr_eq(held, inode) => {
                *lookups = lookups.saturating_add(1);
            }
            // Another inode had this number before; its lookup count does not apply to this one.
            entry => {
                *entry = TableEntry::Strong {
                    inode: inode.clone(),
                    lookups: 1,
                };
            }
        }
    }

    /// Subtracts `count` from the lookup count of a node id (FUSE_FORGET). At zero, calls `forgotten` with the inode, and
    /// drops it if it is unreferenced.
    ///
    /// The argument is the reference that the table had, so that no other thread finds the inode in use by it.
    pub(crate) fn forget(&self, ino: u64, count: u64, forgotten: impl FnOnce(&Arc<Inode>)) {
        if NodeIds::is_replacement(ino) {
            if let Some(inode) = self.node_ids.get(ino) {
                let object = if self.is_forgotten(inode.ino()) {
                    OwnNumber::Forgotten
                } else {
                    OwnNumber::Known
                };
                self.node_ids.forget(ino, count, object);
                // Another thread may have handled the forget of the own number in between.
                if self.is_forgotten(inode.ino()) {
                    self.node_ids.drop_unused(inode.ino());
                }
                if self.node_ids.is_forgotten(ino) {
                    forgotten(&inode);
                }
                self.prune(inode);
            }
            return;
        }
        let freed = {
            let mut shard = self.shard(ino).lock();
            let entry = shard.get_mut(&ino);
            let freed = entry.and_then(|entry| entry.subtract(count, self.ledger.get()));
            if let Some(entry @ TableEntry::Unlocated { block }) = shard.get(&ino)
                && entry.lookups(self.ledger.get()) == 0
                && !is_place_of_others(self, *block)
            {
                drop_entry(self, &mut shard, ino);
            }
            freed
        };
        let Some(freed) = freed else { return };
        self.node_ids.drop_unused(ino);
        forgotten(&freed);
        self.prune(freed);
    }

    /// Whether the lookup count of a node id is zero.
    pub fn is_forgotten(&self, ino: u64) -> bool {
        if NodeIds::is_replacement(ino) {
            return self.node_ids.is_forgotten(ino);
        }
        let shard = self.shard(ino).lock();
        let entry = shard.get(&ino);
        entry.is_none_or(|entry| entry.lookups(self.ledger.get()) == 0)
    }

    /// Drops an inode if the kernel does not know it and nothing else references it, and then its parent directories
    /// under the same condition.
    fn prune(&self, inode: Arc<Inode>) {
        let mut next = Some(inode);
        while let Some(inode) = next.take() {
            let mut shard = self.shard(inode.ino()).lock();
            let unknown = shard.get(&inode.ino()).is_none_or(|entry| {
                matches!(entry, TableEntry::Weak(_) | TableEntry::Faded { .. })
            });
            // If this is the only reference, no other thread can get one while the shard is locked.
            if !unknown || Arc::strong_count(&inode) > 1 {
                return;
            }
            let block = shard.get(&inode.ino()).and_then(TableEntry::block);
            if let Some(block) = block.filter(|block| is_place_of_others(self, *block)) {
                shard.insert(inode.ino(), TableEntry::Unlocated { block });
                drop(shard);
                next = drop_inode(self, inode);
                continue;
            }
            drop_entry(self, &mut shard, inode.ino());
            drop(shard);
            if let Some(ledger) = self.ledger.get() {
                ledger.release(inode.ino());
            }
            if is_substitute(inode.ino()) {
                self.substitutes.lock().note_forgotten(inode.identity());
            }
            if !inode.has_times_override() {
                self.drop_ctime(inode.ino());
            }
            next = drop_inode(self, inode);
        }
    }

    /// Drops references, and those of the inodes that the kernel does not know and nothing else references.
    pub(crate) fn release(&self, inodes: Vec<Arc<Inode>>) {
        for inode in inodes {
            self.prune(inode);
        }
    }

    /// Shrinks the tables if at least [`MIN_DROPPED`] inodes were dropped, and as many as remain; returns whether it
    /// did.
    ///
    /// If it did, the allocator has much memory to return to the kernel. The amortized cost for each inode is constant.
    pub(crate) fn shrink(&self) -> bool {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped < MIN_DROPPED || dropped < self.known.load(Ordering::Relaxed) {
            return false;
        }
        // Of several threads that get here at the same time, only one shrinks the tables.
        if self.dropped.swap(0, Ordering::Relaxed) < MIN_DROPPED {
            return false;
        }
        for shard in &self.shards {
            shard.lock().shrink_to_fit();
        }
        true
    }

    /// Returns the number of known inodes.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Whether no inode is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Drops an inode that is not in the table any more. Returns one of its parents.
fn drop_inode(table: &InodeTable, inode: Arc<Inode>) -> Option<Arc<Inode>> {
    let mut parents = (Arc::into_inner(inode)?.state.get_mut())
        .take_parents()
        .into_iter();
    let next = parents.next();
    for parent in parents {
        table.prune(parent);
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    const BELOW: Identity = Identity { dev: 1, ino: 10 };
    const ABOVE: Identity = Identity { dev: 2, ino: 20 };

    fn file(ino: u64, layer: &std::path::Path) -> Arc<Inode> {
        super::super::fixture::metacopy(ino, layer, BELOW)
    }

    /// Race: two processes that open a file during its copy-up get two inodes in the kernel, and file locks on one
    /// do not exclude the other.
    #[test]
    fn new_content_is_never_seen_with_the_old_version() {
        let layer = tempfile::tempdir().unwrap();
        let inode = file(7, layer.path());
        let before = inode.content_version();
        inode
            .update_content(|file| {
                assert_ne!(inode.content_version(), before, "not visible yet");
                file.data = None;
            })
            .unwrap();
        assert!(inode.file().unwrap().data.is_none() && inode.content_version() != before);
    }

    #[test]
    fn an_object_that_moves_keeps_its_substitute_number_all_the_time() {
        let layer = tempfile::tempdir().unwrap();
        let table = InodeTable::default();
        let taken = file(7, layer.path());
        let first = Identity { dev: 9, ino: 9 };
        taken.update_file(|file| file.identity = first).unwrap();
        let (_taken, _) = table
            .intern(7, first, OnConflict::Renumber, |_| taken)
            .unwrap();
        let make = |ino| file(ino, layer.path());
        let (inode, _) = table.intern(7, BELOW, OnConflict::Renumber, make).unwrap();
        let number = inode.ino();
        assert_ne!(number, 7);
        table
            .relocate(&inode, ABOVE, NumberStorage::OnDisk, || {
                assert_eq!(table.substitute(BELOW), Some(number));
                assert_eq!(table.substitute(ABOVE), Some(number));
                inode.update_file(|file| file.identity = ABOVE)
            })
            .unwrap();
        assert_eq!(table.substitute(BELOW), None);
        assert_eq!(table.substitute(ABOVE), Some(number));
        let (again, new) = table.intern(7, ABOVE, OnConflict::Renumber, make).unwrap();
        assert!(Arc::ptr_eq(&again, &inode) && !new);
    }

    /// Millions of inodes can be known after a walk of a large tree; docs/semantics.md reports the memory for each.
    #[test]
    fn inodes_and_table_entries_are_small() {
        assert_eq!(size_of::<TableEntry>(), 16);
        assert!(size_of::<Inode>() <= 152, "{}", size_of::<Inode>());
    }
}
