//! From an overlay to its record.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::error::Result as LayerResult;
use cowl_layers::layer::{Layer, LayerDir};
use cowl_layers::sys;
use cowl_layers::view::Loc;

use super::format::Record;
use super::place::{DirPlace, EntryName, NamelessFile, ObjectPlace, Place};
use super::{Handover, RecordError};
use crate::content::FileHandle;
use crate::inode::{Alias, DirState, FileState, Identity, Inode};
use crate::overlay::Overlay;

impl Overlay {
    /// Takes the record of the state, with these open files by their handle numbers.
    ///
    /// It waits until no operation runs. The caller must ensure that none begins until the new overlay has taken over.
    pub fn record(&self, files: &[(u64, Arc<FileHandle>)]) -> Result<Handover, RecordError> {
        let Self {
            stack: _,
            options,
            inodes,
            // It is among the inodes.
            root: _,
            links,
            cookies,
            // Caches.
            listings: _,
            deep: _,
            absent: _,
            opens,
            // Descriptors are reopened; the errors of their writeback are recorded below.
            descriptors,
            passthrough_writers,
            locks,
            retained,
        } = self;
        let stack = self.lock_stack().ok_or(RecordError::TooBusy)?;
        let (view, upper) = (stack.view(), stack.writable());
        let mut places = Places {
            layers: view
                .layers()
                .iter()
                .chain(view.data_only())
                .cloned()
                .collect(),
            descriptors: Vec::new(),
        };
        let (table, mut known) = inodes.record();
        known.sort_by_key(|(inode, _)| inode.ino());
        let mut recorded = Vec::with_capacity(known.len());
        let mut located = Vec::with_capacity(known.len());
        for (inode, lookups) in &known {
            let ino = inode.ino();
            let place = places.of(inode);
            located.push(place.map_err(|error| RecordError::Inode { ino, error })?);
            recorded.push(inode.record(*lookups));
        }
        let mut errors: Vec<_> = files
            .iter()
            .filter_map(|(_, file)| {
                let (errno, count) = descriptors.writeback_error(file.inode())?;
                Some((file.inode().ino(), errno, count))
            })
            .collect();
        errors.sort_unstable();
        errors.dedup();
        let (moved, found) = links.moved_dirs();
        let record = Record {
            layers: places.layers.iter().map(|layer| layer.id()).collect(),
            stack: view.layers().len(),
            data_only: view.data_only().len(),
            has_upper: upper.is_some(),
            pushes: opens.record(),
            passthrough_writers: passthrough_writers.load(std::sync::atomic::Ordering::Acquire),
            inodes: recorded,
            places: located,
            table,
            cookies: cookies.to_record(),
            moved: (moved.iter().map(|inode| inode.ino()).collect(), found),
            files: files
                .iter()
                .map(|(number, file)| (*number, file.record()))
                .collect(),
            writeback_errors: errors,
        };
        Ok(Handover {
            record: record.encode()?,
            descriptors: places.descriptors,
            layers: places.layers,
            upper: upper.cloned(),
            locks: locks.lock().clone(),
            retained: retained.lock().clone(),
            options: options.clone(),
        })
    }
}

/// The layers and descriptors that the locations refer to by index.
struct Places {
    layers: Vec<Arc<Layer>>,
    descriptors: Vec<Arc<OwnedFd>>,
}

impl Places {
    fn of(&mut self, inode: &Inode) -> LayerResult<Place> {
        if inode.is_dir() {
            self.of_dir(inode.dir()?)
        } else {
            self.of_file(inode.file()?)
        }
    }

    fn of_dir(&mut self, state: DirState) -> LayerResult<Place> {
        let DirState {
            locs,
            redirect,
            alias,
            removed,
            // In the record of the inode.
            identity: _,
        } = state;
        match alias {
            Some(alias) => Ok(Place::Dir(entry_name(&alias))),
            None if !removed => Ok(Place::Root),
            None => Ok(Place::RemovedDir {
                locations: locs
                    .iter()
                    .map(|dir| self.dir(dir))
                    .collect::<LayerResult<_>>()?,
                redirect: redirect.map(|redirect| redirect.to_value()),
            }),
        }
    }

    fn of_file(&mut self, state: FileState) -> LayerResult<Place> {
        let FileState {
            loc,
            data,
            redirect,
            aliases,
            orphan,
            anchor,
            // Only a cache.
            visible: _,
            identity: _,
        } = state;
        let names: Vec<EntryName> = aliases.iter().map(entry_name).collect();
        if !orphan && anchor.is_none() && !names.is_empty() {
            return Ok(Place::File(names));
        }
        let descriptor = anchor.map(|anchor| self.descriptor(anchor));
        let object = match descriptor {
            None => self.object(&loc)?,
            // The name can be gone.
            Some(_) => ObjectPlace {
                layer: self.layer(loc.dir.layer()),
                dir: Vec::new(),
                name: loc.name.as_bytes().to_vec(),
            },
        };
        Ok(Place::Nameless(Box::new(NamelessFile {
            object,
            data: data.map(|data| self.object(&data)).transpose()?,
            redirect: redirect.map(|redirect| redirect.to_value()),
            names,
            orphan,
            descriptor,
        })))
    }

    fn dir(&mut self, dir: &LayerDir) -> LayerResult<DirPlace> {
        let layer = self.layer(dir.layer());
        Ok(match dir.removed_fd() {
            Some(fd) => {
                let object = Identity::from_stat(&sys::stat::stat_fd(&*fd)?);
                DirPlace::Removed(layer, object, self.descriptor(fd))
            }
            None => DirPlace::Path(layer, dir.path_in_layer()?),
        })
    }

    fn object(&mut self, loc: &Loc) -> LayerResult<ObjectPlace> {
        Ok(ObjectPlace {
            layer: self.layer(loc.dir.layer()),
            dir: loc.dir.path_in_layer()?,
            name: loc.name.as_bytes().to_vec(),
        })
    }

    /// Returns the index of a layer. One that is not in the stack any more is added.
    fn layer(&mut self, layer: &Arc<Layer>) -> usize {
        let known = self
            .layers
            .iter()
            .position(|other| Arc::ptr_eq(other, layer));
        known.unwrap_or_else(|| {
            self.layers.push(layer.clone());
            self.layers.len() - 1
        })
    }

    fn descriptor(&mut self, fd: Arc<OwnedFd>) -> usize {
        self.descriptors.push(fd);
        self.descriptors.len() - 1
    }
}

fn entry_name(alias: &Alias) -> EntryName {
    (alias.parent.ino(), alias.name.as_bytes().to_vec())
}
