//! Blocks of variable size in shared memory, each of which another process can read at any instant.
//!
//! A block is a header, a key and a payload. The header is one word, and one store of it makes the block live, so a
//! reader finds either the whole block or none. A block is replaced in steps ([`Blocks::replace`]), each of which leaves
//! exactly one of both versions.

use std::collections::BTreeSet;

use cowl_layers::locks::Mutex;
use cowl_layers::points::point;
use cowl_layers::sys::shared::SharedMemory;
use rustc_hash::FxHashMap;

const WORD: usize = size_of::<u64>();
/// The words of a block before its payload.
const HEAD: usize = 2;
/// A bit of the type: the block is not live.
const RESERVED: u8 = 0x80;
/// The type of a block that another one replaces. The count is the number of that block.
const REPLACED: u8 = 0x7f;
/// The type of a free block.
const FREE: u8 = 0;

/// The number of a block: the index of its first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block(u32);

/// The first word of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    kind: u8,
    /// The length of the payload in bytes.
    length: u16,
    count: u32,
}

impl Header {
    fn to_word(self) -> u64 {
        u64::from(self.kind) | u64::from(self.length) << 8 | u64::from(self.count) << 32
    }

    #[allow(clippy::cast_possible_truncation, reason = "the fields of the word")]
    fn from_word(word: u64) -> Self {
        Self {
            kind: word as u8,
            length: (word >> 8) as u16,
            count: (word >> 32) as u32,
        }
    }

    /// Returns the number of words of the block.
    fn words(self) -> usize {
        words_of(usize::from(self.length))
    }
}

fn words_of(length: usize) -> usize {
    HEAD + length.div_ceil(WORD)
}

/// The content of a block, as another process reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) key: u64,
    pub(crate) count: u32,
    pub(crate) payload: Vec<u8>,
}

/// The blocks in a range of shared memory.
#[derive(Debug)]
pub(super) struct Blocks {
    /// The index of the word with the end of the used range.
    used: usize,
    /// The index of the first block.
    start: usize,
    free: Mutex<FreeBlocks>,
}

#[derive(Debug, Default)]
struct FreeBlocks {
    /// The free blocks, by their number of words.
    by_words: FxHashMap<usize, Vec<u32>>,
}

impl Blocks {
    /// Creates an empty range that begins at `start`. The word `used` records its end.
    pub(super) fn new(memory: &SharedMemory, used: usize, start: usize) -> Self {
        memory.store(used, start as u64);
        Self {
            used,
            start,
            free: Mutex::default(),
        }
    }

    /// Takes over the blocks of a process that has ended, and calls `visit` with the number, type and key of each live
    /// one. Returns `None` if the memory does not consist of blocks.
    ///
    /// Completes replacements, and frees blocks that the process did not make live. Each step leaves exactly one
    /// version of a block, so that another process can begin again if this one ends.
    pub(super) fn adopt(
        memory: &SharedMemory,
        used: usize,
        start: usize,
        mut visit: impl FnMut(Block, u8, u64),
    ) -> Option<Self> {
        let end = usize::try_from(memory.load(used)).ok()?;
        if end < start || end > memory.len() {
            return None;
        }
        let blocks = Self {
            used,
            start,
            free: Mutex::default(),
        };
        let (mut reserved, mut replaced) = (BTreeSet::new(), Vec::new());
        let mut at = start;
        while at < end {
            let block = Block(u32::try_from(at).ok()?);
            let header = Header::from_word(memory.load(at));
            at = at.checked_add(header.words()).filter(|next| *next <= end)?;
            match header.kind {
                FREE => blocks.note_free(block, header),
                REPLACED => replaced.push((block, header)),
                kind if kind & RESERVED != 0 => {
                    reserved.insert(block.0);
                }
                kind => visit(block, kind, memory.load(block.at() + 1)),
            }
        }
        for (old, header) in replaced {
            // If the new block is live already, it was found by itself.
            let new = Block(header.count);
            if reserved.remove(&new.0) {
                let mut live = Header::from_word(memory.load(new.at()));
                live.kind &= !RESERVED;
                memory.store(new.at(), live.to_word());
                visit(new, live.kind, memory.load(new.at() + 1));
            }
            blocks.remove(memory, old);
        }
        for block in reserved {
            blocks.remove(memory, Block(block));
        }
        Some(blocks)
    }

    /// Adds a block. Returns `None` if the memory is full or the payload is too long.
    pub(super) fn add(
        &self,
        memory: &SharedMemory,
        (kind, key): (u8, u64),
        payload: &[u8],
        count: u32,
    ) -> Option<Block> {
        let block = self.reserve(memory, (kind, key), payload, count)?;
        point("in a block");
        let header = Header {
            kind,
            length: u16::try_from(payload.len()).ok()?,
            count,
        };
        memory.store(block.at(), header.to_word());
        Some(block)
    }

