//! Slots in shared memory for the requests in progress that must not be executed twice.
//!
//! A request that changes names or xattrs records its intent directly before the system call that commits the change.
//! If the process is killed, its successor decides from the layers whether the change was committed
//! (docs/decisions/0035).

use cowl_layers::locks::Mutex;
use cowl_layers::points::point;
use cowl_layers::sys::shared::SharedMemory;
use serde::{Deserialize, Serialize};

/// The number of slots. A session has at most 64 threads, and each handles one request.
const SLOTS: usize = 128;
/// The number of words of a slot: six, and two names of up to 255 bytes.
const WORDS: usize = 6 + 64;
/// The number of words of all slots.
pub(super) const ALL_WORDS: usize = SLOTS * WORDS;

const NO_PHASE: u8 = 0;
const BEGUN: u8 = 1;
const INTENDED: u8 = 2;

/// A change that is committed by one system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A new name of a new object or, by link(2), of another one. It did not exist.
    Add,
    /// The removal of a name, which existed.
    Remove,
    /// A rename of `object` from the name to the new name.
    Rename,
    /// An exchange of two names, the first of which is that of `object`.
    Exchange,
    /// A new xattr, with XATTR_CREATE. It did not exist.
    AddXattr,
    /// The removal of an xattr, which existed.
    RemoveXattr,
}

impl Change {
    const ALL: [Self; 6] = [
        Self::Add,
        Self::Remove,
        Self::Rename,
        Self::Exchange,
        Self::AddXattr,
        Self::RemoveXattr,
    ];

    fn number(self) -> u8 {
        let mut at = (1..).zip(Self::ALL);
        at.find(|(_, one)| *one == self)
            .map_or(0, |(number, _)| number)
    }

    fn from_number(number: u8) -> Option<Self> {
        let mut at = (1..).zip(Self::ALL);
        at.find(|(own, _)| *own == number).map(|(_, one)| one)
    }
}

/// The intent of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Intent<'a> {
    pub(crate) change: Change,
    /// The inode numbers of the directory and, of a rename, the new directory; of an xattr, that of its object.
    pub(crate) parents: (u64, u64),
    /// The names in them.
    pub(crate) names: (&'a [u8], &'a [u8]),
    /// The inode number of the renamed object.
    pub(crate) object: u64,
}

/// A slot, as another process reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FoundSlot {
    /// The id of the request.
    pub(crate) unique: u64,
    /// The change that the request intended; `None` if the request did not reach it.
    pub(crate) change: Option<Change>,
    pub(crate) parents: (u64, u64),
    pub(crate) names: (Vec<u8>, Vec<u8>),
    pub(crate) object: u64,
    /// The number of the handle that the request assigned; 0 for none.
    pub(crate) handle: u64,
}

/// The slots in a range of shared memory.
#[derive(Debug)]
pub(super) struct Slots {
    start: usize,
    free: Mutex<Vec<usize>>,
}

impl Slots {
    pub(super) fn new(start: usize) -> Self {
        Self {
            start,
            free: Mutex::new((0..SLOTS).rev().collect()),
        }
    }

    /// Takes over the slots of a process that has ended, except for the free ones.
    pub(super) fn adopt(start: usize, occupied: &[(usize, FoundSlot)]) -> Self {
        let is_free = |slot: &usize| occupied.iter().all(|(other, _)| other != slot);
        Self {
            start,
            free: Mutex::new((0..SLOTS).rev().filter(is_free).collect()),
        }
    }

    fn at(&self, slot: usize) -> usize {
        self.start + slot * WORDS
    }

    /// Occupies a slot for a request; `None` if there is no free one.
    pub(super) fn begin(&self, memory: &SharedMemory, unique: u64) -> Option<usize> {
        let slot = self.free.lock().pop()?;
        let at = self.at(slot);
        memory.store(at, unique);
        point("in a slot");
        memory.store(at + 5, 0);
        memory.store(at + 1, u64::from(BEGUN) << 8);
        Some(slot)
    }

