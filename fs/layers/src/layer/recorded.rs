//! The xattr `cowl.recorded`: attributes that could not be stored, and those that the object has instead.
//!
//! A user without privileges can neither create devices nor set every owner or xattr. An import then stores what it
//! can, and records the original attributes. They apply only while the object has the attributes that were stored, so
//! that a change by a program in the container takes precedence without a change of the record.
//!
//! A value may come from another machine, so parsing is strict.

use std::fmt;

use crate::format::{ACL_ACCESS, ACL_DEFAULT, CAPABILITY};
use crate::sys::stat::{FileKind, Stat, Time};

/// Xattrs with their values.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// The original attributes of an object, and the attributes that were stored in their stead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedAttributes {
    /// The attributes of the object when the record was written.
    pub stored: StoredAttributes,
    /// The original type and permission bits.
    pub mode: u32,
    /// The original owner.
    pub uid: u32,
    /// The original group.
    pub gid: u32,
    /// The original device number; 0 for other types.
    pub rdev: u64,
    /// The xattrs that could not be stored, with the names that are visible on a mount, sorted.
    pub xattrs: Xattrs,
}

/// The attributes on which a record depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredAttributes {
    /// The type and the permission bits.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The size in bytes.
    pub size: u64,
    /// The time of the last change of the content.
    pub mtime: Time,
}

/// The reason why a value is not a valid record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidRecord(&'static str);

impl fmt::Display for InvalidRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// The attributes of an object after its record was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OriginalAttributes {
    /// The stat fields, of which type, mode, owner and device number may be the original ones.
    pub stat: Stat,
    /// The xattrs of the record that apply.
    pub xattrs: Xattrs,
}

const VERSION: u8 = 1;
/// The length of the part before the xattrs.
const FIXED: usize = 53;
/// The maximum length of a value (`XATTR_SIZE_MAX`).
const LARGEST: usize = 1 << 16;
/// The maximum length of the name of an xattr.
const NAME_MAX: usize = 255;
/// The bits that run a program with the privileges of its owner or group.
const SET_IDS: u32 = 0o6000;
/// The bits of a mode.
const MODE_BITS: u32 = 0o177_777;
/// The largest device numbers that Linux has.
const MAJOR_MAX: u32 = 0xfff;
const MINOR_MAX: u32 = 0xf_ffff;

impl From<&Stat> for StoredAttributes {
    fn from(stat: &Stat) -> Self {
        Self {
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            size: stat.size,
            mtime: stat.mtime,
        }
    }
}

impl RecordedAttributes {
    /// Creates the record of an object whose original attributes are those that it has.
    pub fn of(stat: &Stat) -> Self {
        Self {
            stored: StoredAttributes::from(stat),
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            rdev: 0,
            xattrs: Vec::new(),
        }
    }

    /// Adds an xattr, or replaces its value.
    pub fn set_xattr(&mut self, name: &[u8], value: &[u8]) {
        match self
            .xattrs
            .binary_search_by(|(other, _)| (**other).cmp(name))
        {
            Ok(at) => {
                if let Some((_, old)) = self.xattrs.get_mut(at) {
                    *old = value.to_vec();
                }
            }
            Err(at) => self.xattrs.insert(at, (name.to_vec(), value.to_vec())),
        }
    }

    /// Parses a value. A value of another version is invalid as well.
    pub fn parse(value: &[u8]) -> Result<Self, InvalidRecord> {
        if value.len() > LARGEST {
            return Err(InvalidRecord("it is too large"));
        }
        let mut rest = value;
        if take::<1>(&mut rest)? != [VERSION] {
            return Err(InvalidRecord("its version is unknown"));
        }
        let stored = StoredAttributes {
            mode: number(&mut rest)?,
            uid: number(&mut rest)?,
            gid: number(&mut rest)?,
            size: u64::from_le_bytes(take(&mut rest)?),
            mtime: Time {
                secs: i64::from_le_bytes(take(&mut rest)?),
                nanos: number(&mut rest)?,
            },
        };
        let record = Self {
            stored,
            mode: number(&mut rest)?,
            uid: number(&mut rest)?,
            gid: number(&mut rest)?,
            rdev: u64::from_le_bytes(take(&mut rest)?),
            xattrs: parse_xattrs(rest)?,
        };
        record.check()?;
        Ok(record)
    }

    /// Returns the value to store; `None` if it would be too large for any file system.
    pub fn to_value(&self) -> Option<Vec<u8>> {
        let mut value = Vec::with_capacity(FIXED);
        value.push(VERSION);
        let stored = &self.stored;
        for number in [stored.mode, stored.uid, stored.gid] {
            value.extend(number.to_le_bytes());
        }
        value.extend(stored.size.to_le_bytes());
        value.extend(stored.mtime.secs.to_le_bytes());
        for number in [stored.mtime.nanos, self.mode, self.uid, self.gid] {
            value.extend(number.to_le_bytes());
        }
        value.extend(self.rdev.to_le_bytes());
        for (name, content) in &self.xattrs {
            for length in [name.len(), content.len()] {
                value.extend(u16::try_from(length).ok()?.to_le_bytes());
            }
            value.extend_from_slice(name);
            value.extend_from_slice(content);
        }
        (value.len() <= LARGEST).then_some(value)
    }