    /// Allocates a block and stores its content, but does not make it live.
    fn reserve(
        &self,
        memory: &SharedMemory,
        (kind, key): (u8, u64),
        payload: &[u8],
        count: u32,
    ) -> Option<Block> {
        let mut header = Header {
            kind: FREE,
            length: u16::try_from(payload.len()).ok()?,
            count: 0,
        };
        let block = {
            let mut free = self.free.lock();
            let reused = free.by_words.get_mut(&header.words()).and_then(Vec::pop);
            match reused {
                Some(at) => Block(at),
                None => {
                    let at = usize::try_from(memory.load(self.used)).ok()?;
                    let end = at.checked_add(header.words())?;
                    if end > memory.len() {
                        return None;
                    }
                    let block = Block(u32::try_from(at).ok()?);
                    // The header must be valid before the range includes the block.
                    memory.store(at, header.to_word());
                    memory.store(self.used, end as u64);
                    block
                }
            }
        };
        header.kind = kind | RESERVED;
        header.count = count;
        memory.store(block.at(), header.to_word());
        memory.store(block.at() + 1, key);
        memory.store_bytes(block.at() + HEAD, payload);
        Some(block)
    }

    /// Replaces the payload of a block, which retains its type, key and count. Returns `None`, and changes nothing, as
    /// [`Self::add`] does.
    ///
    /// The caller must prevent a concurrent change of the block.
    pub(super) fn replace(
        &self,
        memory: &SharedMemory,
        old: Block,
        payload: &[u8],
    ) -> Option<Block> {
        let header = Header::from_word(memory.load(old.at()));
        let (kind, key) = (header.kind, memory.load(old.at() + 1));
        if payload.len() == usize::from(header.length)
            && memory.load_bytes(old.at() + HEAD, payload.len()) == payload
        {
            return Some(old);
        }
        let new = self.reserve(memory, (kind, key), payload, header.count)?;
        let replaced = Header {
            kind: REPLACED,
            count: new.0,
            ..header
        };
        // From here on a reader finds the new block, although it is still reserved.
        memory.store(old.at(), replaced.to_word());
        point("between the versions of a block");
        let live = Header {
            length: u16::try_from(payload.len()).ok()?,
            ..header
        };
        memory.store(new.at(), live.to_word());
        point("with both versions of a block");
        self.remove(memory, old);
        Some(new)
    }

    /// Frees a block.
    pub(super) fn remove(&self, memory: &SharedMemory, block: Block) {
        let header = Header {
            kind: FREE,
            count: 0,
            ..Header::from_word(memory.load(block.at()))
        };
        memory.store(block.at(), header.to_word());
        self.note_free(block, header);
    }

    fn note_free(&self, block: Block, header: Header) {
        let mut free = self.free.lock();
        let same_size = free.by_words.entry(header.words()).or_default();
        same_size.push(block.0);
    }

    /// Returns the end of the used range, in words.
    pub(super) fn end(&self, memory: &SharedMemory) -> u64 {
        memory.load(self.used) - self.start as u64
    }
}

impl Block {
    fn at(self) -> usize {
        self.0 as usize
    }

    /// Returns the block's count.
    pub(super) fn count(self, memory: &SharedMemory) -> u32 {
        Header::from_word(memory.load(self.at())).count
    }

    /// Replaces the content of `bytes` by the payload.
    pub(super) fn payload(self, memory: &SharedMemory, bytes: &mut Vec<u8>) {
        let header = Header::from_word(memory.load(self.at()));
        memory.load_into(self.at() + HEAD, usize::from(header.length), bytes);
    }

    /// Returns the first byte of the payload; 0 if that is empty.
    pub(super) fn first_byte(self, memory: &SharedMemory) -> u8 {
        match Header::from_word(memory.load(self.at())).length {
            0 => 0,
            _ => memory.load(self.at() + HEAD).to_le_bytes()[0],
        }
    }

    /// Returns the content of the block.
    pub(super) fn content(self, memory: &SharedMemory) -> Found {
        let mut payload = Vec::new();
        self.payload(memory, &mut payload);
        Found {
            key: memory.load(self.at() + 1),
            count: self.count(memory),
            payload,
        }
    }

