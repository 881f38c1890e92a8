//! Recovery of an overlay from its ledger, as after the end of its process.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use cowl_layers::error::Result;
use cowl_layers::sys::shared::SharedMemory;
use cowl_overlay::{Custodian, Estate, FileHandle, Inheritance, Ledger, Overlay};

/// Holds descriptors in this process.
#[derive(Debug, Default)]
pub struct Keeper(Mutex<HashMap<u64, Arc<OwnedFd>>>);

impl Custodian for Keeper {
    fn deposit(&self, number: u64, descriptor: BorrowedFd<'_>) -> Result<()> {
        let copy = descriptor.try_clone_to_owned().unwrap();
        self.0.lock().unwrap().insert(number, Arc::new(copy));
        Ok(())
    }

    fn release(&self, number: u64) {
        self.0.lock().unwrap().remove(&number);
    }
}

/// A ledger with its keeper.
#[derive(Debug, Clone)]
pub struct Kept {
    pub ledger: Arc<Ledger>,
    keeper: Arc<Keeper>,
}

impl Kept {
    pub fn new() -> Self {
        let keeper = Arc::new(Keeper::default());
        let ledger = Arc::new(Ledger::create(keeper.clone()).unwrap());
        Self { ledger, keeper }
    }

    /// Returns the number of descriptors in custody.
    pub fn descriptors(&self) -> usize {
        self.keeper.0.lock().unwrap().len()
    }

    /// Creates the overlay that continues the one that was attached to this ledger, with its open files.
    pub fn recover(
        &self,
        old: &Overlay,
        open: &mut [&mut Arc<FileHandle>],
    ) -> (Overlay, Self, usize) {
        assert!(self.ledger.is_complete());
        let estate = Estate::read(copy_memory(&self.ledger)).unwrap();
        let values: Vec<_> = open.iter().map(|file| file.to_ledger()).collect();
        let descriptors = self.keeper.0.lock().unwrap().clone();
        let pieces = old.record(&[]).unwrap();
        let mut layers: Vec<_> = pieces.layers;
        layers.extend(pieces.retained.iter().map(|(layer, _)| layer.clone()));
        let find = |id: &u64| {
            layers
                .iter()
                .find(|layer| layer.id() == *id)
                .unwrap()
                .clone()
        };
        let with = Inheritance {
            layers: estate.layers().layers.iter().map(find).collect(),
            upper: pieces.upper,
            descriptors: descriptors.clone(),
            locks: pieces.locks,
            retained: pieces.retained,
            options: pieces.options,
        };
        let keeper = Arc::new(Keeper(Mutex::new(descriptors)));
        let recovered = Overlay::recover(estate, with, keeper.clone()).unwrap();
        let ledger = recovered.overlay.ledger().unwrap().clone();
        let next = Self { ledger, keeper };
        for (file, value) in open.iter_mut().zip(values) {
            **file = recovered.overlay.reopen(&value).unwrap();
        }
        (recovered.overlay, next, recovered.lost)
    }
}

/// Returns a copy of a ledger's memory, as the end of its process leaves it. The overlay in this process can still change
/// the original.
fn copy_memory(ledger: &Ledger) -> OwnedFd {
    let original = ledger.descriptor().try_clone_to_owned().unwrap();
    let original = SharedMemory::open(original).unwrap();
    let copy = SharedMemory::create("copy", original.len() * size_of::<u64>()).unwrap();
    // The blocks begin after the words and the slots.
    let used = (1 << 14) + ledger.size() / 8;
    for at in 0..usize::try_from(used).unwrap() {
        copy.store(at, original.load(at));
    }
    copy.as_fd().try_clone_to_owned().unwrap()
}