    /// Returns the attributes of the object with those of the record that still apply.
    ///
    /// The original owner applies while owner and group are as stored, the original mode while the mode is, and a device
    /// remains one while the file is empty. Setuid, setgid and capabilities also require the original content, because a
    /// change of the content removes them.
    pub fn apply(&self, now: &Stat) -> OriginalAttributes {
        let (mut stat, mut xattrs) = (*now, Vec::new());
        let stored = &self.stored;
        if now.kind() != FileKind::from_mode(stored.mode) {
            return OriginalAttributes { stat, xattrs };
        }
        let kind = FileKind::from_mode(self.mode);
        let is_changed_device = is_device(kind) && now.size > 0;
        let has_owner = (now.uid, now.gid) == (stored.uid, stored.gid);
        let has_mode = now.mode == stored.mode && !is_changed_device;
        let has_content = now.kind() == FileKind::Directory
            || (now.size, now.mtime) == (stored.size, stored.mtime);
        if has_owner {
            (stat.uid, stat.gid) = (self.uid, self.gid);
        }
        if is_device(kind) && !is_changed_device {
            stat.mode = kind.mode_bits() | now.perm();
            stat.rdev = self.rdev;
        }
        if has_mode {
            stat.mode = self.mode;
            if !(has_owner && has_content) {
                stat.mode = (self.mode & !SET_IDS) | (now.mode & SET_IDS);
            }
        }
        let applies = |name: &[u8]| match name {
            // Another owner could write other content, and restore the size and the time.
            CAPABILITY => has_owner && has_content && stored.uid == 0,
            ACL_ACCESS | ACL_DEFAULT => has_mode,
            _ => !is_changed_device,
        };
        let applying = self.xattrs.iter().filter(|(name, _)| applies(name));
        xattrs.extend(applying.cloned());
        OriginalAttributes { stat, xattrs }
    }

    fn check(&self) -> Result<(), InvalidRecord> {
        let stored = &self.stored;
        let is_exact = |mode: u32| {
            mode & !MODE_BITS == 0 && FileKind::from_mode(mode).mode_bits() == mode & 0o170_000
        };
        if !is_exact(stored.mode) || !is_exact(self.mode) {
            return Err(InvalidRecord("a mode is invalid"));
        }
        if [stored.uid, stored.gid, self.uid, self.gid].contains(&u32::MAX) {
            return Err(InvalidRecord("an owner or a group is invalid"));
        }
        if stored.mtime.nanos >= 1_000_000_000 {
            return Err(InvalidRecord("a time is invalid"));
        }
        let (kind, placeholder) = (
            FileKind::from_mode(self.mode),
            FileKind::from_mode(stored.mode),
        );
        if is_device(kind) {
            let (major, minor) = (rustix::fs::major(self.rdev), rustix::fs::minor(self.rdev));
            let is_whiteout = kind == FileKind::CharDevice && self.rdev == 0;
            if major > MAJOR_MAX || minor > MINOR_MAX || is_whiteout {
                return Err(InvalidRecord("a device number is invalid"));
            }
            if placeholder != FileKind::Regular || stored.size > 0 {
                return Err(InvalidRecord("a device is not an empty file"));
            }
        } else if kind != placeholder || self.rdev != 0 {
            return Err(InvalidRecord("its types contradict each other"));
        }
        Ok(())
    }
}

fn is_device(kind: FileKind) -> bool {
    matches!(kind, FileKind::CharDevice | FileKind::BlockDevice)
}

/// Removes the first bytes of `rest` and returns them.
fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], InvalidRecord> {
    let (first, others) = rest.split_first_chunk::<N>().ok_or(TRUNCATED)?;
    *rest = others;
    Ok(*first)
}

fn number(rest: &mut &[u8]) -> Result<u32, InvalidRecord> {
    take(rest).map(u32::from_le_bytes)
}

const TRUNCATED: InvalidRecord = InvalidRecord("it is truncated");

fn parse_xattrs(mut rest: &[u8]) -> Result<Xattrs, InvalidRecord> {
    let mut xattrs: Xattrs = Vec::new();
    while !rest.is_empty() {
        let name_length = usize::from(u16::from_le_bytes(take(&mut rest)?));
        let length = usize::from(u16::from_le_bytes(take(&mut rest)?));
        let (name, after) = rest.split_at_checked(name_length).ok_or(TRUNCATED)?;
        let (value, after) = after.split_at_checked(length).ok_or(TRUNCATED)?;
        rest = after;
        if !is_valid_name(name) {
            return Err(InvalidRecord("the name of an xattr is invalid"));
        }
        if xattrs.last().is_some_and(|(last, _)| **last >= *name) {
            return Err(InvalidRecord("its xattrs are not sorted"));
        }
        xattrs.push((name.to_vec(), value.to_vec()));
    }
    Ok(xattrs)
}

/// Whether Linux has xattrs of this name.
fn is_valid_name(name: &[u8]) -> bool {
    let spaces: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    let in_space = |space: &&[u8]| name.len() > space.len() && name.starts_with(space);
    let is_acl = name == ACL_ACCESS || name == ACL_DEFAULT;
    (is_acl || spaces.iter().any(in_space)) && name.len() <= NAME_MAX && !name.contains(&0)
}
