//! From a record to an overlay.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use cowl_layers::error::{Errno, Error, Result as LayerResult};
use cowl_layers::format::Redirect;
use cowl_layers::layer::lock::LayerLock;
use cowl_layers::layer::{Layer, LayerDir, Markers, Upper, probe};
use cowl_layers::locks::{Mutex, RwLock};
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::{Found, Loc, View};
use smallvec::smallvec;

use super::descriptors::verify_descriptors;
use super::format::Record;
use super::{Handover, Rebuilt, RecordError};
use crate::content::{ContentDescriptors, FileHandle, OpenCounts};
use crate::inode::{
    Alias, DirPlace, DirState, EntryName, FileState, Identity, Inode, InodeRecord, InodeState,
    InodeTable, NamelessFile, ObjectPlace, Place,
};
use crate::ledger::FoundSlot;
use crate::listing::{Cookies, CookiesRecord, Listings, Walk};
use crate::names::LinkIndex;
use crate::names::absent::LastAbsent;
use crate::names::deep::DeepDirs;
use crate::names::dir_state;
use crate::names::prefetched::Prefetched;
use crate::overlay::Overlay;
use crate::reach::{OverlayOptions, Stack};

impl Overlay {
    /// Creates an overlay that answers everything as the recorded one.
    ///
    /// Each object must be where the record says; otherwise nothing is created, and the recorded overlay can continue.
    pub fn rebuild(from: Handover) -> Result<Rebuilt, RecordError> {
        let record = Record::decode(&from.record)?;
        verify_descriptors(&record, &from.descriptors)?;
        let ids = from.layers.iter().map(|layer| layer.id());
        if !ids.eq(record.layers.iter().copied()) || record.has_upper != from.upper.is_some() {
            return Err(RecordError::Layers);
        }
        let (stack, others) = from.layers.split_at(record.stack);
        let data = others.get(..record.data_only).unwrap_or_default();
        let view = View::new(stack.to_vec()).with_data_layers(data.to_vec());
        let layers = (0..).zip(from.layers.iter().cloned()).collect();
        let mut inodes = Inodes {
            view: &view,
            layers: &layers,
            descriptors: &from.descriptors,
            records: (record.inodes.iter())
                .zip(&record.places)
                .map(|(inode, place)| (inode.ino, (inode, place)))
                .collect(),
            built: HashMap::new(),
        };
        if inodes.records.len() < record.inodes.len() {
            return Err(RecordError::Damaged("two inodes have one number"));
        }
        for inode in &record.inodes {
            inodes.build(inode.ino)?;
        }
        let built = inodes.built;
        let find = |ino: u64| built.get(&ino).cloned();
        let moved = record.moved.0.iter().map(|ino| find(*ino)).collect();
        let Some(moved) = moved else {
            return Err(UNKNOWN);
        };
        let inodes = InodeTable::from_record(&record.table, &built, &record.inodes);
        let overlay = assemble(Parts {
            view,
            upper: from.upper,
            options: from.options,
            inodes: inodes.ok_or(UNKNOWN)?,
            moved: (moved, record.moved.1),
            pushes: record.pushes,
            cookies: &record.cookies,
            passthrough_writers: record.passthrough_writers,
            locks: from.locks,
            retained: from.retained,
            unanswered: record.unanswered,
        })?;
        let mut files = HashMap::new();
        for (number, file) in &record.files {
            let inode = overlay.inodes.get(file.ino).filter(|inode| !inode.is_dir());
            let inode = inode.ok_or(RecordError::Damaged("an open file has no inode"))?;
            let handle =
                FileHandle::from_record(file, &inode, &overlay.opens, &overlay.descriptors);
            files.insert(*number, handle);
        }
        for (ino, errno, count) in &record.writeback_errors {
            if let Some(inode) = overlay.inodes.get(*ino) {
                overlay
                    .descriptors
                    .restore_writeback_error(&inode, (*errno, *count));
            }
        }
        Ok(Rebuilt { overlay, files })
    }
}

const UNKNOWN: RecordError = RecordError::Damaged("it refers to an inode that it does not contain");

/// The parts of an overlay.
pub(super) struct Parts<'r> {
    pub(super) view: View,
    pub(super) upper: Option<Arc<Upper>>,
    pub(super) options: OverlayOptions,
    pub(super) inodes: InodeTable,
    pub(super) moved: (Vec<Arc<Inode>>, bool),
    pub(super) pushes: u32,
    pub(super) cookies: &'r CookiesRecord,
    pub(super) passthrough_writers: u32,
    pub(super) locks: Vec<Arc<LayerLock>>,
    pub(super) retained: Vec<(Arc<Layer>, Arc<LayerLock>)>,
    pub(super) unanswered: Vec<FoundSlot>,
}

