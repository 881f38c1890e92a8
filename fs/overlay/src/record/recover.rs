//! From the ledger of a process that was killed to an overlay.
//!
//! Unlike a record, a ledger was not taken while no operation ran: a change may have been committed in the layers but
//! not recorded, or the other way round. So each object is searched at all places where it can be, and is recognized
//! by its visible number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use cowl_layers::error::{Error, Result as LayerResult};
use cowl_layers::layer::Layer;
use cowl_layers::layer::Upper;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::points::point;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_layers::view::{Found as FoundObject, View};
use smallvec::smallvec;

use super::RecordError;
use super::rebuild::{Builder, Parts, assemble};
use crate::content::{FileHandle, FileRecord};
use crate::inode::{
    Alias, CopyingTimes, DirState, EntryName, FileState, Identity, Inode, InodeBlock, InodeRecord,
    InodeState, NodeIdValue, NumberValue, Place, Substitutes, SubstitutesRecord, TableRecord,
    encode,
};
use crate::ledger::{Change, Kind, Ledger, LedgerContent, LedgerError, StackIds, Word};
use crate::listing::CookiesRecord;
use crate::overlay::Overlay;
use crate::reach::OverlayOptions;

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
    /// The overlay, which is attached to a new ledger.
    pub overlay: Overlay,
    /// The values of [`Kind::Handle`], by key.
    pub handles: Vec<(u64, Vec<u8>)>,
    /// The values of [`Kind::Backing`], by key.
    pub backing: Vec<(u64, Vec<u8>)>,
    /// The number of known inodes that were not found.
    pub lost: usize,
}

