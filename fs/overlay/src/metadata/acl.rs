//! Mapping of the ids in POSIX ACLs.

use crate::idmap::IdMap;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT};

/// Whether an xattr is a POSIX ACL.
pub(super) fn is_acl(name: &[u8]) -> bool {
    name == ACL_ACCESS || name == ACL_DEFAULT
}

/// Maps the ids in the value of an ACL; EINVAL if the value is malformed or `map` returns `None`.
///
/// The value is a version word, followed by entries of tag, permissions and id (the kernel's posix_acl_xattr.h).
pub(super) fn map_acl(
    value: &[u8],
    map: impl Fn(&IdMap, u32) -> Option<u32>,
    uids: &IdMap,
    gids: &IdMap,
) -> Result<Vec<u8>> {
    const USER: u16 = 0x02;
    const GROUP: u16 = 0x08;
    let invalid = Error::Errno(Errno::INVAL);
    let (version, entries) = value.split_first_chunk::<4>().ok_or(invalid)?;
    let (entries, rest) = entries.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(invalid);
    }
    let mut mapped = version.to_vec();
    for entry in entries {
        let [t0, t1, p0, p1, i0, i1, i2, i3] = *entry;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let id = match u16::from_le_bytes([t0, t1]) {
            USER => map(uids, id).ok_or(invalid)?,
            GROUP => map(gids, id).ok_or(invalid)?,
            _ => id,
        };
        mapped.extend_from_slice(&[t0, t1, p0, p1]);
        mapped.extend_from_slice(&id.to_le_bytes());
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_inside_an_acl_are_mapped() {
        let map = IdMap::new(IdMap::parse("1000:0:10").unwrap(), None);
        let entry = |tag: u16, id: u32| {
            [
                &tag.to_le_bytes()[..],
                &7_u16.to_le_bytes(),
                &id.to_le_bytes(),
            ]
            .concat()
        };
        let acl = |user, group, other| {
            let parts = [entry(0x02, user), entry(0x08, group), entry(0x20, other)];
            [2_u32.to_le_bytes().to_vec(), parts.concat()].concat()
        };
        let (mount, disk) = (acl(1, 2, u32::MAX), acl(1001, 1002, u32::MAX));
        assert_eq!(map_acl(&mount, IdMap::to_disk, &map, &map).unwrap(), disk);
        let back = map_acl(&disk, |map, id| Some(map.to_mount(id)), &map, &map);
        assert_eq!(back.unwrap(), mount);
        assert!(map_acl(&disk[..7], IdMap::to_disk, &map, &map).is_err());
        assert!(map_acl(&acl(11, 0, 0), IdMap::to_disk, &map, &map).is_err());
    }
}
