//! An entry of a tar archive, assembled from its header block and the PAX records and GNU long names before it.
//!
//! No I/O. Names of owners and file flags (chattr) are ignored: owners are numeric. The module does not depend on the
//! target of the entries.

use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::Time;
use tar::{EntryType, Header};

use super::extended::{Extended, Field};
use super::sparse::Sparse;
use crate::tree::attrs::Attrs;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// The kind of object that an entry creates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    Directory,
    File,
    /// A hard link to the entry with this path.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice(u64),
    BlockDevice(u64),
    Fifo,
    /// A socket, which only archives of whole containers can contain.
    Socket,
}

/// An entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// The path as stored in the archive, not normalized.
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) attrs: Attrs,
    /// The number of bytes of data in the archive.
    pub(super) stored: u64,
    /// The location of the data in a sparse file.
    pub(super) sparse: Option<Sparse>,
    pub(super) cowl: CowlRecords,
}

/// The values of PAX records that cowl defines for archives of whole containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CowlRecords {
    /// The inode number of the exported object.
    pub(super) ino: Option<u64>,
    /// The id of the exported layer, on its root.
    pub(super) layer: Option<u64>,
}

fn damaged(path: &[u8], what: impl std::fmt::Display) -> TreeError {
    TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}")).at(path)
}

/// Returns whether the checksum of a header block is valid.
///
/// It is the sum of the bytes as unsigned numbers, or as signed numbers in archives of some old writers. A block of
/// zeros is not valid.
pub(super) fn has_valid_checksum(header: &Header) -> bool {
    let (mut unsigned, mut negative) = (0_u32, 0_u32);
    for byte in header.as_bytes() {
        unsigned += u32::from(*byte);
        negative += u32::from(*byte >> 7);
    }
    // The checksum field itself counts as blanks.
    for byte in &header.as_old().cksum {
        unsigned = unsigned - u32::from(*byte) + u32::from(b' ');
        negative -= u32::from(*byte >> 7);
    }
    let unsigned = i128::from(unsigned);
    let signed = unsigned - 256 * i128::from(negative);
    let sum = parse_number(&header.as_old().cksum);
    sum == Some(unsigned) || sum == Some(signed)
}

/// Parses a number of a header: octal digits, or big-endian binary if the top bit is set.
pub(super) fn parse_number(field: &[u8]) -> Option<i128> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement: 0x80 only marks binary, so 0x40 is the sign bit.
        let start = if first & 0x40 != 0 {
            -1
        } else {
            i128::from(first & 0x3f)
        };
        return Some(
            rest.iter()
                .fold(start, |n, &byte| (n << 8) | i128::from(byte)),
        );
    }
    let digits = field.split(|&byte| byte == 0).next()?.trim_ascii();
    if digits.is_empty() {
        return Some(0);
    }
    i128::from_str_radix(str::from_utf8(digits).ok()?, 8).ok()
}

/// The extended headers that precede an entry's own header.
#[derive(Debug, Default)]
pub(super) struct PrecedingHeaders {
    pub(super) local: Extended,
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
}

impl PrecedingHeaders {
    /// Returns whether there is any extended header.
    pub(super) fn is_any(&self) -> bool {
        self.local.any || self.long_name.is_some() || self.long_link.is_some()
    }

    /// Returns the path of the entry.
    pub(super) fn path(&self, header: &Header, global: &Extended) -> Vec<u8> {
        let local = &self.local;
        (local.sparse_name.as_ref())
            .or_else(|| local.path.over(&global.path))
            .or(self.long_name.as_ref())
            .map_or_else(|| header.path_bytes().into_owned(), Clone::clone)
    }

    fn link(&self, header: &Header, global: &Extended) -> Vec<u8> {
        (self.local.link.over(&global.link))
            .or(self.long_link.as_ref())
            .map_or_else(
                || header.link_name_bytes().unwrap_or_default().into_owned(),
                Clone::clone,
            )
    }
}

/// Assembles an entry. `gnu_sparse` is the content of GNU's own sparse header.
pub(super) fn assemble(
    header: &Header,
    mut preceding: PrecedingHeaders,
    global: &Extended,
    gnu_sparse: Option<Sparse>,
) -> Result<Member> {
    let path = preceding.path(header, global);
    if let Some(bad) = preceding.local.bad.take() {
        return Err(bad.at(path));
    }
    if preceding.local.continues || global.continues {
        return Err(continuation(&path));
    }
    let stored = (preceding.local.size.over(&global.size).copied())
        .or_else(|| parse_number(&header.as_old().size).and_then(|size| u64::try_from(size).ok()))
        .ok_or_else(|| damaged(&path, "its size is not a number"))?;
    let kind = entry_kind(header, &preceding, global, &path)?;
    let records = std::mem::take(&mut preceding.local.sparse);
    let sparse = match gnu_sparse {
        Some(sparse) => Some(sparse),
        None => records
            .sparse()
            .map_err(|error| error.at(path.as_slice()))?,
    };
    let cowl = CowlRecords {
        ino: preceding.local.ino,
        layer: preceding.local.layer,
    };
    Ok(Member {
        attrs: attrs(header, preceding.local, global, &path)?,
        path,
        kind,
        stored,
        sparse,
        cowl,
    })
}

