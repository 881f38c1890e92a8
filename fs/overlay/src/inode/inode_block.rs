//! The encoding of an inode's block in the ledger (docs/format.md).

use rustc_hash::FxHashMap;

use super::place::{EntryName, Place};
use crate::ledger::Found;

/// The root directory.
pub(super) const ROOT: u8 = 0;
/// A directory with a name.
pub(super) const DIR: u8 = 1;
/// Another object with one name.
pub(super) const FILE: u8 = 2;
/// Any other place.
pub(super) const OTHER: u8 = 3;
/// A bit of the first byte: a content version follows.
pub(super) const VERSION: u8 = 0x10;

/// An inode's block, as a successor reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InodeBlock {
    pub(crate) lookups: u32,
    pub(crate) is_dir: bool,
    pub(crate) version: u32,
    pub(crate) place: Place,
}

/// Appends a number in 7 bits per byte, the lowest first.
#[allow(clippy::cast_possible_truncation, reason = "seven bits")]
pub(super) fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn take_number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut number = 0;
    let mut rest = bytes;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        number |= u64::from(byte & 0x7f) << shift;
        rest = after;
        if byte & 0x80 == 0 {
            return Some((number, rest));
        }
    }
    None
}

/// Returns the tag of a payload, the version of the content, and the rest.
fn split(payload: &[u8]) -> Option<(u8, u32, &[u8])> {
    let (tag, rest) = payload.split_first()?;
    if tag & VERSION == 0 {
        return Some((*tag, 0, rest));
    }
    let (version, rest) = rest.split_first_chunk()?;
    Some((tag & !VERSION, u32::from_le_bytes(*version), rest))
}

/// Whether a payload that begins with this byte is that of a directory with a name.
pub(super) fn is_named_dir(first: u8) -> bool {
    first & !VERSION == DIR
}

/// Whether a payload that begins with this byte is that of an object with one name.
pub(crate) fn has_one_name(first: u8) -> bool {
    matches!(first & !VERSION, DIR | FILE)
}

/// Names in directories, by the inode numbers of the directories.
pub(crate) type NamesIn = FxHashMap<u64, Vec<Vec<u8>>>;

/// Whether the place in a block's payload is one or several names, none of which is among `names`; `None` if it is
/// damaged.
pub(crate) fn has_only_other_names(payload: &[u8], names: &NamesIn) -> Option<bool> {
    let is_among = |parent: u64, name: &[u8]| {
        let among = names.get(&parent);
        among.is_some_and(|among| among.iter().any(|one| one == name))
    };
    let (tag, _, rest) = split(payload)?;
    Some(match tag {
        DIR | FILE => {
            let (parent, name) = take_number(rest)?;
            !is_among(parent, name)
        }
        ROOT => false,
        OTHER => match postcard::from_bytes(rest).ok()? {
            Place::File(all) => !all.iter().any(|(parent, name)| is_among(*parent, name)),
            _ => false,
        },
        _ => return None,
    })
}

impl InodeBlock {
    /// Decodes a block; `None` if it is damaged.
    pub(crate) fn decode(found: &Found) -> Option<Self> {
        let (tag, version, rest) = split(&found.payload)?;
        let single = || -> Option<EntryName> {
            let (parent, name) = take_number(rest)?;
            Some((parent, name.to_vec()))
        };
        let place = match tag {
            ROOT => Place::Root,
            DIR => Place::Dir(single()?),
            FILE => Place::File(vec![single()?]),
            OTHER => postcard::from_bytes(rest).ok()?,
            _ => return None,
        };
        Some(Self {
            lookups: found.count,
            is_dir: matches!(
                place,
                Place::Root | Place::Dir(_) | Place::RemovedDir { .. }
            ),
            version,
            place,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(payload: &[u8]) -> Option<InodeBlock> {
        InodeBlock::decode(&Found {
            key: 7,
            count: 3,
            payload: payload.to_vec(),
        })
    }

    #[test]
    fn numbers_survive_encoding() {
        for number in [0, 1, 127, 128, 300, 1 << 20, 1 << 40, u64::MAX] {
            let mut bytes = Vec::new();
            push_number(&mut bytes, number);
            bytes.extend(b"name");
            assert_eq!(take_number(&bytes), Some((number, &b"name"[..])));
        }
        assert_eq!(take_number(&[0x80]), None);
    }

    #[test]
    fn damaged_payloads_are_refused() {
        let dir = block(&[DIR, 1, b'a']).unwrap();
        assert_eq!(dir.place, Place::Dir((1, b"a".to_vec())));
        assert!(dir.is_dir);
        let file = block(&[FILE | VERSION, 5, 0, 0, 0, 1, b'a']).unwrap();
        assert_eq!((file.version, file.lookups), (5, 3));
        for damaged in [
            &[][..],
            &[9],
            &[DIR | VERSION, 1],
            &[DIR, 0x80],
            &[OTHER, 99],
        ] {
            assert_eq!(block(damaged), None, "{damaged:?}");
        }
    }

    #[test]
    fn names_are_found_in_payloads() {
        let names = NamesIn::from_iter([(1, vec![b"a".to_vec(), b"b".to_vec()])]);
        let has_others = |payload: &[u8]| has_only_other_names(payload, &names);
        assert_eq!(has_others(&[FILE, 1, b'a']), Some(false));
        assert_eq!(has_others(&[DIR, 2, b'a']), Some(true));
        assert_eq!(
            has_others(&[FILE | VERSION, 5, 0, 0, 0, 1, b'c']),
            Some(true)
        );
        assert_eq!(has_others(&[ROOT]), Some(false));
        let links = |one: &[u8]| {
            let place = Place::File(vec![(3, b"a".to_vec()), (1, one.to_vec())]);
            let encoded = super::super::encode(&place);
            has_others(&[&[OTHER], &encoded[..]].concat())
        };
        assert_eq!((links(b"b"), links(b"c")), (Some(false), Some(true)));
        assert_eq!(has_others(&[9]), None);
    }
}