    /// Changes the block's count. The caller must prevent a concurrent change of the block.
    pub(super) fn set_count(self, memory: &SharedMemory, count: u32) {
        let header = Header {
            count,
            ..Header::from_word(memory.load(self.at()))
        };
        memory.store(self.at(), header.to_word());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(memory: &SharedMemory) -> SharedMemory {
        let copy = SharedMemory::create("copy", memory.len() * WORD).unwrap();
        for at in 0..memory.len() {
            copy.store(at, memory.load(at));
        }
        copy
    }

    /// Takes over a copy of the memory, twice, and returns the live blocks.
    fn found(memory: &SharedMemory) -> Vec<(u8, u64, u32, Vec<u8>)> {
        let memory = copy(memory);
        let read = || {
            let mut found = Vec::new();
            Blocks::adopt(&memory, 0, 8, |block, kind, key| {
                let content = block.content(&memory);
                assert_eq!(content.key, key);
                found.push((kind, key, content.count, content.payload));
            })
            .unwrap();
            found.sort();
            found
        };
        let once = read();
        assert_eq!(read(), once);
        once
    }

    #[test]
    fn blocks_are_added_replaced_and_removed() {
        let memory = SharedMemory::create("test", 1 << 16).unwrap();
        let blocks = Blocks::new(&memory, 0, 8);
        let one = blocks.add(&memory, (1, 100), b"a name", 3).unwrap();
        let two = blocks.add(&memory, (2, 200), b"", 0).unwrap();
        one.set_count(&memory, 9);
        assert_eq!(one.count(&memory), 9);
        let longer = blocks.replace(&memory, one, b"a much longer name").unwrap();
        assert_eq!(
            found(&memory),
            [
                (1, 100, 9, b"a much longer name".to_vec()),
                (2, 200, 0, Vec::new())
            ]
        );
        blocks.remove(&memory, longer);
        blocks.remove(&memory, two);
        assert_eq!(found(&memory), []);
        // The memory of removed blocks is reused.
        let end = blocks.end(&memory);
        for count in 0..1000 {
            let again = blocks.add(&memory, (1, 5), b"a name", count).unwrap();
            blocks.remove(&memory, again);
        }
        assert_eq!(blocks.end(&memory), end);
    }

    #[test]
    fn full_memory_and_long_payloads_are_refused() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        let blocks = Blocks::new(&memory, 0, 8);
        assert_eq!(blocks.add(&memory, (1, 1), &[7; 70_000], 0), None);
        let mut added = 0;
        while blocks.add(&memory, (1, added), &[7; 100], 0).is_some() {
            added += 1;
        }
        assert_eq!(found(&memory).len() as u64, added);
        assert!(added > 30, "{added}");
    }

    /// Reads a copy of the memory after each store of a replacement.
    #[test]
    fn each_instant_of_a_replacement_has_one_version() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        let blocks = Blocks::new(&memory, 0, 8);
        let old = blocks.add(&memory, (1, 100), b"before", 3).unwrap();
        let new = blocks.reserve(&memory, (1, 100), b"after", 3).unwrap();
        assert_eq!(found(&memory), [(1, 100, 3, b"before".to_vec())]);
        let mut header = Header::from_word(memory.load(old.at()));
        header.kind = REPLACED;
        header.count = new.0;
        memory.store(old.at(), header.to_word());
        assert_eq!(found(&memory), [(1, 100, 3, b"after".to_vec())]);
        let mut live = Header::from_word(memory.load(new.at()));
        live.kind &= !RESERVED;
        memory.store(new.at(), live.to_word());
        assert_eq!(found(&memory), [(1, 100, 3, b"after".to_vec())]);
        blocks.remove(&memory, old);
        assert_eq!(found(&memory), [(1, 100, 3, b"after".to_vec())]);
    }

    /// The blocks that were reserved or replaced when the process ended are reused.
    #[test]
    fn interrupted_changes_leak_no_memory() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        let blocks = Blocks::new(&memory, 0, 8);
        let old = blocks.add(&memory, (1, 100), b"before", 3).unwrap();
        let new = blocks.reserve(&memory, (1, 100), b"after", 3).unwrap();
        blocks.reserve(&memory, (1, 200), b"never", 1).unwrap();
        let replaced = Header {
            kind: REPLACED,
            count: new.0,
            ..Header::from_word(memory.load(old.at()))
        };
        memory.store(old.at(), replaced.to_word());
        let mut live = Vec::new();
        let next = Blocks::adopt(&memory, 0, 8, |block, _, _| live.push(block)).unwrap();
        assert_eq!(live, [new]);
        let end = next.end(&memory);
        for key in 0..2 {
            next.add(&memory, (1, key), b"later", 1).unwrap();
        }
        assert_eq!(next.end(&memory), end);
    }

    #[test]
    fn damaged_memory_is_refused() {
        let memory = SharedMemory::create("test", 4096).unwrap();
        let blocks = Blocks::new(&memory, 0, 8);
        blocks.add(&memory, (1, 100), b"content", 3).unwrap();
        memory.store(0, u64::MAX);
        assert!(Blocks::adopt(&memory, 0, 8, |_, _, _| {}).is_none());
        memory.store(0, 9);
        assert!(Blocks::adopt(&memory, 0, 8, |_, _, _| {}).is_none());
    }
}