/// Creates an overlay from its parts.
pub(super) fn assemble(parts: Parts<'_>) -> Result<Overlay, RecordError> {
    let root = parts.inodes.get(1);
    let root = root.ok_or(RecordError::Damaged("it has no root directory"))?;
    let cookies = Cookies::from_record(parts.cookies)
        .map_err(|_| RecordError::Damaged("a name in a listing is invalid"))?;
    Ok(Overlay {
        stack: RwLock::new(Stack::new(parts.view, parts.upper)),
        options: parts.options,
        inodes: parts.inodes,
        root,
        links: LinkIndex::from_record(parts.moved.0, parts.moved.1),
        cookies,
        listings: Listings::default(),
        deep: DeepDirs::default(),
        absent: LastAbsent::default(),
        prefetched: Prefetched::default(),
        walk: Walk::default(),
        opens: OpenCounts::from_record(parts.pushes),
        descriptors: ContentDescriptors::new(),
        passthrough_writers: Arc::new(AtomicU32::new(parts.passthrough_writers)),
        undoing: Arc::default(),
        locks: Mutex::new(parts.locks),
        retained: Mutex::new(parts.retained),
        unanswered: Mutex::new(parts.unanswered),
    })
}

/// Creates inodes, each one after its parent directories.
struct Inodes<'r> {
    view: &'r View,
    layers: &'r HashMap<u64, Arc<Layer>>,
    descriptors: &'r [Arc<OwnedFd>],
    records: HashMap<u64, (&'r InodeRecord, &'r Place)>,
    built: HashMap<u64, Arc<Inode>>,
}

impl Inodes<'_> {
    fn build(&mut self, ino: u64) -> Result<(), RecordError> {
        // Without recursion, which would overflow the stack in a deep tree.
        let mut pending = vec![ino];
        while let Some(ino) = pending.last().copied() {
            if self.built.contains_key(&ino) {
                pending.pop();
                continue;
            }
            let Some((record, place)) = self.records.get(&ino).copied() else {
                return Err(RecordError::Damaged("a parent directory is missing"));
            };
            let mut parents = place.names().iter().map(|(parent, _)| *parent);
            let missing = parents.find(|parent| !self.built.contains_key(parent));
            if let Some(parent) = missing {
                if pending.len() > self.records.len() {
                    return Err(RecordError::Damaged("a directory is inside itself"));
                }
                pending.push(parent);
                continue;
            }
            let builder = Builder {
                view: self.view,
                layers: self.layers,
                descriptors: self.descriptors,
                built: &self.built,
            };
            let state = builder
                .state(record, place)
                .map_err(|error| RecordError::Inode { ino, error })?;
            self.built.insert(ino, Inode::from_record(record, state));
        }
        Ok(())
    }
}

/// Finds objects in the layers.
pub(super) struct Builder<'r> {
    pub(super) view: &'r View,
    /// The layers, by the numbers in the places.
    pub(super) layers: &'r HashMap<u64, Arc<Layer>>,
    pub(super) descriptors: &'r [Arc<OwnedFd>],
    pub(super) built: &'r HashMap<u64, Arc<Inode>>,
}

