//! Converts POSIX ACLs between the text form of tar archives and the binary form of the `system.posix_acl_*` xattrs.
//!
//! No I/O, except that the names of users and groups are looked up where the text has no id.

use super::limits;
use crate::tree::error::{ErrorKind, Result, TreeError};
use cowl_layers::shown::Show as _;

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

/// Converts an ACL from text to binary form.
///
/// Accepted are the short and the long form, commas or newlines as separators, and the fourth field that star adds.
/// The error describes the syntax error, and has no path yet.
pub(super) fn from_text(text: &[u8]) -> Result<Vec<u8>> {
    parse(text).map_err(|error| match error {
        AclError::Damaged(what) => {
            TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}"))
        }
        AclError::TooMany => TreeError::new(
            ErrorKind::Limit,
            format!(
                "the ACL has more than {} entries, which is the limit",
                limits::ACL_ENTRIES
            ),
        ),
    })
}

enum AclError {
    Damaged(String),
    TooMany,
}

fn parse(text: &[u8]) -> Result<Vec<u8>, AclError> {
    let mut entries = Vec::new();
    for line in text.split(|&byte| byte == b',' || byte == b'\n') {
        let line = line.split(|&byte| byte == b'#').next().unwrap_or_default();
        let line = line.trim_ascii();
        if !line.is_empty() {
            // The mask may be added.
            if entries.len() + 1 >= limits::ACL_ENTRIES {
                return Err(AclError::TooMany);
            }
            entries.push(parse_entry(line).map_err(AclError::Damaged)?);
        }
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
            let what = "an ACL must have exactly one entry for owner, group and others each";
            return Err(AclError::Damaged(what.to_owned()));
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

fn parse_entry(line: &[u8]) -> Result<AclEntry, String> {
    let bad = || {
        let start = line.get(..80).unwrap_or(line);
        format!("'{}' is not an ACL entry", start.shown())
    };
    let mut fields = line.split(|&byte| byte == b':');
    let tag = fields.next().unwrap_or_default();
    let second = fields.next().ok_or_else(bad)?;
    let third = fields.next();
    let fourth = fields.next();
    // The empty qualifier is optional in "mask:rwx" and "other:rwx".
    let (qualifier, perm) = match third {
        Some(perm) => (second, perm),
        None => (&b""[..], second),
    };
    let perm = parse_permissions(perm).ok_or_else(bad)?;
    let named = !qualifier.is_empty();
    let (tag, id) = match (tag, named) {
        (b"user" | b"u", false) => (USER_OBJ, NO_ID),
        (b"group" | b"g", false) => (GROUP_OBJ, NO_ID),
        (b"mask" | b"m", false) => (MASK, NO_ID),
        (b"other" | b"o", false) => (OTHER, NO_ID),
        (b"user" | b"u", true) => (USER, resolve_id(qualifier, fourth, user_id)?),
        (b"group" | b"g", true) => (GROUP, resolve_id(qualifier, fourth, group_id)?),
        _ => return Err(bad()),
    };
    Ok(AclEntry { tag, id, perm })
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

fn resolve_id(
    name: &[u8],
    number: Option<&[u8]>,
    look_up: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    let parse_number = |bytes: &[u8]| str::from_utf8(bytes).map_or(None, |text| text.parse().ok());
    let known = number
        .and_then(parse_number)
        .or_else(|| parse_number(name))
        .map_or_else(
            || str::from_utf8(name).map_or(Ok(None), look_up),
            |id| Ok(Some(id)),
        );
    let name = name.get(..80).unwrap_or(name).escape_ascii();
    match known {
        Ok(Some(id)) if id != NO_ID => Ok(id),
        Ok(_) => Err(format!(
            "the ACL contains the unknown user or group '{name}'; create the archive with --numeric-owner"
        )),
        Err(error) => Err(format!("cannot look up '{name}' of the ACL: {error}")),
    }
}

fn user_id(name: &str) -> nix::Result<Option<u32>> {
    Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw()))
}

fn group_id(name: &str) -> nix::Result<Option<u32>> {
    Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()))
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

    #[test]
    fn text_and_binary_round_trip() {
        let text =
            b"user::rwx,user:1000:r--,user:70000:rw-,group::r-x,group:5:--x,mask::rwx,other::r--";
        let binary = from_text(text).unwrap();
        assert_eq!(binary.len(), 4 + 7 * 8);
        assert_eq!(to_text(&binary).unwrap(), text);
    }

    #[test]
    fn accepts_other_text_forms() {
        let want = from_text(b"user::rw-,user:0:r--,group::r--,mask::rw-,other::---").unwrap();
        for same in [
            &b"other:---\nmask:rw-\ngroup::r--\nuser:root:r--\nuser::rw-\n"[..],
            b"u::rw,g::r,o::,u:nobody-has-this-name:r:0,m::rw",
            b"user::rw-\nuser:0:r--\t#effective:r--\ngroup::r--\nmask::rw-\nother::---",
        ] {
            assert_eq!(from_text(same).unwrap(), want, "{}", same.escape_ascii());
        }
    }

    #[test]
    fn missing_mask_is_added() {
        let made = from_text(b"user::rw-,user:7:r-x,group::-w-,other::---").unwrap();
        let want = b"user::rw-,user:7:r-x,group::-w-,mask::rwx,other::---";
        assert_eq!(to_text(&made).unwrap(), want);
    }

    #[test]
    fn invalid_text_is_refused() {
        for bad in [
            &b"hello"[..],
            b"user::rwz,group::r--,other::r--",
            b"user::rwx,group::r--",
            b"user::rwx,user::rwx,group::r--,other::r--",
            b"user::rwx,user:nobody-has-this-name:r--,group::r--,other::r--",
        ] {
            assert!(from_text(bad).is_err(), "{}", bad.escape_ascii());
        }
        let many = b"user::rwx,group::r--,other::r--".to_vec();
        let many = [many, b",u:1:r".repeat(limits::ACL_ENTRIES)].concat();
        assert_eq!(from_text(&many).unwrap_err().kind(), ErrorKind::Limit);
        assert_eq!(to_text(b"\x01\0\0\0"), None);
        assert_eq!(to_text(b"\x02\0\0\0abc"), None);
    }
}
