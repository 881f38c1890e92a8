//! A handover as bytes and descriptors, which another process can receive.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cowl_layers::layer::lock::{self, LayerLock};
use cowl_layers::layer::{Layer, LayerRecord, Upper, UpperRecord};
use serde::{Deserialize, Serialize};

use super::{Handover, RecordError};
use crate::reach::OverlayOptions;

/// A [`Handover`] without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandoverRecord {
    record: Vec<u8>,
    /// The number of descriptors of objects without a name.
    nameless: usize,
    layers: Vec<LayerRecord>,
    /// The indices of the layers whose root directories hold a lock in the stack.
    locked: Vec<usize>,
    /// The indices of the layers that are in use although they are not in the stack any more.
    retained: Vec<usize>,
    upper: Option<UpperRecord>,
    options: OverlayOptions,
}

impl Handover {
    /// Divides the handover into bytes and descriptors.
    pub fn to_parts(&self) -> (HandoverRecord, Vec<BorrowedFd<'_>>) {
        let Self {
            record,
            descriptors,
            layers,
            upper,
            locks,
            retained,
            options,
        } = self;
        let mut sent: Vec<_> = layers.iter().map(|layer| layer.root_fd()).collect();
        let upper = upper.as_deref().map(|upper| {
            let (record, descriptors) = upper.record();
            sent.extend(descriptors);
            record
        });
        sent.extend(descriptors.iter().map(|descriptor| descriptor.as_fd()));
        let position = |lock: &LayerLock| layers.iter().position(|layer| lock.is_of(layer));
        let parts = HandoverRecord {
            record: record.clone(),
            nameless: descriptors.len(),
            layers: layers.iter().map(|layer| layer.record()).collect(),
            // A lock of a layer that is not in the record is of no use, and ends with this process.
            locked: locks.iter().filter_map(|lock| position(lock)).collect(),
            retained: (retained.iter())
                .filter_map(|(_, lock)| position(lock))
                .collect(),
            upper,
            options: options.clone(),
        };
        (parts, sent)
    }
}

impl HandoverRecord {
    /// Returns the number of descriptors that belong to the record.
    pub fn descriptors(&self) -> usize {
        let upper = if self.upper.is_some() { 2 } else { 0 };
        self.layers
            .len()
            .saturating_add(upper)
            .saturating_add(self.nameless)
    }

    /// Creates a handover of this record and its descriptors.
    ///
    /// The locks of the upper layer still belong to the sender; see [`crate::Overlay::assume_locks`].
    pub fn into_handover(self, received: Vec<OwnedFd>) -> Result<Handover, RecordError> {
        if received.len() != self.descriptors() {
            return Err(RecordError::Damaged("descriptors are missing"));
        }
        let mut received = received.into_iter();
        let mut layers = (self.layers.into_iter())
            .zip(received.by_ref())
            .map(|(record, root)| Layer::from_record(record, root))
            .collect::<Result<Vec<_>, _>>()?;
        let mut shared = HashMap::new();
        for index in self.locked.iter().chain(&self.retained) {
            if let Some(layer) = layers.get_mut(*index) {
                let (locked, lock) = lock::beside_predecessor(layer.clone())?;
                *layer = locked;
                shared.insert(*index, lock);
            }
        }
        let missing = RecordError::Damaged("a layer is missing");
        let upper = match self.upper {
            None => None,
            Some(record) => {
                let (Some(layer), Some(outer), Some(work)) =
                    (layers.first(), received.next(), received.next())
                else {
                    return Err(missing);
                };
                Some(Upper::from_record(record, layer.clone(), [outer, work])?)
            }
        };
        let find = |index: &usize| Some((layers.get(*index)?.clone(), shared.get(index)?.clone()));
        let locks: Option<Vec<_>> = self.locked.iter().map(find).collect();
        let retained: Option<Vec<_>> = self.retained.iter().map(find).collect();
        let (Some(locks), Some(retained)) = (locks, retained) else {
            return Err(missing);
        };
        Ok(Handover {
            record: self.record,
            descriptors: received.map(Arc::new).collect(),
            upper,
            locks: locks.into_iter().map(|(_, lock)| lock).collect(),
            retained,
            layers,
            options: self.options,
        })
    }
}
