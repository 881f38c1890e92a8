//! One entry of a tar archive as this crate understands it, put together from its header block and
//! the PAX records and GNU long names before it. Pure. Names of owners and file flags (chattr) are
//! not taken over: owners are numbers here. Knows nothing of where it will be unpacked.

use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::Time;
use tar::{EntryType, Header};

use super::extended::{Extended, Field};
use super::sparse::Sparse;
use crate::tree::attrs::Attrs;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// What an entry makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    Folder,
    File,
    /// Another name of the entry with this path.
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    CharDevice(u64),
    BlockDevice(u64),
    Fifo,
    /// Only in archives of whole containers.
    Socket,
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// The path as the archive has it.
    pub(super) path: Vec<u8>,
    pub(super) what: What,
    pub(super) attrs: Attrs,
    /// Bytes in the archive.
    pub(super) stored: u64,
    /// Where they go, for a sparse file.
    pub(super) sparse: Option<Sparse>,
    pub(super) own: Own,
}

/// What only archives of whole containers say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Own {
    /// The inode number that it had.
    pub(super) ino: Option<u64>,
    /// The number of the layer of which it is the root.
    pub(super) layer: Option<u64>,
}

fn damaged(path: &[u8], what: impl std::fmt::Display) -> TreeError {
    TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}")).at(path)
}

/// Whether the sum in the header is that of its bytes, taken as unsigned numbers or, as old writers on some
/// machines did, as signed ones. An all-zero block has none.
pub(super) fn checksum_fits(header: &Header) -> bool {
    let (mut unsigned, mut negative) = (0_u32, 0_u32);
    for byte in header.as_bytes() {
        unsigned += u32::from(*byte);
        negative += u32::from(*byte >> 7);
    }
    // The sum itself counts as blanks.
    for byte in &header.as_old().cksum {
        unsigned = unsigned - u32::from(*byte) + u32::from(b' ');
        negative -= u32::from(*byte >> 7);
    }
    let unsigned = i128::from(unsigned);
    let signed = unsigned - 256 * i128::from(negative);
    let sum = number(&header.as_old().cksum);
    sum == Some(unsigned) || sum == Some(signed)
}

/// A number of a header: octal digits, or big-endian binary when the top bit is set.
pub(super) fn number(field: &[u8]) -> Option<i128> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement: 0x40 is the sign once 0x80 only says "binary".
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

/// What came before an entry's own header.
#[derive(Debug, Default)]
pub(super) struct Before {
    pub(super) local: Extended,
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
}

impl Before {
    /// Whether there is anything.
    pub(super) fn any(&self) -> bool {
        self.local.any || self.long_name.is_some() || self.long_link.is_some()
    }

    /// The entry's path.
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

/// Puts an entry together. `old_sparse` is what GNU's own sparse header says.
pub(super) fn member(
    header: &Header,
    mut before: Before,
    global: &Extended,
    old_sparse: Option<Sparse>,
) -> Result<Member> {
    let path = before.path(header, global);
    if let Some(bad) = before.local.bad.take() {
        return Err(bad.at(path));
    }
    if before.local.continues || global.continues {
        return Err(continuation(&path));
    }
    let stored = (before.local.size.over(&global.size).copied())
        .or_else(|| number(&header.as_old().size).and_then(|size| u64::try_from(size).ok()))
        .ok_or_else(|| damaged(&path, "its size is no number"))?;
    let what = what(header, &before, global, &path)?;
    let records = std::mem::take(&mut before.local.sparse);
    let sparse = match old_sparse {
        Some(sparse) => Some(sparse),
        None => records
            .sparse()
            .map_err(|error| error.at(path.as_slice()))?,
    };
    let own = Own {
        ino: before.local.ino,
        layer: before.local.layer,
    };
    Ok(Member {
        attrs: attrs(header, before.local, global, &path)?,
        path,
        what,
        stored,
        sparse,
        own,
    })
}

fn continuation(path: &[u8]) -> TreeError {
    let what = "the archive has an entry that is the continuation of a file from another volume";
    TreeError::new(ErrorKind::Refused, what).at(path)
}

fn what(header: &Header, before: &Before, global: &Extended, path: &[u8]) -> Result<What> {
    Ok(match header.entry_type() {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            // Before 1988 a folder was a file whose name ends with a slash.
            if path.ends_with(b"/") {
                What::Folder
            } else if before.local.is_socket {
                What::Socket
            } else {
                What::File
            }
        }
        EntryType::Directory => What::Folder,
        EntryType::Link => What::HardLink(before.link(header, global)),
        EntryType::Symlink => What::Symlink(before.link(header, global)),
        EntryType::Char => What::CharDevice(device(header, before, global, path)?),
        EntryType::Block => What::BlockDevice(device(header, before, global, path)?),
        EntryType::Fifo => What::Fifo,
        other => {
            let kind = match other.as_byte() {
                b'D' => return Ok(What::Folder),
                b'M' => return Err(continuation(path)),
                byte => byte.escape_ascii(),
            };
            return Err(TreeError::new(
                ErrorKind::Refused,
                format!("the archive has an entry that is of the unknown type '{kind}'"),
            )
            .at(path));
        }
    })
}