impl Estate {
    /// Reads a ledger.
    pub fn read(ledger: OwnedFd) -> Result<Self, LedgerError> {
        let content = LedgerContent::read(ledger)?;
        let stack = content
            .blocks
            .iter()
            .find(|found| found.kind == Kind::Stack as u8);
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

    /// Creates an overlay that answers everything as the one of a process that was killed.
    pub fn recover(
        from: Estate,
        with: Inheritance,
        ledger: &Arc<Ledger>,
    ) -> Result<Recovered, RecordError> {
        point("before a recovery");
        let Estate { content, stack } = from;
        let ids = with.layers.iter().map(|layer| layer.id());
        if !ids.eq(stack.layers.iter().copied()) || stack.has_upper != with.upper.is_some() {
            return Err(RecordError::Layers);
        }
        let (own, others) = with.layers.split_at(stack.stack);
        let data = others.get(..stack.data_only).unwrap_or_default();
        let view = View::new(own.to_vec()).with_data_layers(data.to_vec());
        let mut sorted =
            Sorted::new(&content).ok_or(RecordError::Damaged("a value of the ledger"))?;
        let substitutes = Substitutes::from_record(&sorted.table.substitutes);
        let others = with.retained.iter().map(|(layer, _)| layer);
        let layers = with.layers.iter().chain(others);
        let layers = layers.map(|layer| (layer.id(), layer.clone()));
        let mut search = Search {
            view: &view,
            upper: with.upper.as_ref().map(|upper| upper.layer.id()),
            layers: layers.collect(),
            descriptors: &with.descriptors,
            substitutes: &substitutes,
            sorted: &sorted,
            renames: renames(&content),
            built: HashMap::new(),
            missing: HashSet::new(),
            records: Vec::new(),
        };
        for (ino, block) in &sorted.inodes {
            if block.lookups > 0 || sorted.opened.contains(ino) {
                search.build(*ino);
            }
        }
        let Search {
            built,
            missing,
            records,
            ..
        } = search;
        let mut table = std::mem::take(&mut sorted.table);
        table
            .node_ids
            .inodes
            .retain(|_, (ino, _)| built.contains_key(ino));
        table
            .node_ids
            .newest
            .retain(|ino, _| built.contains_key(ino));
        let overlay = assemble(Parts {
            view,
            upper: with.upper,
            options: with.options,
            built,
            records: &records,
            table: &table,
            moved: (Vec::new(), false),
            pushes: u32::try_from(content.word(Word::Pushes)).unwrap_or(0),
            cookies: &sorted.cookies,
            passthrough_writers: 0,
            locks: with.locks,
            retained: with.retained,
            unanswered: content.slots,
        })?;
        point("in a recovery");
        overlay.attach(ledger);
        Ok(Recovered {
            overlay,
            handles: sorted.handles,
            backing: sorted.backing,
            lost: missing.len(),
        })
    }

    /// Returns the value that [`FileHandle::to_ledger`] of the predecessor returned as an open file.
    pub fn reopen(&self, value: &[u8]) -> Option<Arc<FileHandle>> {
        let record: FileRecord = postcard::from_bytes(value).ok()?;
        let inode = self.inodes.get(record.ino)?;
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

/// The values of a ledger, by type.
#[derive(Default)]
struct Sorted {
    inodes: BTreeMap<u64, InodeBlock>,
    nameless: HashMap<u64, Place>,
    ctimes: HashMap<u64, (Time, Time)>,
    copying: HashMap<u64, CopyingTimes>,
    table: TableRecord,
    cookies: CookiesRecord,
    handles: Vec<(u64, Vec<u8>)>,
    backing: Vec<(u64, Vec<u8>)>,
    /// The inodes to which node ids refer.
    opened: HashSet<u64>,
}

impl Sorted {
    /// Decodes the values; `None` if one is damaged.
    fn new(content: &LedgerContent) -> Option<Self> {
        let mut sorted = Self::default();
        let mut substitutes = SubstitutesRecord {
            assigned: content.word(Word::Substitutes),
            is_reused: content.word(Word::Reused) != 0,
            ..SubstitutesRecord::default()
        };
        sorted.table.node_ids.assigned = content.word(Word::NodeIds);
        sorted.cookies.key = [content.word(Word::Key0), content.word(Word::Key1)];
        for found in &content.blocks {
            let (key, bytes) = (found.key, &*found.payload);
            match Kind::from_number(found.kind)? {
                Kind::Inode => {
                    let block = InodeBlock::decode(found)?;
                    // A block that replaced another one at the moment of the end has the same content.
                    let known = sorted.inodes.get(&key).map_or(0, |known| known.lookups);
                    if block.lookups >= known {
                        sorted.inodes.insert(key, block);
                    }
                }
                Kind::Number => {
                    let NumberValue { dev, ino, number } = postcard::from_bytes(bytes).ok()?;
                    substitutes.numbers.insert(Identity { dev, ino }, number);
                }
                Kind::NodeId => {
                    let value: NodeIdValue = postcard::from_bytes(bytes).ok()?;
                    let ids = &mut sorted.table.node_ids;
                    ids.inodes.insert(key, (value.ino, value.lookups));
                    if value.is_newest {
                        ids.newest.insert(value.ino, key);
                    }
                    sorted.opened.insert(value.ino);
                }
                Kind::Ctime => {
                    let times = postcard::from_bytes(bytes).ok()?;
                    sorted.ctimes.insert(key, times);
                }
                Kind::Copying => {
                    sorted
                        .copying
                        .insert(key, postcard::from_bytes(bytes).ok()?);
                }
                Kind::Nameless => {
                    sorted
                        .nameless
                        .insert(key, postcard::from_bytes(bytes).ok()?);
                }
                Kind::Collision => {
                    let (place, names) = postcard::from_bytes(bytes).ok()?;
                    sorted.cookies.names.insert(place, names);
                }
                Kind::Handle => sorted.handles.push((key, bytes.to_vec())),
                Kind::Backing => sorted.backing.push((key, bytes.to_vec())),
                Kind::Stack => {}
            }
        }
        let held = |(ino, (real, shown)): (&u64, &(Time, Time))| (*ino, *real, *shown);
        sorted.table.ctimes = sorted.ctimes.iter().map(held).collect();
        sorted.table.substitutes = substitutes;
        Some(sorted)
    }
}

/// Returns the names that a rename in progress may have given to objects: from the number of the object, and from the
/// name that it had.
fn renames(content: &LedgerContent) -> Renames {
    let mut renames = Renames::default();
    for slot in &content.slots {
        let from = (slot.parents.0, slot.names.0.clone());
        let to = (slot.parents.1, slot.names.1.clone());
        match slot.change {
            Some(Change::Rename) => {
                renames.of_objects.insert(slot.object, to);
            }
            Some(Change::Exchange) => {
                renames.of_names.insert(to.clone(), from);
                renames.of_objects.insert(slot.object, to);
            }
            _ => {}
        }
    }
    renames
}

#[derive(Default)]
struct Renames {
    of_objects: HashMap<u64, EntryName>,
    of_names: HashMap<EntryName, EntryName>,
}

/// The search for the objects of the inodes.
struct Search<'r> {
    view: &'r View,
    /// The id of the upper layer.
    upper: Option<u64>,
    layers: HashMap<u64, Arc<Layer>>,
    descriptors: &'r HashMap<u64, Arc<OwnedFd>>,
    substitutes: &'r Substitutes,
    sorted: &'r Sorted,
    renames: Renames,
    built: HashMap<u64, Arc<Inode>>,
    /// The inodes that were not found.
    missing: HashSet<u64>,
    records: Vec<InodeRecord>,
}

impl Search<'_> {
    /// Creates an inode after those to which its places refer.
    fn build(&mut self, ino: u64) {
        // Without recursion, which would overflow the stack in a deep tree.
        let mut pending = vec![ino];
        while let Some(ino) = pending.last().copied() {
            if self.is_known(ino) {
                pending.pop();
                continue;
            }
            let places = self.places(ino);
            let unknown = places
                .iter()
                .flat_map(names_of)
                .map(|(parent, _)| *parent)
                .find(|parent| !self.is_known(*parent) && !pending.contains(parent));
            if let Some(parent) = unknown {
                pending.push(parent);
                continue;
            }
            pending.pop();
            match self.find(ino, &places) {
                Ok(Some((state, record))) => {
                    self.built.insert(ino, Inode::from_record(&record, state));
                    self.records.push(record);
                }
                Ok(None) => {
                    self.missing.insert(ino);
                }
                Err(error) => {
                    log::warn!("cannot find inode {ino} again: {error}");
                    self.missing.insert(ino);
                }
            }
        }
    }

    fn is_known(&self, ino: u64) -> bool {
        self.built.contains_key(&ino) || self.missing.contains(&ino)
    }

    /// Returns the places at which an object can be, the most likely one first.
    fn places(&self, ino: u64) -> Vec<Place> {
        let Some(block) = self.sorted.inodes.get(&ino) else {
            return Vec::new();
        };
        let mut places = vec![block.place.clone()];
        let mut also = |name: EntryName| {
            places.push(if block.is_dir {
                Place::Dir(name)
            } else {
                Place::File(vec![name])
            });
        };
        if let Some(name) = self.renames.of_objects.get(&ino) {
            also(name.clone());
        }
        for name in names_of(&block.place) {
            if let Some(other) = self.renames.of_names.get(name) {
                also(other.clone());
            }
        }
        places.extend(self.sorted.nameless.get(&ino).cloned());
        places
    }

    /// Searches an object at these places.
    fn find(&self, ino: u64, places: &[Place]) -> LayerResult<Option<(InodeState, InodeRecord)>> {
        let mut names = Vec::new();
        for place in places {
            let found = match place {
                Place::Root => self.root()?,
                Place::Dir(name) => self.at_name(ino, name)?,
                Place::File(of_file) => {
                    let mut found = None;
                    for name in of_file {
                        if let Some(at) = self.at_name(ino, name)? {
                            names.push(name.clone());
                            found.get_or_insert(at);
                        }
                    }
                    found
                }
                Place::RemovedDir { .. } | Place::Nameless(_) => self.without_name(ino, place)?,
            };
            if let Some((mut state, kind, identity, mut ctime)) = found {
                if let Some(restored) = self.restore_times(ino, &state)? {
                    ctime = restored;
                }
                if let InodeState::File(file) = &mut state {
                    for name in names.iter().skip(1) {
                        file.aliases.push(self.alias(name)?);
                    }
                }
                return Ok(Some((state, self.record(ino, kind, identity, ctime))));
            }
        }
        Ok(None)
    }

    fn record(&self, ino: u64, kind: FileKind, identity: Identity, ctime: Time) -> InodeRecord {
        let block = self.sorted.inodes.get(&ino);
        let during_copy = self
            .sorted
            .copying
            .get(&ino)
            .map(|shown| (ctime, shown.ctime));
        let held = during_copy.or_else(|| self.sorted.ctimes.get(&ino).copied());
        InodeRecord::recovered(
            (ino, identity, kind),
            block.map_or(0, |block| block.lookups),
            block.map_or(0, |block| block.version),
            held,
        )
    }

    /// Restores the times of a directory that got the name of a copy. Returns the resulting ctime on disk; `None` if
    /// there is nothing to restore.
    fn restore_times(&self, ino: u64, state: &InodeState) -> LayerResult<Option<Time>> {
        let copying = self.sorted.copying.get(&ino);
        let Some((atime, mtime)) = copying.and_then(|times| times.restored) else {
            return Ok(None);
        };
        let InodeState::Dir(dir) = state else {
            return Ok(None);
        };
        let Some(top) = dir
            .locs
            .first()
            .filter(|top| self.upper == Some(top.layer().id()))
        else {
            return Ok(None);
        };
        let fd = top.fd()?;
        sys::attr::utimens(fd.as_fd(), SetTime::At(atime), SetTime::At(mtime))?;
        Ok(Some(sys::stat::stat_fd(&*fd)?.ctime))
    }

    fn root(&self) -> LayerResult<Option<FoundState>> {
        let node = self.view.root()?;
        let identity = Identity::from_stat(&node.stat);
        let state = InodeState::Dir(DirState {
            locs: node.locs.into(),
            redirect: None,
            alias: None,
            removed: false,
            identity,
        });
        Ok(Some((
            state,
            FileKind::Directory,
            identity,
            node.stat.ctime,
        )))
    }

    /// Returns the object with the number `ino` at this name.
    fn at_name(&self, ino: u64, name: &EntryName) -> LayerResult<Option<FoundState>> {
        let Ok(alias) = self.alias(name) else {
            return Ok(None);
        };
        let Some(locations) = alias.parent.locations()? else {
            return Ok(None);
        };
        let found = self.view.lookup_at(&locations, &alias.name, None)?;
        let is_it = |own: u64, identity: Identity| self.substitutes.may_be(identity, own, ino);
        Ok(match found {
            FoundObject::Absent | FoundObject::Whiteout => None,
            FoundObject::Dir(node) => {
                let identity = Identity::from_stat(&node.stat);
                if !is_it(node.ino, identity) {
                    return Ok(None);
                }
                let state = InodeState::Dir(DirState {
                    locs: node.locs.into(),
                    redirect: node.redirect,
                    alias: Some(alias),
                    removed: false,
                    identity,
                });
                Some((state, FileKind::Directory, identity, node.stat.ctime))
            }
            FoundObject::File(node) => {
                let identity = Identity::from_stat(&node.stat);
                if !is_it(node.ino, identity) {
                    return Ok(None);
                }
                let state = InodeState::File(FileState {
                    loc: node.loc,
                    data: node.data.map(Box::new),
                    redirect: node.redirect.map(Box::new),
                    aliases: smallvec![alias],
                    orphan: false,
                    anchor: None,
                    visible: None,
                    identity,
                });
                Some((state, node.stat.kind(), identity, node.stat.ctime))
            }
        })
    }

    /// Returns the object at a place without a name.
    fn without_name(&self, ino: u64, place: &Place) -> LayerResult<Option<FoundState>> {
        let descriptor = self.descriptors.get(&ino).cloned();
        let builder = Builder {
            view: self.view,
            layers: &self.layers,
            descriptors: descriptor.as_slice(),
            built: &self.built,
        };
        let state = builder.nameless_state(place)?;
        let stat = match &state {
            InodeState::Dir(dir) => match dir.locs.first() {
                Some(location) => sys::stat::stat_fd(&*location.fd()?)?,
                None => return Ok(None),
            },
            InodeState::File(file) => match &file.anchor {
                Some(anchor) => sys::stat::stat_fd(&**anchor)?,
                None => file.loc.stat()?,
            },
        };
        let identity = Identity::from_stat(&stat);
        let state = match state {
            InodeState::Dir(dir) => InodeState::Dir(DirState { identity, ..dir }),
            InodeState::File(file) => InodeState::File(FileState { identity, ..file }),
        };
        Ok(Some((state, stat.kind(), identity, stat.ctime)))
    }

    fn alias(&self, (parent, name): &EntryName) -> LayerResult<Alias> {
        let parent = self.built.get(parent).filter(|parent| parent.is_dir());
        let parent = parent.ok_or(Error::NOT_FOUND)?;
        Ok(Alias {
            parent: parent.clone(),
            name: cowl_layers::name::Name::new(name)?,
        })
    }
}

/// The state of an object that was found, its type and identity, and its ctime on disk.
type FoundState = (InodeState, FileKind, Identity, Time);

fn names_of(place: &Place) -> &[EntryName] {
    match place {
        Place::Dir(name) => std::slice::from_ref(name),
        Place::File(names) => names,
        Place::Nameless(file) => &file.names,
        Place::Root | Place::RemovedDir { .. } => &[],
    }
}