fn continuation(path: &[u8]) -> TreeError {
    let what = "the archive has an entry that continues a file of another volume";
    TreeError::new(ErrorKind::Refused, what).at(path)
}

fn entry_kind(
    header: &Header,
    preceding: &PrecedingHeaders,
    global: &Extended,
    path: &[u8],
) -> Result<EntryKind> {
    Ok(match header.entry_type() {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            // In archives from before 1988 a directory is a file whose name ends with a slash.
            if path.ends_with(b"/") {
                EntryKind::Directory
            } else if preceding.local.is_socket {
                EntryKind::Socket
            } else {
                EntryKind::File
            }
        }
        EntryType::Directory => EntryKind::Directory,
        EntryType::Link => EntryKind::HardLink(preceding.link(header, global)),
        EntryType::Symlink => EntryKind::Symlink(preceding.link(header, global)),
        EntryType::Char => EntryKind::CharDevice(device(header, preceding, global, path)?),
        EntryType::Block => EntryKind::BlockDevice(device(header, preceding, global, path)?),
        EntryType::Fifo => EntryKind::Fifo,
        other => {
            let kind = match other.as_byte() {
                b'D' => return Ok(EntryKind::Directory),
                b'M' => return Err(continuation(path)),
                byte => byte.escape_ascii(),
            };
            return Err(TreeError::new(
                ErrorKind::Refused,
                format!("the archive has an entry of the unknown type '{kind}'"),
            )
            .at(path));
        }
    })
}

/// The largest major number on Linux, which has 12 bits.
const MAJOR_MAX: u32 = 0xfff;
/// The largest minor number on Linux, which has 20 bits.
const MINOR_MAX: u32 = 0xf_ffff;

fn device(
    header: &Header,
    preceding: &PrecedingHeaders,
    global: &Extended,
    path: &[u8],
) -> Result<u64> {
    let part = |pax: Option<&u64>, field: Option<i128>, max: u32| -> Result<u32> {
        pax.copied()
            .map(i128::from)
            .or(field)
            .and_then(|number| u32::try_from(number).ok())
            .filter(|&number| number <= max)
            .ok_or_else(|| damaged(path, "its device number is invalid"))
    };
    // The two fields have the same offsets in both formats.
    let fields = header.as_bytes();
    let local = &preceding.local;
    let (major, minor) = (
        local.major.over(&global.major),
        local.minor.over(&global.minor),
    );
    let major = part(
        major,
        fields.get(329..337).and_then(parse_number),
        MAJOR_MAX,
    )?;
    let minor = part(
        minor,
        fields.get(337..345).and_then(parse_number),
        MINOR_MAX,
    )?;
    Ok(rustix::fs::makedev(major, minor))
}

fn attrs(header: &Header, local: Extended, global: &Extended, path: &[u8]) -> Result<Attrs> {
    let old = header.as_old();
    let bad = |what| damaged(path, what);
    let id = |key: &str, pax: Option<&u64>, field: &[u8]| -> Result<u32> {
        pax.copied()
            .map(i128::from)
            .or_else(|| parse_number(field))
            .and_then(|id| u32::try_from(id).ok())
            .filter(|&id| id != u32::MAX)
            .ok_or_else(|| damaged(path, format!("its {key} is not a user or group id")))
    };
    let mode = parse_number(&old.mode).ok_or_else(|| bad("its mode is not a number"))?;
    let time = |field: &Field<Time>, global: &Field<Time>| field.over(global).copied();
    let mtime = match time(&local.mtime, &global.mtime) {
        Some(time) => time,
        None => Time {
            secs: parse_number(&old.mtime)
                .and_then(|secs| i64::try_from(secs).ok())
                .ok_or_else(|| bad("its mtime is not a number"))?,
            nanos: 0,
        },
    };
    let atime = time(&local.atime, &global.atime);
    Ok(Attrs {
        perm: u32::try_from(mode & 0o7777).unwrap_or_default(),
        uid: id("uid", local.uid.over(&global.uid), &old.uid)?,
        gid: id("gid", local.gid.over(&global.gid), &old.gid)?,
        // Without an atime in the archive, the atime equals the mtime.
        atime: SetTime::At(atime.unwrap_or(mtime)),
        mtime: SetTime::At(mtime),
        xattrs: local.into_xattrs(global),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_numbers_of_headers() {
        assert_eq!(parse_number(b"0000644\0"), Some(0o644));
        assert_eq!(parse_number(b"   644 \0"), Some(0o644));
        assert_eq!(parse_number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(parse_number(b"\x80\0\0\0\x02\0\0\0"), Some(0x0200_0000));
        assert_eq!(parse_number(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(parse_number(b"12a\0"), None);
        assert_eq!(parse_number(b"9\0"), None);
    }

    #[test]
    fn checksums_over_signed_and_unsigned_bytes_are_valid() {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[0] = 0xe9;
        header.set_cksum();
        assert!(has_valid_checksum(&header));
        let unsigned = parse_number(&header.as_old().cksum).unwrap();
        let signed = format!("{:06o}\0 ", unsigned - 256);
        header.as_old_mut().cksum.copy_from_slice(signed.as_bytes());
        assert!(has_valid_checksum(&header));
        header.as_old_mut().name[1] = b'x';
        assert!(!has_valid_checksum(&header));
        assert!(!has_valid_checksum(&Header::new_old()));
    }
}
