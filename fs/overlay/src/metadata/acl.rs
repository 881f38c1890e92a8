//! Mapping of the ids in POSIX ACLs.

use crate::idmap::IdMap;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT};
use cowl_layers::sys::stat::Stat;

/// The tag of an entry for a user.
const USER: u16 = 0x02;
/// The tag of an entry for a group.
const GROUP: u16 = 0x08;

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

/// Whether the mode and the ACL of an object permit another user than its owner to write to it (the kernel's
/// posix_acl_permission). `is_user` and `is_member` decide about ids on disk.
pub(super) fn permits_write(
    stat: &Stat,
    acl: Option<&[u8]>,
    is_user: impl Fn(u32) -> bool,
    is_member: impl Fn(u32) -> Result<bool>,
) -> Result<bool> {
    const GROUP_OBJ: u16 = 0x04;
    const WRITE: u16 = 2;
    let entries = acl.and_then(|acl| acl.split_first_chunk::<4>());
    let (entries, _) = entries.map_or(&[][..], |(_, rest)| rest).as_chunks::<8>();
    let entries = entries.iter().map(|entry| {
        let [t0, t1, p0, p1, i0, i1, i2, i3] = *entry;
        let permits = u16::from_le_bytes([p0, p1]) & WRITE != 0;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        (u16::from_le_bytes([t0, t1]), permits, id)
    });
    // With an ACL, the bits of the group are the mask of all entries except those of the owner and of others.
    let unmasked = stat.perm() & 0o020 != 0;
    let mut of_groups = None;
    for (tag, permits, id) in entries {
        match tag {
            USER if is_user(id) => return Ok(permits && unmasked),
            GROUP_OBJ if is_member(stat.gid)? => {
                of_groups = Some(permits || of_groups == Some(true));
            }
            GROUP if is_member(id)? => of_groups = Some(permits || of_groups == Some(true)),
            _ => {}
        }
    }
    if acl.is_none() && is_member(stat.gid)? {
        of_groups = Some(true);
    }
    Ok(match of_groups {
        Some(permits) => permits && unmasked,
        None => stat.perm() & 0o002 != 0,
    })
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

    #[test]
    fn the_entry_of_the_caller_decides_about_a_write() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let stat = cowl_layers::sys::stat::stat_fd(file.as_file()).unwrap();
        // Tag, permissions and id: the owner, user 7, the group, group 8, group 9, the mask, and others.
        let entries = [
            (0x01, 6, u32::MAX),
            (0x02, 4, 7),
            (0x04, 4, u32::MAX),
            (0x08, 6, 8),
            (0x08, 4, 9),
            (0x10, 7, u32::MAX),
            (0x20, 4, u32::MAX),
        ];
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            acl.extend(u16::to_le_bytes(tag));
            acl.extend(u16::to_le_bytes(permissions));
            acl.extend(u32::to_le_bytes(id));
        }
        let own = stat.gid;
        for (mode, acl, user, groups, wanted) in [
            (0o664, None, 5, vec![], false),
            (0o664, None, 5, vec![own], true),
            (0o666, None, 5, vec![], true),
            (0o646, None, 5, vec![own], false),
            (0o664, Some(&acl), 5, vec![], false),
            (0o664, Some(&acl), 7, vec![8], false),
            (0o664, Some(&acl), 5, vec![own], false),
            (0o664, Some(&acl), 5, vec![9], false),
            (0o664, Some(&acl), 5, vec![9, 8], true),
            (0o644, Some(&acl), 5, vec![8], false),
            (0o646, Some(&acl), 5, vec![], true),
        ] {
            let mut stat = stat;
            stat.mode = stat.mode & !0o7777 | mode;
            let is_member = |gid| Ok(groups.contains(&gid));
            let found = permits_write(&stat, acl.map(Vec::as_slice), |uid| uid == user, is_member);
            assert_eq!(found, Ok(wanted), "{mode:o} {user} {groups:?}");
        }
    }
}