/// Linux has 12 bits for the major and 20 for the minor number.
const MAJOR_MAX: u32 = 0xfff;
const MINOR_MAX: u32 = 0xf_ffff;

fn device(header: &Header, before: &Before, global: &Extended, path: &[u8]) -> Result<u64> {
    let part = |pax: Option<&u64>, field: Option<i128>, max: u32| -> Result<u32> {
        pax.copied()
            .map(i128::from)
            .or(field)
            .and_then(|number| u32::try_from(number).ok())
            .filter(|&number| number <= max)
            .ok_or_else(|| damaged(path, "its device number is no number of a device"))
    };
    // The two fields lie at the same place in both formats.
    let fields = header.as_bytes();
    let local = &before.local;
    let (major, minor) = (
        local.major.over(&global.major),
        local.minor.over(&global.minor),
    );
    let major = part(major, fields.get(329..337).and_then(number), MAJOR_MAX)?;
    let minor = part(minor, fields.get(337..345).and_then(number), MINOR_MAX)?;
    Ok(rustix::fs::makedev(major, minor))
}

fn attrs(header: &Header, local: Extended, global: &Extended, path: &[u8]) -> Result<Attrs> {
    let old = header.as_old();
    let bad = |what| damaged(path, what);
    let id = |key: &str, pax: Option<&u64>, field: &[u8]| -> Result<u32> {
        pax.copied()
            .map(i128::from)
            .or_else(|| number(field))
            .and_then(|id| u32::try_from(id).ok())
            .filter(|&id| id != u32::MAX)
            .ok_or_else(|| damaged(path, format!("its {key} is no user or group number")))
    };
    let mode = number(&old.mode).ok_or_else(|| bad("its mode is no number"))?;
    let time = |field: &Field<Time>, global: &Field<Time>| field.over(global).copied();
    let mtime = match time(&local.mtime, &global.mtime) {
        Some(time) => time,
        None => Time {
            secs: number(&old.mtime)
                .and_then(|secs| i64::try_from(secs).ok())
                .ok_or_else(|| bad("its time is no number"))?,
            nanos: 0,
        },
    };
    let atime = time(&local.atime, &global.atime);
    Ok(Attrs {
        perm: u32::try_from(mode & 0o7777).unwrap_or_default(),
        uid: id("uid", local.uid.over(&global.uid), &old.uid)?,
        gid: id("gid", local.gid.over(&global.gid), &old.gid)?,
        // Without one, what was unpacked was last read when it was last written.
        atime: SetTime::At(atime.unwrap_or(mtime)),
        mtime: SetTime::At(mtime),
        xattrs: local.into_xattrs(global),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_headers() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"\x80\0\0\0\x02\0\0\0"), Some(0x0200_0000));
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(number(b"12a\0"), None);
        assert_eq!(number(b"9\0"), None);
    }

    #[test]
    fn checksums_of_signed_and_unsigned_bytes_fit() {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[0] = 0xe9;
        header.set_cksum();
        assert!(checksum_fits(&header));
        let unsigned = number(&header.as_old().cksum).unwrap();
        let signed = format!("{:06o}\0 ", unsigned - 256);
        header.as_old_mut().cksum.copy_from_slice(signed.as_bytes());
        assert!(checksum_fits(&header));
        header.as_old_mut().name[1] = b'x';
        assert!(!checksum_fits(&header));
        assert!(!checksum_fits(&Header::new_old()));
    }
}
