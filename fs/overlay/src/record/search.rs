//! The search for the objects that must be located before the first request.
//!
//! A change may have been committed in the layers but not recorded, or the other way round. So each object is searched
//! at all places where it can be, and is recognized by its visible number.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use cowl_layers::error::{Error, Result as LayerResult};
use cowl_layers::layer::Layer;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_layers::view::View;

use super::rebuild::Builder;
use super::sorted::{Renames, Sorted};
use crate::inode::{
    Alias, DirState, EntryName, FileState, FoundState, Identity, Inode, InodeBlock, InodeState,
    Place, Unlocated, Whereabouts,
};
use crate::names::found_state;

/// The search for the objects of the inodes.
pub(super) struct Search<'r> {
    pub(super) view: &'r View,
    /// The id of the upper layer.
    pub(super) upper: Option<u64>,
    pub(super) layers: HashMap<u64, Arc<Layer>>,
    pub(super) descriptors: &'r HashMap<u64, Arc<OwnedFd>>,
    pub(super) table: Unlocated<'r>,
    pub(super) sorted: &'r Sorted,
    pub(super) renames: Renames,
    pub(super) found: Outcome,
}

/// The result of a search.
#[derive(Default)]
pub(super) struct Outcome {
    /// The inodes whose objects were found.
    pub(super) built: HashMap<u64, Arc<Inode>>,
    /// The inodes whose objects do not exist any more.
    pub(super) missing: HashSet<u64>,
    /// The inodes whose objects, or the directories of which, could not be read. They remain to be located.
    pub(super) failed: HashSet<u64>,
}

impl Search<'_> {
    /// Locates the object of an inode, after those to which its places refer.
    pub(super) fn build(&mut self, ino: u64) -> LayerResult<()> {
        // Without recursion, which would overflow the stack in a deep tree.
        let mut pending = vec![ino];
        while let Some(ino) = pending.last().copied() {
            if self.is_known(ino) {
                pending.pop();
                continue;
            }
            let Whereabouts::Recorded(block) = self.table.whereabouts(ino)? else {
                pending.pop();
                continue;
            };
            let places = self.places(ino, &block);
            let parents = || {
                places
                    .iter()
                    .flat_map(Place::names)
                    .map(|(parent, _)| *parent)
            };
            let unknown =
                parents().find(|parent| !self.is_known(*parent) && !pending.contains(parent));
            if let Some(parent) = unknown {
                pending.push(parent);
                continue;
            }
            pending.pop();
            let is_reachable = !parents().any(|parent| self.found.failed.contains(&parent));
            let found = match is_reachable {
                true => self.find(ino, &places),
                false => Err(Error::NOT_FOUND),
            };
            match found {
                Ok(Some(found)) => {
                    let in_copy = self.sorted.copying.get(&ino).map(|times| times.ctime);
                    let inode = self.table.recovered(ino, &block, found, in_copy);
                    self.table.insert_located(&inode);
                    self.found.built.insert(ino, inode);
                }
                Ok(None) => {
                    self.table.drop_lost(ino);
                    self.found.missing.insert(ino);
                }
                Err(error) => {
                    log::warn!("cannot find inode {ino} again yet: {error}");
                    self.found.failed.insert(ino);
                }
            }
        }
        Ok(())
    }

    fn is_known(&self, ino: u64) -> bool {
        self.found.built.contains_key(&ino)
            || self.found.missing.contains(&ino)
            || self.found.failed.contains(&ino)
            || !matches!(
                self.table.whereabouts(ino),
                Ok(Whereabouts::Recorded(_)) | Err(_)
            )
    }

    /// Returns the places at which an object can be, the most likely one first.
    fn places(&self, ino: u64, block: &InodeBlock) -> Vec<Place> {
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
        for name in block.place.names() {
            if let Some(other) = self.renames.of_names.get(name) {
                also(other.clone());
            }
        }
        places.extend(self.sorted.nameless.get(&ino).cloned());
        places
    }

    /// Searches an object at these places.
    fn find(&self, ino: u64, places: &[Place]) -> LayerResult<Option<FoundState>> {
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
            if let Some(mut found) = found {
                if let Some(restored) = self.restore_times(ino, &found.state)? {
                    found.ctime = restored;
                }
                if let InodeState::File(file) = &mut found.state {
                    for name in names.iter().skip(1) {
                        file.aliases.push(self.alias(name)?);
                    }
                }
                return Ok(Some(found));
            }
        }
        Ok(None)
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
        Ok(Some(FoundState {
            own: node.ino,
            identity,
            kind: FileKind::Directory,
            ctime: node.stat.ctime,
            state: InodeState::Dir(DirState::root(node)),
        }))
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
        let found = found_state(found, alias);
        Ok(found.filter(|found| self.table.may_be(found.identity, found.own, ino)))
    }

    /// Returns the object at a place without a name.
    fn without_name(&self, ino: u64, place: &Place) -> LayerResult<Option<FoundState>> {
        let descriptor = self.descriptors.get(&ino).cloned();
        let builder = Builder {
            view: self.view,
            layers: &self.layers,
            descriptors: descriptor.as_slice(),
            built: &self.found.built,
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
        Ok(Some(FoundState {
            own: ino,
            identity,
            kind: stat.kind(),
            ctime: stat.ctime,
            state,
        }))
    }

    fn alias(&self, (parent, name): &EntryName) -> LayerResult<Alias> {
        let parent = self
            .found
            .built
            .get(parent)
            .filter(|parent| parent.is_dir());
        let parent = parent.ok_or(Error::NOT_FOUND)?;
        Ok(Alias {
            parent: parent.clone(),
            name: Name::new(name)?,
        })
    }
}
