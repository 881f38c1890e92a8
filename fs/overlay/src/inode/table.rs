//! The inodes that are known, by number, with the kernel's count of lookups.
//!
//! A number never stands for two objects at once: an object whose number is taken gets another one
//! from a range of its own for as long as it is known.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use cowl_layers::locks::Mutex;
use lru::LruCache;
use rustc_hash::FxHashMap;

use super::identity::Identity;
use super::node_ids::{NodeIds, OwnNumber};
use super::object::{Inode, TimesOverride};
use cowl_layers::error::Result;
use cowl_layers::sys::stat::Time;

const SHARDS: usize = 16;
/// The maximum number of cached ctimes.
const MAX_CTIMES: usize = 1 << 16;
/// The number of dropped objects from which on memory is returned to the kernel: a megabyte or two.
const MIN_DROPPED: usize = 4096;
/// The range of numbers given out here: no file system below uses the top bit.
const SUBSTITUTE: u64 = 1 << 63;

#[derive(Debug)]
enum TableEntry {
    /// An operation or an open file references it, or it is unreferenced.
    Weak(Weak<Inode>),
    /// The kernel knows it. A count that reaches the largest number stays there, and the inode with it.
    Strong { inode: Arc<Inode>, lookups: u32 },
}

type Shard = FxHashMap<u64, TableEntry>;

/// What to do with an object whose number belongs to a different known object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnConflict {
    /// It may be the same object, which is just being copied up: nothing is entered.
    Defer,
    /// It is another object: it gets a number of its own.
    Renumber,
}

/// Whether an object on disk carries the number that it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberMarker {
    /// The number is found there.
    Present,
    /// It must be remembered.
    Missing,
}

/// The inodes that are known.
#[derive(Debug)]
pub struct InodeTable {
    shards: Vec<Mutex<Shard>>,
    /// The numbers of objects that show another one than is found on disk: those whose number was taken, and those
    /// that cannot carry the marker of the number that they had before their copy-up.
    substitutes: Mutex<FxHashMap<Identity, u64>>,
    next_substitute: AtomicU64,
    /// The arguments of [`Inode::override_ctime`], for an inode that the kernel forgets and looks up again. An outdated
    /// one is harmless: it has the time on disk that it replaces.
    ctimes: Mutex<LruCache<u64, (Time, Time)>>,
    /// Objects that the kernel knows under second numbers.
    node_ids: NodeIds,
    /// The number of known inodes, and of those dropped since the tables last shrank.
    known: AtomicUsize,
    dropped: AtomicUsize,
}

impl Default for InodeTable {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            substitutes: Mutex::default(),
            next_substitute: AtomicU64::new(SUBSTITUTE | 1),
            ctimes: Mutex::new(LruCache::unbounded()),
            node_ids: NodeIds::default(),
            known: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
        }
    }
}

impl InodeTable {
    fn shard(&self, ino: u64) -> &Mutex<Shard> {
        let at = usize::try_from(ino % SHARDS as u64).unwrap_or(0);
        // `at` is below SHARDS, the length.
        #[allow(clippy::indexing_slicing)]
        &self.shards[at]
    }

