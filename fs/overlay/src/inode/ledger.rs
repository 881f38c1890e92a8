//! The part of the ledger about inodes (docs/format.md).
//!
//! Each inode that the kernel knows has a block with its place and its lookup count, and so has each directory that
//! such a place refers to.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cowl_layers::error::Result;
use cowl_layers::format::Redirect;
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::Time;
use serde::{Deserialize, Serialize};

use super::inode_block::{DIR, FILE, OTHER, ROOT, VERSION, push_number};
use super::object::{DirState, Inode, InodeState};
use super::place::{DirPlace, Place, References};
use super::shards::{InodeTable, Shard, TableEntry};
use super::times::held_ctime;
use super::values::encode;
use crate::ledger::{Block, Kind, Ledger};

/// Numbers of layers that do not depend on the stack: their ids. Descriptors are found by the inode number.
struct Ids;

impl References for Ids {
    fn layer(&mut self, layer: &Arc<Layer>) -> u64 {
        layer.id()
    }

    fn descriptor(&mut self, _: Arc<OwnedFd>) -> usize {
        0
    }
}

/// Returns the payload of an inode's block.
fn payload(inode: &Inode) -> Result<Vec<u8>> {
    let single = match &*inode.state.read() {
        InodeState::Dir(dir) => match &dir.alias {
            Some(alias) if !dir.removed => Some((DIR, alias.clone())),
            _ => None,
        },
        InodeState::File(file) => match file.aliases.as_slice() {
            [alias] if !file.orphan && file.anchor.is_none() => Some((FILE, alias.clone())),
            _ => None,
        },
    };
    let mut bytes = Vec::with_capacity(40);
    let mut begin = |tag: u8| match inode.content_version() {
        0 => bytes.push(tag),
        version => {
            bytes.push(tag | VERSION);
            bytes.extend(version.to_le_bytes());
        }
    };
    if let Some((tag, alias)) = single {
        begin(tag);
        push_number(&mut bytes, alias.parent.ino());
        bytes.extend(alias.name.as_bytes());
        return Ok(bytes);
    }
    match Place::of(inode, &mut Ids)? {
        Place::Root => begin(ROOT),
        place => {
            begin(OTHER);
            bytes.extend(encode(&place));
        }
    }
    Ok(bytes)
}

impl InodeTable {
    /// Records all inodes, and every change from now on, in a ledger.
    ///
    /// No operation may run meanwhile.
    pub(crate) fn attach(&self, ledger: &Arc<Ledger>) {
        if self.ledger.set(ledger.clone()).is_err() {
            return;
        }
        self.substitutes.lock().attach(ledger);
        self.node_ids.attach(ledger);
        for (ino, (real, shown)) in self.ctimes.lock().iter().rev() {
            ledger.put(Kind::Ctime, *ino, &encode(&(real, shown)));
        }
        let mut known = Vec::new();
        for shard in &self.shards {
            for entry in shard.lock().values() {
                if let TableEntry::Strong { inode, lookups } = entry {
                    known.push((inode.clone(), *lookups));
                }
            }
        }
        for (inode, lookups) in known {
            self.record_lookups(ledger, &inode, lookups);
            match held_ctime(&inode) {
                Some(held) => ledger.put(Kind::Ctime, inode.ino(), &encode(&held)),
                // The object has changed since.
                None => ledger.delete(Kind::Ctime, inode.ino()),
            }
            if is_nameless(&inode) {
                self.note_place(&inode);
            }
        }
    }

