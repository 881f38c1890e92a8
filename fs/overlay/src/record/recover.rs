//! From the ledger of a process that was killed to an overlay.
//!
//! Unlike a record, a ledger was not taken while no operation ran, and it can be large. So only a few objects are
//! located before the first request, with everything that is known about them; all others are when they are first used.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::layer::Layer;
use cowl_layers::layer::Upper;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::points::point;
use cowl_layers::view::View;

use super::RecordError;
use super::rebuild::{Parts, assemble};
use super::search::{Outcome, Search};
use super::sorted::{Sorted, renames};
use crate::content::{FileHandle, FileRecord};
use crate::inode::{
    Inode, InodeTable, NodeIdsRecord, Unlocated, adopt, continue_numbers, encode, held_ctime,
    restore_node_ids,
};
use crate::ledger::{Custodian, Kind, Ledger, LedgerContent, LedgerError, StackIds, Word};
use crate::overlay::Overlay;
use crate::reach::{OverlayOptions, restore_capabilities};

/// The ledger of a process that has ended.
#[derive(Debug)]
pub struct Estate {
    content: LedgerContent,
    stack: StackIds,
}

/// The parts that a successor needs beside the ledger.
#[derive(Debug)]
pub struct Inheritance {
    /// The layers in the order of [`StackIds::layers`].
    pub layers: Vec<Arc<Layer>>,
    /// The upper layer.
    pub upper: Option<Arc<Upper>>,
    /// The descriptors in custody, by the numbers of their inodes.
    pub descriptors: HashMap<u64, Arc<OwnedFd>>,
    /// The locks of the layers in the stack.
    pub locks: Vec<Arc<LayerLock>>,
    /// The layers that are in use although they are not in the stack any more, or not yet, with their locks.
    pub retained: Vec<(Arc<Layer>, Arc<LayerLock>)>,
    /// The options of the mount.
    pub options: OverlayOptions,
}

/// An overlay that continues the one of a process that was killed.
#[derive(Debug)]
pub struct Recovered {
    /// The overlay, which continues the ledger.
    pub overlay: Overlay,
    /// The values of [`Kind::Handle`], by key.
    pub handles: Vec<(u64, Vec<u8>)>,
    /// The values of [`Kind::Backing`], by key.
    pub backing: Vec<(u64, Vec<u8>)>,
    /// The number of known inodes that were not found.
    pub lost: usize,
}

impl Estate {
    /// Reads a ledger, whose process has ended, and repairs what the end has interrupted.
    pub fn read(ledger: OwnedFd) -> Result<Self, LedgerError> {
        let content = LedgerContent::read(ledger)?;
        let stack = content.value(Kind::Stack, 0);
        let stack = stack.and_then(|found| postcard::from_bytes::<StackIds>(&found.payload).ok());
        let stack = stack.filter(|stack| {
            let named = stack.stack.checked_add(stack.data_only);
            named.is_some_and(|named| named <= stack.layers.len())
        });
        let stack = stack.ok_or(LedgerError::Damaged)?;
        Ok(Self { content, stack })
    }

    /// Whether the process of a ledger answered a request.
    pub fn has_answered(ledger: OwnedFd) -> Result<bool, LedgerError> {
        LedgerContent::word_of(ledger, Word::Answered).map(|word| word != 0)
    }

    /// Returns the layers of the mount.
    pub fn layers(&self) -> &StackIds {
        &self.stack
    }
}

impl Overlay {
    /// Records the state, and every change from now on, in a ledger. No operation may run meanwhile.
    pub fn attach(&self, ledger: &Arc<Ledger>) {
        self.inodes.attach(ledger);
        self.cookies.attach(ledger);
        self.note_stack(&self.stack.read());
        ledger.retain(std::mem::take(&mut *self.unanswered.lock()));
    }

