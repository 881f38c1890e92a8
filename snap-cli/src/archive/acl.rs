//! Converts POSIX ACLs between the text form of tar archives and the binary form of the `system.posix_acl_*` xattrs.
//!
//! No I/O.

use super::{limits, pax};

/// An entry of an ACL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct AclEntry {
    tag: u16,
    /// The id of a named user or group, or [`NO_ID`].
    id: u32,
    /// The permissions: r is 4, w is 2, x is 1.
    perm: u16,
}

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;
const NO_ID: u32 = u32::MAX;
const VERSION: u32 = 2;

/// An ACL that an archive contains as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AclValue {
    /// In binary form.
    Binary(Vec<u8>),
    /// As text, because it has entries for users or groups without an id.
    Text(Vec<u8>),
}

/// The kind of a name in an ACL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum AclName {
    User,
    Group,
}

/// The problem of an ACL in text form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AclProblem {
    /// It is not an ACL.
    Invalid,
    /// It has more than [`limits::ACL_ENTRIES`] entries.
    TooMany,
}

/// Converts an ACL from text to binary form, unless it contains names.
///
/// Accepted are the short and the long form, commas or newlines as separators, and the fourth field that star adds.
pub(super) fn from_text(text: &[u8]) -> Result<AclValue, AclProblem> {
    let mut has_names = false;
    let binary = from_text_with(text, &mut |_, _| {
        has_names = true;
        None
    })?;
    Ok(match has_names {
        true => AclValue::Text(text.to_vec()),
        false => AclValue::Binary(binary),
    })
}

/// Converts an ACL from text to binary form. `id_of` returns the id of a user or group; an entry for which it returns
/// `None` is dropped.
pub(super) fn from_text_with(
    text: &[u8],
    id_of: &mut dyn FnMut(AclName, &[u8]) -> Option<u32>,
) -> Result<Vec<u8>, AclProblem> {
    let mut entries = Vec::new();
    let mut count = 0;
    for line in text.split(|&byte| byte == b',' || byte == b'\n') {
        let line = line.split(|&byte| byte == b'#').next().unwrap_or_default();
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        count += 1;
        // The mask may be added.
        if count >= limits::ACL_ENTRIES {
            return Err(AclProblem::TooMany);
        }
        entries.extend(parse_entry(line, id_of).ok_or(AclProblem::Invalid)?);
    }
    if !entries.iter().any(|e| e.tag == MASK) && entries.iter().any(|e| e.tag & (USER | GROUP) != 0)
    {
        // Like setfacl, add the mask that restricts nothing.
        let group_class = USER | GROUP | GROUP_OBJ;
        let perm = entries
            .iter()
            .filter(|e| e.tag & group_class != 0)
            .fold(0, |all, e| all | e.perm);
        entries.push(AclEntry {
            tag: MASK,
            id: NO_ID,
            perm,
        });
    }
    entries.sort_unstable();
    for required in [USER_OBJ, GROUP_OBJ, OTHER] {
        if entries.iter().filter(|e| e.tag == required).count() != 1 {
            return Err(AclProblem::Invalid);
        }
    }
    let mut binary = VERSION.to_le_bytes().to_vec();
    for e in entries {
        binary.extend_from_slice(&e.tag.to_le_bytes());
        binary.extend_from_slice(&e.perm.to_le_bytes());
        binary.extend_from_slice(&e.id.to_le_bytes());
    }
    Ok(binary)
}

/// Parses an entry: `None` if it is invalid, `Some(None)` if it is for an unknown user or group.
fn parse_entry(
    line: &[u8],
    id_of: &mut dyn FnMut(AclName, &[u8]) -> Option<u32>,
) -> Option<Option<AclEntry>> {
    let mut fields = line.split(|&byte| byte == b':');
    let tag = fields.next()?;
    let second = fields.next()?;
    let third = fields.next();
    let fourth = fields.next();
    // The empty qualifier is optional in "mask:rwx" and "other:rwx".
    let (qualifier, perm) = match third {
        Some(perm) => (second, perm),
        None => (&b""[..], second),
    };
    let perm = parse_permissions(perm)?;
    let mut id = |kind| match parse_id(fourth, qualifier) {
        Some(id) => Some(id),
        None => id_of(kind, qualifier),
    };
    let named = !qualifier.is_empty();
    let (tag, id) = match (tag, named) {
        (b"user" | b"u", false) => (USER_OBJ, Some(NO_ID)),
        (b"group" | b"g", false) => (GROUP_OBJ, Some(NO_ID)),
        (b"mask" | b"m", false) => (MASK, Some(NO_ID)),
        (b"other" | b"o", false) => (OTHER, Some(NO_ID)),
        (b"user" | b"u", true) => (USER, id(AclName::User)),
        (b"group" | b"g", true) => (GROUP, id(AclName::Group)),
        _ => return None,
    };
    Some(id.map(|id| AclEntry { tag, id, perm }))
}