    /// Records the intent of a request.
    pub(super) fn intend(&self, memory: &SharedMemory, slot: usize, intent: &Intent<'_>) {
        let at = self.at(slot);
        let (one, two) = intent.names;
        memory.store(at + 2, intent.parents.0);
        memory.store(at + 3, intent.parents.1);
        memory.store(at + 4, intent.object);
        memory.store_bytes(at + 6, one);
        memory.store_bytes(at + 6 + 32, two);
        let lengths = (one.len() as u64 & 0xffff) << 16 | (two.len() as u64 & 0xffff) << 32;
        let header = u64::from(intent.change.number()) | u64::from(INTENDED) << 8 | lengths;
        point("in an intent");
        memory.store(at + 1, header);
    }

    /// Records that the intended change was not made, because its system call failed.
    pub(super) fn withdraw(&self, memory: &SharedMemory, slot: usize) {
        memory.store(self.at(slot) + 1, u64::from(BEGUN) << 8);
    }

    /// Records the number of the handle that the request assigned.
    pub(super) fn set_handle(&self, memory: &SharedMemory, slot: usize, handle: u64) {
        memory.store(self.at(slot) + 5, handle);
    }

    /// Releases a slot after the reply.
    pub(super) fn end(&self, memory: &SharedMemory, slot: usize) {
        memory.store(self.at(slot) + 1, u64::from(NO_PHASE) << 8);
        self.free.lock().push(slot);
    }
}

/// Reads the occupied slots, with their numbers.
#[allow(clippy::cast_possible_truncation, reason = "the fields of the word")]
pub(super) fn read(memory: &SharedMemory, start: usize) -> Vec<(usize, FoundSlot)> {
    let mut found = Vec::new();
    for slot in 0..SLOTS {
        let at = start + slot * WORDS;
        let header = memory.load(at + 1);
        let phase = (header >> 8) as u8;
        if phase == NO_PHASE {
            continue;
        }
        let mut one = FoundSlot {
            unique: memory.load(at),
            handle: memory.load(at + 5),
            ..FoundSlot::default()
        };
        if phase == INTENDED {
            let length = |shift: u32| (header >> shift) as usize & 0xff;
            one.change = Change::from_number(header as u8);
            one.parents = (memory.load(at + 2), memory.load(at + 3));
            one.object = memory.load(at + 4);
            one.names = (
                memory.load_bytes(at + 6, length(16)),
                memory.load_bytes(at + 6 + 32, length(32)),
            );
        }
        found.push((slot, one));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_read_as_they_were_recorded() {
        let memory = SharedMemory::create("test", 1 << 20).unwrap();
        let slots = Slots::new(16);
        let one = slots.begin(&memory, 100).unwrap();
        let two = slots.begin(&memory, 200).unwrap();
        slots.set_handle(&memory, two, 9);
        let intent = Intent {
            change: Change::Rename,
            parents: (5, 6),
            names: (&[b'a'; 255], b"b"),
            object: 7,
        };
        slots.intend(&memory, one, &intent);
        let found = read(&memory, 16);
        let expected = FoundSlot {
            unique: 100,
            change: Some(Change::Rename),
            parents: (5, 6),
            names: (vec![b'a'; 255], b"b".to_vec()),
            object: 7,
            handle: 0,
        };
        let opened = FoundSlot {
            unique: 200,
            handle: 9,
            ..FoundSlot::default()
        };
        assert_eq!(found, [(one, expected), (two, opened)]);
        let next = Slots::adopt(16, &found);
        assert_eq!(next.free.lock().len(), SLOTS - 2);
        slots.end(&memory, two);
        slots.withdraw(&memory, one);
        assert_eq!(read(&memory, 16)[0].1.change, None);
        slots.end(&memory, one);
        assert_eq!(read(&memory, 16), []);
    }

    #[test]
    fn every_change_has_a_number() {
        for change in Change::ALL {
            assert_eq!(Change::from_number(change.number()), Some(change));
        }
        assert_eq!(Change::from_number(0), None);
        assert_eq!(Change::from_number(7), None);
    }

    #[test]
    fn no_more_requests_than_slots() {
        let memory = SharedMemory::create("test", 1 << 20).unwrap();
        let slots = Slots::new(16);
        let all: Vec<_> = (0..SLOTS as u64)
            .map(|unique| slots.begin(&memory, unique).unwrap())
            .collect();
        assert_eq!(slots.begin(&memory, 1), None);
        for slot in all {
            slots.end(&memory, slot);
        }
        assert!(slots.begin(&memory, 1).is_some());
    }
}