    /// Returns the ledger, if there is one.
    pub(crate) fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.ledger.get()
    }

    /// Adds to the lookup count of an inode, and records the inode if it is not recorded yet.
    pub(super) fn record_lookups(&self, ledger: &Ledger, inode: &Arc<Inode>, lookups: u32) {
        self.record_parents(ledger, inode);
        let mut shard = self.shard(inode.ino()).lock();
        let before = shard.remove(&inode.ino());
        if before.is_none() {
            self.count_known();
        }
        let recorded = match before {
            Some(TableEntry::Recorded { inode: held, block }) if Arc::ptr_eq(&held, inode) => {
                let count = ledger.count(block).saturating_add(lookups);
                ledger.set_count(block, count);
                Some(block)
            }
            Some(TableEntry::Faded { inode: held, block })
                if held.as_ptr() == Arc::as_ptr(inode) =>
            {
                ledger.set_count(block, lookups);
                Some(block)
            }
            other => {
                if let Some(stale) = other.as_ref().and_then(TableEntry::block) {
                    ledger.remove(stale);
                }
                add_block(ledger, inode, lookups)
            }
        };
        let entry = match recorded {
            Some(block) => TableEntry::Recorded {
                inode: inode.clone(),
                block,
            },
            // The ledger has been given up.
            None => TableEntry::Strong {
                inode: inode.clone(),
                lookups,
            },
        };
        shard.insert(inode.ino(), entry);
    }

    /// Records the directories to which the place of an inode refers, with those above.
    fn record_parents(&self, ledger: &Ledger, inode: &Arc<Inode>) {
        let mut missing = parents(inode);
        let mut found = Vec::new();
        while let Some(parent) = missing.pop() {
            let shard = self.shard(parent.ino()).lock();
            let entry = shard.get(&parent.ino());
            if entry.is_none_or(|entry| entry.block().is_none()) {
                drop(shard);
                missing.extend(parents(&parent));
                found.push(parent);
            }
        }
        // Those further up first: a block never refers to a directory that is not recorded.
        for parent in found.into_iter().rev() {
            let mut shard = self.shard(parent.ino()).lock();
            if let Some(entry @ TableEntry::Weak(_)) = shard.get_mut(&parent.ino())
                && let Some(block) = add_block(ledger, &parent, 0)
            {
                *entry = TableEntry::Faded {
                    inode: Arc::downgrade(&parent),
                    block,
                };
            }
        }
    }

    /// Records the place of an inode after its names or its location changed.
    pub(crate) fn note_place(&self, inode: &Arc<Inode>) {
        let Some(ledger) = self.ledger.get() else {
            return;
        };
        if let Some(descriptor) = nameless_descriptor(inode) {
            // The content of an open file without a name can move to a new layer.
            ledger.deposit(inode.ino(), &descriptor);
        }
        self.record_parents(ledger, inode);
        let mut shard = self.shard(inode.ino()).lock();
        let Some(TableEntry::Recorded { block, .. } | TableEntry::Faded { block, .. }) =
            shard.get_mut(&inode.ino())
        else {
            return;
        };
        match payload(inode) {
            Ok(payload) => *block = ledger.replace(*block, &payload),
            Err(error) => give_up(ledger, inode, error),
        }
    }

    /// Records the place that an object will have once its last name is removed, and keeps its descriptor.
    ///
    /// The caller must call it before the removal, and [`Self::note_removed_name`] after it.
    pub(crate) fn prepare_nameless(
        &self,
        inode: &Arc<Inode>,
        place: impl FnOnce() -> Result<Nameless>,
    ) {
        let Some(ledger) = self.ledger.get() else {
            return;
        };
        match place() {
            Ok(Nameless { place, descriptor }) => {
                if let Some(descriptor) = descriptor {
                    ledger.deposit(inode.ino(), &descriptor);
                }
                ledger.put(Kind::Nameless, inode.ino(), &encode(&place));
            }
            Err(error) => give_up(ledger, inode, error),
        }
    }

    /// Records the place of an object whose name was removed, or not, as its state shows.
    pub(crate) fn note_removed_name(&self, inode: &Arc<Inode>) {
        self.note_place(inode);
        if let Some(ledger) = self.ledger.get() {
            ledger.delete(Kind::Nameless, inode.ino());
        }
    }

    /// Removes the numbers from the ledger that were replaced with the stack, once the ledger has the new stack.
    pub(crate) fn drop_stale_numbers(&self) {
        self.substitutes.lock().drop_stale();
    }

    /// Records that an object shows these times during a copy-up; `None` once that has ended.
    pub(crate) fn note_copying(&self, inode: &Inode, shown: Option<CopyingTimes>) {
        match (self.ledger.get(), shown) {
            (Some(ledger), Some(shown)) => {
                ledger.put(Kind::Copying, inode.ino(), &encode(&shown));
            }
            (Some(ledger), None) => ledger.delete(Kind::Copying, inode.ino()),
            (None, _) => {}
        }
    }
}