    /// Returns the inodes that a process has open for writing.
    pub(crate) fn with_writers(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock();
            let live = shard.values().filter_map(TableEntry::living);
            found.extend(
                live.filter(|inode| inode.has_writers())
                    .map(|inode| inode.ino()),
            );
        }
        let again = |own: &u64| Some(self.node_ids.current(*own)).filter(|number| number != own);
        let replacements: Vec<u64> = found.iter().filter_map(again).collect();
        found.extend(replacements);
        found
    }

    /// The inode with this number, when it is known.
    pub fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        if NodeIds::is_replacement(ino) {
            return self.node_ids.get(ino);
        }
        let shard = self.shard(ino).lock();
        shard.get(&ino)?.living()
    }

    /// Returns the inode of an object that shows `number`: the known one, or the one that `make` returns; and
    /// whether it is new. `None` only with [`OnConflict::Defer`].
    pub(crate) fn intern(
        &self,
        number: u64,
        identity: Identity,
        on_conflict: OnConflict,
        make: impl FnOnce(u64) -> Arc<Inode>,
    ) -> Option<(Arc<Inode>, bool)> {
        let ino = self.substitute(identity).unwrap_or(number);
        let mut shard = self.shard(ino).lock();
        let living = shard.get(&ino).and_then(TableEntry::living);
        match living {
            Some(inode) if inode.identity() == identity => Some((inode, false)),
            Some(_) if on_conflict == OnConflict::Renumber => {
                drop(shard);
                Some(self.intern_substitute(identity, make))
            }
            Some(_) => None,
            None => {
                let inode = make(ino);
                if let Some((real, shown)) = self.ctimes.lock().get(&ino) {
                    inode.override_ctime(*real, *shown);
                }
                self.insert(&mut shard, &inode);
                Some((inode, true))
            }
        }
    }

    fn intern_substitute(
        &self,
        identity: Identity,
        make: impl FnOnce(u64) -> Arc<Inode>,
    ) -> (Arc<Inode>, bool) {
        let mut known = self.substitutes.lock();
        let ino = *known
            .entry(identity)
            .or_insert_with(|| self.next_substitute.fetch_add(1, Ordering::Relaxed));
        let mut shard = self.shard(ino).lock();
        if let Some(inode) = shard.get(&ino).and_then(TableEntry::living) {
            return (inode, false);
        }
        let inode = make(ino);
        self.insert(&mut shard, &inode);
        (inode, true)
    }

    /// Inserts an inode. Before a map grows, entries of unreferenced objects are removed: an object that was
    /// forgotten while an operation or an open file still referenced it was not pruned then.
    fn insert(&self, shard: &mut Shard, inode: &Arc<Inode>) {
        if shard.len() >= shard.capacity() {
            let before = shard.len();
            shard.retain(|_, entry| entry.is_alive());
            self.known
                .fetch_sub(before - shard.len(), Ordering::Relaxed);
            // Not again before the number of entries has doubled.
            shard.reserve(shard.len() + 1);
        }
        if shard
            .insert(inode.ino(), TableEntry::Weak(Arc::downgrade(inode)))
            .is_none()
        {
            self.known.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Moves an object to another location on disk by `change`, which sets its identity. A substitute number is
    /// never found on disk, and stays its own.
    ///
    /// A concurrent lookup finds the object by either location: a substitute holds for the new one before the
    /// object is there, and for the old one until it has left.
    pub(crate) fn relocate(
        &self,
        inode: &Inode,
        to: Identity,
        marker: NumberMarker,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let (ino, from) = (inode.ino(), inode.identity());
        let substituted = {
            let mut known = self.substitutes.lock();
            let substituted = known.contains_key(&from);
            if substituted || marker == NumberMarker::Missing || ino & SUBSTITUTE != 0 {
                known.insert(to, ino);
            }
            substituted
        };
        let changed = change();
        let left = if changed.is_ok() { from } else { to };
        if (substituted || changed.is_err()) && from != to {
            self.substitutes.lock().remove(&left);
        }
        changed
    }

    /// Ends [`Inode::override_times`]: `shown` is shown while the layer has `real`, also after the inode was forgotten.
    pub(crate) fn override_ctime(&self, inode: &Inode, real: Time, shown: Time) {
        let held = TimesOverride::WhileCtime {
            real,
            visible: shown,
        };
        if inode.end_times_override(Some(held)) && inode.ino() & SUBSTITUTE == 0 {
            let mut kept = self.ctimes.lock();
            kept.put(inode.ino(), (real, shown));
            if kept.len() > MAX_CTIMES {
                kept.pop_lru();
            }
        }
    }

    /// Records that an object has no name any more: another one may get its inode number on disk.
    pub(crate) fn remove_substitute(&self, identity: Identity) {
        self.substitutes.lock().remove(&identity);
    }

    /// Returns the number of an object that shows another one than is found on disk.
    pub(crate) fn substitute(&self, identity: Identity) -> Option<u64> {
        self.substitutes.lock().get(&identity).copied()
    }

    /// Returns the number under which the kernel must know an object: mostly its own.
    pub fn node_id(&self, inode: &Inode) -> u64 {
        self.node_ids.current(inode.ino())
    }

    /// Gives an object another number than `old` for the kernel, unless it has one already. Processes that have it
    /// open under the old one keep it.
    pub fn replace_node_id(&self, inode: &Arc<Inode>, old: u64) {
        self.node_ids.replace(inode, old);
    }

    /// Counts a reply that gives this inode to the kernel, under its own number.
    pub fn count_lookup(&self, inode: &Arc<Inode>) {
        self.count_lookup_as(inode, inode.ino());
    }

    /// Counts a reply that gives this inode to the kernel, under this number.
    pub fn count_lookup_as(&self, inode: &Arc<Inode>, number: u64) {
        if NodeIds::is_replacement(number) {
            self.node_ids.count_lookup(inode, number);
            return;
        }
        let mut shard = self.shard(inode.ino()).lock();
        let entry = shard.entry(inode.ino()).or_insert_with(|| {
            self.known.fetch_add(1, Ordering::Relaxed);
            TableEntry::Weak(Weak::new())
        });
        match entry {
            TableEntry::Strong {
                inode: held,
                lookups,
            } if Arc::ptr_eq(held, inode) => {
                *lookups = lookups.saturating_add(1);
            }
            // What was held under this number has been replaced; its count went with it.
            entry => {
                *entry = TableEntry::Strong {
                    inode: inode.clone(),
                    lookups: 1,
                };
            }
        }
    }

    /// Records that the kernel forgot `count` of its lookups.
    pub fn forget(&self, ino: u64, count: u64) {
        if NodeIds::is_replacement(ino) {
            if let Some(inode) = self.node_ids.get(ino) {
                let object = if self.is_forgotten(inode.ino()) {
                    OwnNumber::Forgotten
                } else {
                    OwnNumber::Known
                };
                self.node_ids.forget(ino, count, object);
                // In case that it was forgotten by its own number meanwhile.
                if self.is_forgotten(inode.ino()) {
                    self.node_ids.drop_unused(inode.ino());
                }
                self.prune(inode);
            }
            return;
        }
        let freed = {
            let mut shard = self.shard(ino).lock();
            let Some(entry) = shard.get_mut(&ino) else {
                return;
            };
            let TableEntry::Strong { inode, lookups } = entry else {
                return;
            };
            if *lookups < u32::MAX {
                let left = u64::from(*lookups).saturating_sub(count);
                *lookups = u32::try_from(left).unwrap_or(u32::MAX);
            }
            if *lookups > 0 {
                return;
            }
            let inode = inode.clone();
            *entry = TableEntry::Weak(Arc::downgrade(&inode));
            inode
        };
        self.node_ids.drop_unused(ino);
        self.prune(freed);
    }

    /// Whether the kernel knows nothing under this number.
    pub fn is_forgotten(&self, ino: u64) -> bool {
        if NodeIds::is_replacement(ino) {
            return self.node_ids.is_forgotten(ino);
        }
        let shard = self.shard(ino).lock();
        !matches!(shard.get(&ino), Some(TableEntry::Strong { .. }))
    }

    /// Drops an inode that the kernel does not know, and then the directories that only it kept alive.
    fn prune(&self, inode: Arc<Inode>) {
        let mut next = Some(inode);
        while let Some(inode) = next.take() {
            let mut shard = self.shard(inode.ino()).lock();
            let unknown = shard
                .get(&inode.ino())
                .is_none_or(|entry| matches!(entry, TableEntry::Weak(_)));
            // This is the only reference, and no thread can get another while the shard is locked.
            if !unknown || Arc::strong_count(&inode) > 1 {
                return;
            }
            if shard.remove(&inode.ino()).is_some() {
                self.known.fetch_sub(1, Ordering::Relaxed);
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            drop(shard);
            if inode.ino() & SUBSTITUTE != 0 {
                self.substitutes.lock().remove(&inode.identity());
            }
            let Some(mut inode) = Arc::into_inner(inode) else {
                return;
            };
            if !inode.has_times_override() {
                self.ctimes.lock().pop(&inode.ino());
            }
            let mut parents = inode.state.get_mut().take_parents().into_iter();
            next = parents.next();
            for parent in parents {
                self.prune(parent);
            }
        }
    }

    /// Shrinks the tables if as many inodes were dropped as are left, and they are many; whether it did. Then the
    /// allocator has much memory to return. The amortized cost for each object is a small constant.
    pub(crate) fn shrink(&self) -> bool {
        let dropped = self.dropped.load(Ordering::Relaxed);
        if dropped < MIN_DROPPED || dropped < self.known.load(Ordering::Relaxed) {
            return false;
        }
        // One of the threads that see it at once is enough.
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

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl TableEntry {
    fn living(&self) -> Option<Arc<Inode>> {
        match self {
            Self::Weak(inode) => inode.upgrade(),
            Self::Strong { inode, .. } => Some(inode.clone()),
        }
    }

    fn is_alive(&self) -> bool {
        match self {
            Self::Weak(inode) => inode.strong_count() > 0,
            Self::Strong { .. } => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BELOW: Identity = Identity { dev: 1, ino: 10 };
    const ABOVE: Identity = Identity { dev: 2, ino: 20 };

    fn file(ino: u64, layer: &std::path::Path) -> Arc<Inode> {
        super::super::fixture::metacopy(ino, layer, BELOW)
    }

    /// Otherwise two openers of a file that is being copied up get two inodes in the kernel, and locks of the
    /// one do not keep the other out.
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
            .relocate(&inode, ABOVE, NumberMarker::Present, || {
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

    /// Millions of them are held when a large tree was walked; docs/semantics.md tells what one costs.
    #[test]
    fn what_is_kept_of_an_object_is_small() {
        assert_eq!(size_of::<TableEntry>(), 16);
        assert!(size_of::<Inode>() <= 152, "{}", size_of::<Inode>());
    }
}