impl Builder<'_> {
    /// Returns the state of an object without a name. Its identity is not known.
    pub(super) fn nameless_state(&self, place: &Place) -> LayerResult<InodeState> {
        let identity = Identity { dev: 0, ino: 0 };
        match place {
            Place::RemovedDir {
                locations,
                redirect,
            } => self.removed_dir(identity, locations, redirect.as_deref()),
            Place::Nameless(file) => self.nameless(identity, file),
            _ => Err(Error::Damaged("an inode record of another type")),
        }
    }

    fn state(&self, record: &InodeRecord, place: &Place) -> LayerResult<InodeState> {
        let is_dir = record.kind == FileKind::Directory;
        match place {
            Place::Root if is_dir => self.root(record),
            Place::Dir(name) if is_dir => self.dir(record, name),
            Place::RemovedDir {
                locations,
                redirect,
            } if is_dir => self.removed_dir(record.identity, locations, redirect.as_deref()),
            Place::File(names) if !is_dir => self.file(record, names),
            Place::Nameless(file) if !is_dir => self.nameless(record.identity, file),
            _ => Err(Error::Damaged("an inode record of another type")),
        }
    }

    fn root(&self, record: &InodeRecord) -> LayerResult<InodeState> {
        let node = self.view.root()?;
        same_object(record, Identity::from_stat(&node.stat))?;
        Ok(InodeState::Dir(DirState::root(node)))
    }

    fn dir(&self, record: &InodeRecord, name: &EntryName) -> LayerResult<InodeState> {
        let alias = self.alias(name)?;
        let Found::Dir(node) = self.look_up(&alias)? else {
            return Err(Error::Errno(Errno::STALE));
        };
        same_object(record, Identity::from_stat(&node.stat))?;
        Ok(dir_state(node, alias))
    }

    fn removed_dir(
        &self,
        identity: Identity,
        locations: &[DirPlace],
        redirect: Option<&[u8]>,
    ) -> LayerResult<InodeState> {
        let locs: LayerResult<Vec<_>> = locations.iter().map(|dir| self.dir_at(dir)).collect();
        Ok(InodeState::Dir(DirState {
            locs: locs?.into(),
            redirect: redirect.map(Redirect::parse).transpose()?,
            alias: None,
            removed: true,
            identity,
        }))
    }

    fn file(&self, record: &InodeRecord, names: &[EntryName]) -> LayerResult<InodeState> {
        let mut found = None;
        let mut aliases = smallvec![];
        for name in names {
            let alias = self.alias(name)?;
            if found.is_none()
                && let Found::File(node) = self.look_up(&alias)?
                && Identity::from_stat(&node.stat) == record.identity
            {
                found = Some(node);
            }
            aliases.push(alias);
        }
        let node = found.ok_or(Error::Errno(Errno::STALE))?;
        Ok(InodeState::File(FileState {
            loc: node.loc,
            data: node.data.map(Box::new),
            redirect: node.redirect.map(Box::new),
            aliases,
            orphan: false,
            anchor: None,
            visible: None,
            identity: record.identity,
        }))
    }

    fn nameless(&self, identity: Identity, file: &NamelessFile) -> LayerResult<InodeState> {
        let names = file.names.iter().map(|name| self.alias(name));
        let data = file.data.as_ref().map(|data| self.object_at(data));
        let redirect = file.redirect.as_deref().map(Redirect::parse);
        let anchor = file.descriptor.map(|index| self.descriptor(index));
        let state = FileState {
            loc: self.object_at(&file.object)?,
            data: data.transpose()?.map(Box::new),
            redirect: redirect.transpose()?.map(Box::new),
            aliases: names.collect::<LayerResult<_>>()?,
            orphan: file.orphan,
            anchor: anchor.transpose()?,
            visible: None,
            identity,
        };
        Ok(InodeState::File(state))
    }

    fn alias(&self, (parent, name): &EntryName) -> LayerResult<Alias> {
        let parent = self.built.get(parent).filter(|parent| parent.is_dir());
        let parent = parent.ok_or(Error::Damaged("a parent that is not a directory"))?;
        Ok(Alias {
            parent: parent.clone(),
            name: Name::new(name)?,
        })
    }

    fn look_up(&self, alias: &Alias) -> LayerResult<Found> {
        match alias.parent.locations()? {
            Some(locs) => self.view.lookup_at(&locs, &alias.name, None),
            None => Ok(Found::Absent),
        }
    }

    fn layer(&self, index: u64) -> LayerResult<&Arc<Layer>> {
        self.layers
            .get(&index)
            .ok_or(Error::Damaged("a layer that is not in the record"))
    }

    fn descriptor(&self, index: usize) -> LayerResult<Arc<OwnedFd>> {
        let found = self.descriptors.get(index).cloned();
        found.ok_or(Error::Damaged("a descriptor that was not handed over"))
    }

    fn object_at(&self, place: &ObjectPlace) -> LayerResult<Loc> {
        Ok(Loc {
            dir: self.path_at(place.layer, &place.dir)?,
            name: Name::new(&place.name)?,
        })
    }

    fn dir_at(&self, place: &DirPlace) -> LayerResult<Arc<LayerDir>> {
        match place {
            DirPlace::Path(layer, path) => self.path_at(*layer, path),
            DirPlace::Removed(layer, object, descriptor) => {
                // It is reached by the descriptor, not by this name.
                let name = Name::new(b"removed")?;
                let dir = LayerDir::child(&self.layer(*layer)?.root_dir(), name, object.ino);
                dir.set_removed(self.descriptor(*descriptor)?);
                Ok(dir)
            }
        }
    }

    fn path_at(&self, layer: u64, path: &[u8]) -> LayerResult<Arc<LayerDir>> {
        let mut dir = self.layer(layer)?.root_dir();
        for part in path
            .split(|&byte| byte == b'/')
            .filter(|part| !part.is_empty())
        {
            let name = Name::new(part)?;
            let found = probe(&dir, &name, Markers::Ignored)?.ok_or(Error::Errno(Errno::STALE))?;
            dir = LayerDir::child(&dir, name, found.stat.ino);
        }
        Ok(dir)
    }
}

fn same_object(record: &InodeRecord, found: Identity) -> LayerResult<()> {
    match found == record.identity {
        true => Ok(()),
        false => Err(Error::Errno(Errno::STALE)),
    }
}
