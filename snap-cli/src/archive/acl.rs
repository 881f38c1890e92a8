//! POSIX ACLs: between the text that tar archives carry and the binary form of the kernel's
//! `system.posix_acl_*` attributes. Pure; names of users are looked up only where the text has no
//! number.

use super::limits;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// One entry: tag, permissions (rwx as 4, 2, 1), and the id of a named user or group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    tag: u16,
    id: u32,
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

/// The binary form of an ACL that is written as text (short or long, by comma or by line, with
/// star's fourth field or without). The error says what is wrong with it, and has no path yet.
pub(super) fn from_text(text: &[u8]) -> Result<Vec<u8>> {
    parse(text).map_err(|what| match what {
        Wrong::Damaged(what) => {
            TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}"))
        }
        Wrong::TooMany => TreeError::new(
            ErrorKind::Limit,
            format!(
                "the ACL has more than {} entries, which is the limit",
                limits::ACL_ENTRIES
            ),
        ),
    })
}

enum Wrong {
    Damaged(String),
    TooMany,
}

fn parse(text: &[u8]) -> Result<Vec<u8>, Wrong> {
    let mut entries = Vec::new();
    for line in text.split(|&byte| byte == b',' || byte == b'\n') {
        let line = line.split(|&byte| byte == b'#').next().unwrap_or_default();
        let line = line.trim_ascii();
        if !line.is_empty() {
            // One more may come: the mask.
            if entries.len() + 1 >= limits::ACL_ENTRIES {
                return Err(Wrong::TooMany);
            }
            entries.push(entry(line).map_err(Wrong::Damaged)?);
        }
    }
    if !entries.iter().any(|e| e.tag == MASK) && entries.iter().any(|e| e.tag & (USER | GROUP) != 0)
    {
        // As setfacl does: the mask that takes nothing away.
        let group_class = USER | GROUP | GROUP_OBJ;
        let perm = entries
            .iter()
            .filter(|e| e.tag & group_class != 0)
            .fold(0, |all, e| all | e.perm);
        entries.push(Entry {
            tag: MASK,
            id: NO_ID,
            perm,
        });
    }
    entries.sort_unstable();
    for required in [USER_OBJ, GROUP_OBJ, OTHER] {
        if entries.iter().filter(|e| e.tag == required).count() != 1 {
            let what = "owner, group and others must each be there once";
            return Err(Wrong::Damaged(what.to_owned()));
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

fn entry(line: &[u8]) -> Result<Entry, String> {
    let bad = || {
        let start = line.get(..80).unwrap_or(line);
        format!("'{}' is no ACL entry", start.escape_ascii())
    };
    let mut fields = line.split(|&byte| byte == b':');
    let tag = fields.next().unwrap_or_default();
    let second = fields.next().ok_or_else(bad)?;
    let third = fields.next();
    let fourth = fields.next();
    // "mask:rwx" and "other:rwx" may leave the empty qualifier out.
    let (qualifier, perm) = match third {
        Some(perm) => (second, perm),
        None => (&b""[..], second),
    };
    let perm = permissions(perm).ok_or_else(bad)?;
    let named = !qualifier.is_empty();
    let (tag, id) = match (tag, named) {
        (b"user" | b"u", false) => (USER_OBJ, NO_ID),
        (b"group" | b"g", false) => (GROUP_OBJ, NO_ID),
        (b"mask" | b"m", false) => (MASK, NO_ID),
        (b"other" | b"o", false) => (OTHER, NO_ID),
        (b"user" | b"u", true) => (USER, id(qualifier, fourth, user_id)?),
        (b"group" | b"g", true) => (GROUP, id(qualifier, fourth, group_id)?),
        _ => return Err(bad()),
    };
    Ok(Entry { tag, id, perm })
}

fn permissions(text: &[u8]) -> Option<u16> {
    text.iter().try_fold(0, |perm, byte| match byte {
        b'r' => Some(perm | 4),
        b'w' => Some(perm | 2),
        b'x' => Some(perm | 1),
        b'-' => Some(perm),
        _ => None,
    })
}

fn id(
    name: &[u8],
    number: Option<&[u8]>,
    look_up: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    let number_in = |bytes: &[u8]| str::from_utf8(bytes).map_or(None, |text| text.parse().ok());
    let known = number
        .and_then(number_in)
        .or_else(|| number_in(name))
        .map_or_else(
            || str::from_utf8(name).map_or(Ok(None), look_up),
            |id| Ok(Some(id)),
        );
    let name = name.get(..80).unwrap_or(name).escape_ascii();
    match known {
        Ok(Some(id)) if id != NO_ID => Ok(id),
        Ok(_) => Err(format!(
            "the ACL names '{name}', who is unknown here (pack with --numeric-owner)"
        )),
        Err(error) => Err(format!(
            "can't look up '{name}', whom the ACL names: {error}"
        )),
    }
}

fn user_id(name: &str) -> nix::Result<Option<u32>> {
    Ok(nix::unistd::User::from_name(name)?.map(|user| user.uid.as_raw()))
}

fn group_id(name: &str) -> nix::Result<Option<u32>> {
    Ok(nix::unistd::Group::from_name(name)?.map(|group| group.gid.as_raw()))
}

/// The text form with numbers for names, one comma-separated line; `None` when `binary` is no ACL.
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
        let who = match u16::from_le_bytes(*tag) {
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
            "{who}:{}{}{}",
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
    fn text_and_binary_are_the_same_thing() {
        let text =
            b"user::rwx,user:1000:r--,user:70000:rw-,group::r-x,group:5:--x,mask::rwx,other::r--";
        let binary = from_text(text).unwrap();
        assert_eq!(binary.len(), 4 + 7 * 8);
        assert_eq!(to_text(&binary).unwrap(), text);
    }

    #[test]
    fn other_ways_of_writing_it() {
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
    fn a_mask_is_made_where_one_is_needed() {
        let made = from_text(b"user::rw-,user:7:r-x,group::-w-,other::---").unwrap();
        let want = b"user::rw-,user:7:r-x,group::-w-,mask::rwx,other::---";
        assert_eq!(to_text(&made).unwrap(), want);
    }

    #[test]
    fn nonsense_is_refused() {
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