    /// Creates an overlay that answers everything as the one of a process that was killed. It continues its ledger.
    ///
    /// Most objects are located when they are first used; see [`Self::locate_all`].
    pub fn recover(
        from: Estate,
        with: Inheritance,
        custodian: Arc<dyn Custodian>,
    ) -> Result<Recovered, RecordError> {
        point("before a recovery");
        let Estate { mut content, stack } = from;
        let ids = with.layers.iter().map(|layer| layer.id());
        if !ids.eq(stack.layers.iter().copied()) || stack.has_upper != with.upper.is_some() {
            return Err(RecordError::Layers);
        }
        let (own, others) = with.layers.split_at(stack.stack);
        let data = others.get(..stack.data_only).unwrap_or_default();
        let view = View::new(own.to_vec()).with_data_layers(data.to_vec());
        let damaged = RecordError::Damaged("a value of the ledger");
        let Some(mut sorted) = Sorted::new(&content) else {
            return Err(damaged);
        };
        let pushes = u32::try_from(content.word(Word::Pushes)).unwrap_or(0);
        let renames = renames(&content);
        let blocks = std::mem::take(&mut content.inodes);
        let ledger = Arc::new(content.into_ledger(custodian, with.descriptors.keys().copied()));
        let node_ids = std::mem::take(&mut sorted.table.node_ids);
        let table = InodeTable::from_record(&sorted.table, &HashMap::new(), &[]);
        let mut table = table.ok_or(RecordError::Damaged("it has no inodes"))?;
        adopt(&mut table, &ledger, &blocks);
        drop(blocks);
        let others = with.retained.iter().map(|(layer, _)| layer);
        let layers = with.layers.iter().chain(others);
        let mut search = Search {
            view: &view,
            upper: with.upper.as_ref().map(|upper| upper.layer.id()),
            layers: layers.map(|layer| (layer.id(), layer.clone())).collect(),
            descriptors: &with.descriptors,
            table: Unlocated::of(&table),
            sorted: &sorted,
            renames,
            found: Outcome::default(),
        };
        for ino in &sorted.eager {
            search.build(*ino)?;
        }
        let found = search.found;
        retain_node_ids(&mut table, node_ids, &found.built, &ledger)?;
        let overlay = assemble(Parts {
            view,
            upper: with.upper,
            options: with.options,
            inodes: table,
            moved: (Vec::new(), false),
            pushes,
            cookies: &sorted.cookies,
            passthrough_writers: 0,
            locks: with.locks,
            retained: with.retained,
            // They are in the ledger.
            unanswered: Vec::new(),
        })?;
        point("in a recovery");
        continue_ledger(&overlay, &ledger, &sorted, &found);
        for (ino, capabilities) in &sorted.capabilities {
            let inode = overlay.inodes.get(*ino);
            if let Some(Err(error)) = inode.map(|inode| restore_capabilities(&inode, capabilities))
            {
                log::error!("cannot restore the capabilities of inode {ino}: {error}");
            }
            ledger.delete(Kind::Capabilities, *ino);
        }
        for number in with.descriptors.keys() {
            if overlay.inodes.get(*number).is_none() {
                ledger.release(*number);
            }
        }
        Ok(Recovered {
            overlay,
            handles: sorted.handles,
            backing: sorted.backing,
            lost: found.missing.len(),
        })
    }

    /// Returns the value that [`FileHandle::to_ledger`] of the predecessor returned as an open file.
    pub fn reopen(&self, value: &[u8]) -> Option<Arc<FileHandle>> {
        let record: FileRecord = postcard::from_bytes(value).ok()?;
        let inode = self.begin().inode(record.ino);
        let inode = inode
            .inspect_err(|error| log::warn!("cannot find inode {} again: {error}", record.ino))
            .ok()?;
        if inode.is_dir() {
            return None;
        }
        // Whether the content was in the upper layer of the present stack is not known, so it is copied up again at
        // the next write, which has no effect if it is.
        let record = record.before_push(self.opens.record());
        Some(FileHandle::from_record(
            &record,
            &inode,
            &self.opens,
            &self.descriptors,
        ))
    }
}

impl FileHandle {
    /// Returns the value of an open file in the ledger.
    pub fn to_ledger(&self) -> Vec<u8> {
        encode(&self.record())
    }
}

/// Records in the ledger what was found out about inodes: where they are, and their ctimes.
fn continue_ledger(overlay: &Overlay, ledger: &Arc<Ledger>, sorted: &Sorted, found: &Outcome) {
    continue_numbers(&overlay.inodes);
    overlay.cookies.attach(ledger);
    overlay.note_stack(&overlay.stack.read());
    for inode in found.built.values() {
        overlay.inodes.note_place(inode);
        if let Some(held) = held_ctime(inode) {
            ledger.put(Kind::Ctime, inode.ino(), &encode(&held));
        }
    }
    // From here on, the places and ctimes above replace these.
    let values = (sorted.nameless.keys().map(|ino| (Kind::Nameless, *ino)))
        .chain(sorted.copying.keys().map(|ino| (Kind::Copying, *ino)));
    for (kind, ino) in values.filter(|(_, ino)| !found.failed.contains(ino)) {
        ledger.delete(kind, ino);
    }
}

/// Restores the node ids of the inodes that were found, and removes all others.
fn retain_node_ids(
    table: &mut InodeTable,
    mut record: NodeIdsRecord,
    built: &HashMap<u64, Arc<Inode>>,
    ledger: &Ledger,
) -> Result<(), RecordError> {
    record.inodes.retain(|node_id, (ino, _)| {
        let is_found = built.contains_key(ino);
        if !is_found {
            ledger.delete(Kind::NodeId, *node_id);
        }
        is_found
    });
    record.newest.retain(|ino, _| built.contains_key(ino));
    let unknown = RecordError::Damaged("a node id refers to no inode");
    restore_node_ids(table, &record, built).ok_or(unknown)
}