/// Returns the id that the text of an entry contains. The superuser has the same id in every root filesystem.
pub(super) fn parse_id(number: Option<&[u8]>, name: &[u8]) -> Option<u32> {
    let parse = |bytes: &[u8]| match pax::decimal(bytes) {
        Some(id) => u32::try_from(id).ok().filter(|&id| id != NO_ID),
        None => None,
    };
    number
        .and_then(parse)
        .or_else(|| parse(name))
        .or_else(|| (name == b"root").then_some(0))
}

fn parse_permissions(text: &[u8]) -> Option<u16> {
    text.iter().try_fold(0, |perm, byte| match byte {
        b'r' => Some(perm | 4),
        b'w' => Some(perm | 2),
        b'x' => Some(perm | 1),
        b'-' => Some(perm),
        _ => None,
    })
}

/// Converts an ACL from binary to text form: one comma-separated line with numeric ids.
///
/// Returns `None` if `binary` is not a valid ACL.
pub(super) fn to_text(binary: &[u8]) -> Option<Vec<u8>> {
    let (version, entries) = binary.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != VERSION || entries.len() % 8 != 0 {
        return None;
    }
    let mut lines = Vec::new();
    for chunk in entries.chunks_exact(8) {
        let (tag, rest) = chunk.split_first_chunk::<2>()?;
        let (perm, id) = rest.split_first_chunk::<2>()?;
        let id = u32::from_le_bytes(id.try_into().ok()?);
        let perm = u16::from_le_bytes(*perm);
        let qualified_tag = match u16::from_le_bytes(*tag) {
            USER_OBJ => "user:".to_owned(),
            USER => format!("user:{id}"),
            GROUP_OBJ => "group:".to_owned(),
            GROUP => format!("group:{id}"),
            MASK => "mask:".to_owned(),
            OTHER => "other:".to_owned(),
            _ => return None,
        };
        let bit = |mask, letter| if perm & mask != 0 { letter } else { '-' };
        lines.push(format!(
            "{qualified_tag}:{}{}{}",
            bit(4, 'r'),
            bit(2, 'w'),
            bit(1, 'x')
        ));
    }
    Some(lines.join(",").into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(text: &[u8]) -> Vec<u8> {
        match from_text(text).unwrap() {
            AclValue::Binary(binary) => binary,
            AclValue::Text(_) => panic!("{} has names", text.escape_ascii()),
        }
    }

    #[test]
    fn text_and_binary_round_trip() {
        let text =
            b"user::rwx,user:1000:r--,user:70000:rw-,group::r-x,group:5:--x,mask::rwx,other::r--";
        let binary = binary(text);
        assert_eq!(binary.len(), 4 + 7 * 8);
        assert_eq!(to_text(&binary).unwrap(), text);
    }

    #[test]
    fn accepts_other_text_forms() {
        let want = binary(b"user::rw-,user:0:r--,group::r--,mask::rw-,other::---");
        for same in [
            &b"other:---\nmask:rw-\ngroup::r--\nuser:root:r--\nuser::rw-\n"[..],
            b"u::rw,g::r,o::,u:nobody-has-this-name:r:0,m::rw",
            b"user::rw-\nuser:0:r--\t#effective:r--\ngroup::r--\nmask::rw-\nother::---",
        ] {
            assert_eq!(binary(same), want, "{}", same.escape_ascii());
        }
    }

    #[test]
    fn missing_mask_is_added() {
        let made = binary(b"user::rw-,user:7:r-x,group::-w-,other::---");
        let want = b"user::rw-,user:7:r-x,group::-w-,mask::rwx,other::---";
        assert_eq!(to_text(&made).unwrap(), want);
    }

    #[test]
    fn names_are_resolved_later_and_unknown_ones_dropped() {
        let text = b"user::rwx,user:joe:r--,group:staff:-w-,user:nobody-has-this-name:rwx,\
            group::---,mask::rwx,other::---";
        assert_eq!(from_text(text).unwrap(), AclValue::Text(text.to_vec()));
        let made = from_text_with(text, &mut |kind, name| match (kind, name) {
            (AclName::User, b"joe") => Some(7),
            (AclName::Group, b"staff") => Some(8),
            _ => None,
        });
        let want = b"user::rwx,user:7:r--,group::---,group:8:-w-,mask::rwx,other::---";
        assert_eq!(to_text(&made.unwrap()).unwrap(), want);
    }

    #[test]
    fn invalid_text_is_refused() {
        for bad in [
            &b"hello"[..],
            b"user::rwz,group::r--,other::r--",
            b"user::rwx,group::r--",
            b"user::rwx,user::rwx,group::r--,other::r--",
            b"user::rwx,user:joe:r--,group::r--",
            b"owner@:rwxp--aARWcCos:-------:allow",
        ] {
            let got = from_text(bad);
            assert_eq!(got, Err(AclProblem::Invalid), "{}", bad.escape_ascii());
        }
        let many = b"user::rwx,group::r--,other::r--".to_vec();
        for entry in [&b",u:1:r"[..], b",u:joe:r"] {
            let many = [many.clone(), entry.repeat(limits::ACL_ENTRIES)].concat();
            assert_eq!(from_text(&many), Err(AclProblem::TooMany));
        }
        assert_eq!(to_text(b"\x01\0\0\0"), None);
        assert_eq!(to_text(b"\x02\0\0\0abc"), None);
    }
}
