//! From an overlay to its record.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::layer::Layer;

use super::format::Record;
use super::{Handover, RecordError};
use crate::content::FileHandle;
use crate::inode::{Place, References};
use crate::overlay::{Overlay, lock_stack};

impl Overlay {
    /// Takes the record of the state, with these open files by their handle numbers.
    ///
    /// It waits until no operation runs. The caller must ensure that none begins until the new overlay has taken over.
    pub fn record(&self, files: &[(u64, Arc<FileHandle>)]) -> Result<Handover, RecordError> {
        self.locate_all()?;
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
            prefetched: _,
            walk: _,
            opens,
            // Descriptors are reopened; the errors of their writeback are recorded below.
            descriptors,
            passthrough_writers,
            // Another thread ends it.
            undoing: _,
            locks,
            retained,
            unanswered,
        } = self;
        let stack = lock_stack(&self.stack).ok_or(RecordError::TooBusy)?;
        let (view, upper) = (stack.view(), stack.writable());
        let layers = view.layers().iter().chain(view.data_only());
        let mut places = Places {
            layers: layers.cloned().collect(),
            descriptors: Vec::new(),
        };
        let (table, mut known) = inodes.record();
        known.sort_by_key(|(inode, _)| inode.ino());
        let mut recorded = Vec::with_capacity(known.len());
        let mut located = Vec::with_capacity(known.len());
        for (inode, lookups) in &known {
            let ino = inode.ino();
            let place = Place::of(inode, &mut places);
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
            unanswered: match self.ledger() {
                Some(ledger) => ledger.unanswered(),
                None => unanswered.lock().clone(),
            },
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

impl References for Places {
    /// Returns the index of a layer. One that is not in the stack any more is added.
    fn layer(&mut self, layer: &Arc<Layer>) -> u64 {
        let known = self
            .layers
            .iter()
            .position(|other| Arc::ptr_eq(other, layer));
        let index = known.unwrap_or_else(|| {
            self.layers.push(layer.clone());
            self.layers.len() - 1
        });
        index as u64
    }

    fn descriptor(&mut self, descriptor: Arc<OwnedFd>) -> usize {
        self.descriptors.push(descriptor);
        self.descriptors.len() - 1
    }
}
