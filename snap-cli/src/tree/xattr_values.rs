//! The values of xattrs that the kernel interprets: whether any Linux system stores them. No I/O.

use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT};

/// The xattr with the capabilities of a program.
const CAPABILITY: &[u8] = b"security.capability";

/// Returns why no file system stores this value, if that is so.
pub(crate) fn invalid(name: &[u8], value: &[u8]) -> Option<&'static str> {
    let is_acl = name == ACL_ACCESS || name == ACL_DEFAULT;
    if is_acl && !is_acl_value(value) {
        return Some("skipped an invalid ACL");
    }
    (name == CAPABILITY && !is_capability_value(value)).then_some("skipped invalid capabilities")
}

/// The first bytes of an ACL in binary form: `POSIX_ACL_XATTR_VERSION`.
const ACL_VERSION: [u8; 4] = 2_u32.to_le_bytes();

/// Returns whether posix_acl_valid() of the kernel accepts an ACL, apart from its ids.
fn is_acl_value(value: &[u8]) -> bool {
    if value.is_empty() {
        // Removes the ACL.
        return true;
    }
    let Some((&ACL_VERSION, entries)) = value.split_first_chunk() else {
        return false;
    };
    let (entries, []) = entries.as_chunks::<8>() else {
        return false;
    };
    // The tags in their order: owner, named users, owning group, named groups, mask, others.
    let tags: Vec<u16> = entries
        .iter()
        .map(|&[low, high, ..]| u16::from_le_bytes([low, high]))
        .collect();
    let count = |tag| tags.iter().filter(|&&other| other == tag).count();
    let (named, masks) = (count(0x02) + count(0x08), count(0x10));
    let has_valid_bits = |&[_, _, low, high, ..]: &[u8; 8]| low <= 7 && high == 0;
    entries.is_empty()
        || entries.iter().all(has_valid_bits)
            && tags.is_sorted()
            && [0x01, 0x04, 0x20].into_iter().all(|tag| count(tag) == 1)
            && (masks == 1 || masks == 0 && named == 0)
            && 3 + named + masks == tags.len()
}

/// The permission bits of an object with an access ACL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AclPerms {
    /// The mode with the ACL, whose group bits are the mask.
    pub(crate) with_mask: u32,
    /// The mode that grants no more without the ACL: the group bits are the effective rights of the owning group.
    pub(crate) without_acl: u32,
}

/// Returns the permission bits that a valid access ACL implies; `None` for an empty one.
pub(crate) fn acl_perms(value: &[u8]) -> Option<AclPerms> {
    let (_, entries) = value.split_first_chunk::<4>()?;
    let (entries, _) = entries.as_chunks::<8>();
    let bits = |tag: u8| {
        let mut found = entries.iter().filter(|&&[low, ..]| low == tag);
        found.next().map(|&[_, _, bits, ..]| u32::from(bits & 7))
    };
    let (owner, group, other) = (bits(0x01)?, bits(0x04)?, bits(0x20)?);
    let mask = bits(0x10);
    let mode = |group: u32| (owner << 6) | (group << 3) | other;
    Some(AclPerms {
        with_mask: mode(mask.unwrap_or(group)),
        without_acl: mode(group & mask.unwrap_or(group)),
    })
}

/// Returns whether cap_convert_nscap() of the kernel accepts capabilities: version 2, or version 3 with the id of a
/// user namespace's root.
fn is_capability_value(value: &[u8]) -> bool {
    const EFFECTIVE: u32 = 1;
    let Some((&magic, rest)) = value.split_first_chunk() else {
        return false;
    };
    match u32::from_le_bytes(magic) & !EFFECTIVE {
        0x0200_0000 => rest.len() == 16,
        0x0300_0000 => rest.len() == 20,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use cowl_layers::error::Errno;
    use cowl_layers::sys::xattr;

    fn acl(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut value = ACL_VERSION.to_vec();
        for (tag, bits) in entries {
            let id = if matches!(tag, 0x02 | 0x08) {
                1000
            } else {
                u32::MAX
            };
            value.extend([tag.to_le_bytes(), bits.to_le_bytes()].concat());
            value.extend(id.to_le_bytes());
        }
        value
    }

    #[test]
    fn mode_follows_from_the_acl() {
        let perms = |entries: &[_]| {
            acl_perms(&acl(entries)).map(|perms| (perms.with_mask, perms.without_acl))
        };
        let (user, group, other) = ((0x01, 7), (0x04, 6), (0x20, 1));
        let (named, mask) = ((0x02, 7), (0x10, 5));
        assert_eq!(perms(&[user, group, other]), Some((0o761, 0o761)));
        assert_eq!(
            perms(&[user, named, group, mask, other]),
            Some((0o751, 0o741))
        );
        assert_eq!(perms(&[]), None);
        assert_eq!(acl_perms(b""), None);
    }

    /// Where the file system stores ACLs, the kernel accepts the same values.
    #[test]
    fn values_are_valid_if_the_kernel_accepts_them() {
        let (user, group, other) = ((0x01, 7), (0x04, 5), (0x20, 0));
        let (named, named_group, mask) = ((0x02, 7), (0x08, 7), (0x10, 7));
        let capability = |magic: u32, len| [&magic.to_le_bytes()[..], &vec![0; len]].concat();
        let access = |entries: &[_]| (ACL_ACCESS, acl(entries));
        let cut = |len| (ACL_ACCESS, acl(&[user, group, other])[..len].to_vec());
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        for ((name, value), want) in [
            (access(&[user, group, other]), true),
            (
                access(&[user, named, named, group, named_group, mask, other]),
                true,
            ),
            (access(&[user, group, mask, other]), true),
            (access(&[]), true),
            (access(&[user, named, group, other]), false),
            (access(&[user, group, mask, mask, other]), false),
            (access(&[group, user, other]), false),
            (access(&[user, user, group, other]), false),
            (access(&[user, group]), false),
            (access(&[user, (0x04, 8), other]), false),
            (access(&[user, group, (0x40, 0), other]), false),
            (cut(0), true),
            (cut(3), false),
            (cut(4), true),
            (cut(27), false),
            ((ACL_ACCESS, b"\x01\0\0\0".to_vec()), false),
            ((CAPABILITY, capability(0x0200_0000, 16)), true),
            ((CAPABILITY, capability(0x0200_0001, 16)), true),
            ((CAPABILITY, capability(0x0300_0000, 20)), true),
            ((CAPABILITY, capability(0x0200_0000, 20)), false),
            ((CAPABILITY, capability(0x0100_0000, 8)), false),
            ((CAPABILITY, capability(0x0200_0002, 16)), false),
            ((CAPABILITY, b"gar".to_vec()), false),
            ((b"user.x", b"anything".to_vec()), true),
        ] {
            assert_eq!(invalid(name, &value).is_none(), want, "{value:?}");
            let set = xattr::set(file.as_fd(), name, &value);
            match set.map_err(|error| error.errno()) {
                Ok(()) => assert!(want, "{value:?}"),
                Err(Errno::INVAL) => assert!(!want, "{value:?}"),
                // Without ACLs on this file system, or without privileges.
                Err(_) => {}
            }
        }
    }
}