/// The times of an object during a copy-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopyingTimes {
    /// The visible ctime.
    pub(crate) ctime: Time,
    /// The access and modification times of a directory in the upper layer that gets the name of a copy. They are
    /// restored on disk afterwards.
    pub(crate) restored: Option<(Time, Time)>,
}

/// The place of an object without a name.
pub(crate) struct Nameless {
    pub(crate) place: Place,
    pub(crate) descriptor: Option<Arc<OwnedFd>>,
}

impl Nameless {
    /// Returns the place of a directory that is about to be removed. `descriptor` is that of its topmost location, if
    /// that is in the upper layer.
    pub(crate) fn removed_dir(dir: &DirState, descriptor: Option<Arc<OwnedFd>>) -> Result<Self> {
        let mut locations = Vec::new();
        for (index, location) in dir.locs.iter().enumerate() {
            let layer = location.layer().id();
            locations.push(if index == 0 && descriptor.is_some() {
                DirPlace::Removed(layer, dir.identity, 0)
            } else {
                DirPlace::Path(layer, location.path_in_layer()?)
            });
        }
        let redirect = dir.redirect.as_ref().map(Redirect::to_value);
        let place = Place::RemovedDir {
            locations,
            redirect,
        };
        Ok(Self { place, descriptor })
    }

    /// Returns the place of an object in this state.
    pub(crate) fn of(state: InodeState, descriptor: Option<Arc<OwnedFd>>) -> Result<Self> {
        Ok(Self {
            place: Place::of_state(state, &mut Ids)?,
            descriptor,
        })
    }
}

/// Whether the object has no name any more, or none that is known.
fn is_nameless(inode: &Inode) -> bool {
    match &*inode.state.read() {
        InodeState::Dir(dir) => dir.removed,
        InodeState::File(file) => file.orphan || file.anchor.is_some(),
    }
}

/// Returns the descriptor by which an object without a name is accessed.
fn nameless_descriptor(inode: &Inode) -> Option<Arc<OwnedFd>> {
    match &*inode.state.read() {
        InodeState::Dir(dir) if dir.removed => dir.locs.first()?.removed_fd(),
        InodeState::Dir(_) => None,
        InodeState::File(file) => file.anchor.clone(),
    }
}

fn add_block(ledger: &Ledger, inode: &Arc<Inode>, lookups: u32) -> Option<Block> {
    match payload(inode) {
        Ok(payload) => ledger.add(Kind::Inode, inode.ino(), &payload, lookups),
        Err(error) => {
            give_up(ledger, inode, error);
            None
        }
    }
}

fn give_up(ledger: &Ledger, inode: &Inode, error: cowl_layers::error::Error) {
    ledger.give_up(&format!("cannot record inode {}: {error}", inode.ino()));
}

/// Returns the directories to which the place of an inode refers.
fn parents(inode: &Inode) -> Vec<Arc<Inode>> {
    match &*inode.state.read() {
        InodeState::Dir(dir) => dir.alias.iter().map(|one| one.parent.clone()).collect(),
        InodeState::File(file) => file.aliases.iter().map(|one| one.parent.clone()).collect(),
    }
}

impl InodeTable {
    /// Removes the block of an entry that is removed from the table.
    pub(super) fn remove_block(&self, entry: &TableEntry) {
        if let (Some(ledger), Some(block)) = (self.ledger.get(), entry.block()) {
            ledger.remove(block);
        }
    }
}

/// Removes an entry without an inode in this process, with its block.
pub(super) fn drop_entry(table: &InodeTable, shard: &mut Shard, ino: u64) {
    if let Some(removed) = shard.remove(&ino) {
        table.remove_block(&removed);
        table.known.fetch_sub(1, Ordering::Relaxed);
        table.dropped.fetch_add(1, Ordering::Relaxed);
    }
}
