//! Mapping of the id in file capabilities: the user that is root where they have an effect.
//!
//! The value is a word with a version, two pairs of sets, and in version 3 the id (`vfs_ns_cap_data` in the kernel's
//! linux/capability.h). In version 2, the id is that of root in the user namespace of the process that passes the value.

use std::borrow::Cow;

use crate::idmap::IdMap;
use cowl_layers::error::{Errno, Error, Result};

/// The version in the last byte of the first word.
const VERSION_2: u8 = 2;
const VERSION_3: u8 = 3;
/// The size of the word and the sets.
const SETS: usize = 20;

/// Returns the value to store; EPERM if its id is not mapped, as setxattr(2) returns it. A malformed value is unchanged.
pub(super) fn to_disk<'v>(value: &'v [u8], uids: &IdMap) -> Result<Cow<'v, [u8]>> {
    let id = match parse(value) {
        _ if !uids.has_ranges() => return Ok(Cow::Borrowed(value)),
        Some(Some(id)) => uids.to_disk(id).ok_or(Error::Errno(Errno::PERM))?,
        Some(None) => match uids.to_disk(0) {
            // The kernel stores the value for root of the namespace of this process.
            None | Some(0) => return Ok(Cow::Borrowed(value)),
            Some(id) => id,
        },
        None => return Ok(Cow::Borrowed(value)),
    };
    Ok(Cow::Owned(with_id(value, id)))
}

/// Returns the value that is visible on the mount for one on disk.
pub(super) fn to_mount(value: Vec<u8>, uids: &IdMap) -> Vec<u8> {
    match parse(&value) {
        Some(Some(id)) if uids.has_ranges() => with_id(&value, uids.to_mount(id)),
        _ => value,
    }
}

/// Returns the id in a value, which version 2 lacks; `None` for a malformed value.
fn parse(value: &[u8]) -> Option<Option<u32>> {
    let (sets, id) = value.split_first_chunk::<SETS>()?;
    let [_, _, _, version, ..] = *sets;
    match (version, id) {
        (VERSION_2, []) => Some(None),
        (VERSION_3, [a, b, c, d]) => Some(Some(u32::from_le_bytes([*a, *b, *c, *d]))),
        _ => None,
    }
}

/// Returns a value of version 3 with the sets of `value`.
fn with_id(value: &[u8], id: u32) -> Vec<u8> {
    let mut new: Vec<u8> = value.iter().copied().take(SETS).collect();
    if let Some(version) = new.get_mut(3) {
        *version = VERSION_3;
    }
    new.extend_from_slice(&id.to_le_bytes());
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_root_is_mapped_both_ways() {
        let map = IdMap::new(IdMap::parse("1:0:10").unwrap(), None);
        let sets = |version: u8| [&[1, 0, 0, version][..], &[7; 16]].concat();
        let third = |id: u32| [sets(3), id.to_le_bytes().to_vec()].concat();
        assert_eq!(to_disk(&sets(2), &map).unwrap(), third(1));
        assert_eq!(to_disk(&third(4), &map).unwrap(), third(5));
        assert_eq!(to_disk(&third(10), &map), Err(Error::Errno(Errno::PERM)));
        assert_eq!(to_mount(third(1), &map), third(0));
        assert_eq!(to_mount(sets(2), &map), sets(2));
        for odd in [&b""[..], &[2; 19], &third(1)[..23], &sets(1)] {
            assert_eq!(to_disk(odd, &map).unwrap(), odd);
            assert_eq!(to_mount(odd.to_vec(), &map), odd);
        }
        // Ids of the machine, visible as others: root of the machine is not mapped.
        let other = IdMap::new(IdMap::parse("0:1000:10").unwrap(), None);
        assert_eq!(to_disk(&sets(2), &other).unwrap(), sets(2));
        assert_eq!(to_mount(third(0), &other), third(1000));
        let none = IdMap::default();
        assert_eq!(to_disk(&sets(2), &none).unwrap(), sets(2));
        assert_eq!(to_mount(third(3), &none), third(3));
    }
}
