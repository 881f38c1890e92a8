//! One entry of a tar archive as this crate understands it, put together from its header block and
//! the PAX records and GNU long names before it. Pure. Names of owners and file flags (chattr) are
//! not taken over: owners are numbers here. Knows nothing of where it will be unpacked.

use cowl_fs::sys::attr::SetTime;
use cowl_fs::sys::stat::Time;
use tar::{EntryType, Header};

use super::acl;
use super::pax::{self, Records};
use crate::delta::error::{ErrorKind, Result, TreeError};
use crate::delta::make::{ACL_ACCESS, ACL_DEFAULT, Attrs, Xattrs};

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

/// A file with holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    /// Its size, holes counted.
    pub(super) size: u64,
    /// Offset and length of what is stored, rising. Empty with `map_in_data`.
    pub(super) segments: Vec<(u64, u64)>,
    /// PAX format 1.0: the map is the first part of the data.
    pub(super) map_in_data: bool,
}

impl Sparse {
    /// Refuses a map whose parts overlap, go back, or end beyond the file.
    pub(super) fn check(&self, stored: u64) -> Result<(), &'static str> {
        let (mut end, mut sum) = (0_u64, 0_u64);
        for &(offset, length) in &self.segments {
            if offset < end {
                return Err("its sparse map overlaps");
            }
            end = offset
                .checked_add(length)
                .ok_or("its sparse map is too large")?;
            sum = sum
                .checked_add(length)
                .ok_or("its sparse map is too large")?;
        }
        if end > self.size {
            return Err("its sparse map goes beyond its end");
        }
        if sum != stored {
            return Err("its sparse map and its data differ in length");
        }
        Ok(())
    }
}

fn damaged(path: &[u8], what: impl std::fmt::Display) -> TreeError {
    TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}")).at(path)
}

/// Whether the sum in the header is that of its bytes. An all-zero block has none.
pub(super) fn checksum_fits(header: &Header) -> bool {
    let sum: u32 = header
        .as_bytes()
        .iter()
        .enumerate()
        .map(|(at, &byte)| {
            if (148..156).contains(&at) {
                32
            } else {
                u32::from(byte)
            }
        })
        .sum();
    number(&header.as_old().cksum) == Some(i128::from(sum))
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
    pub(super) global: Records,
    pub(super) local: Records,
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
}

impl Before {
    fn get(&self, key: &str) -> Option<&[u8]> {
        self.local.get(key).or_else(|| self.global.get(key))
    }

    fn pax_number(&self, key: &'static str) -> Result<Option<u64>, &'static str> {
        match self.local.number(key)? {
            Some(number) => Ok(Some(number)),
            None => self.global.number(key),
        }
    }

    fn pax_time(&self, key: &'static str) -> Result<Option<Time>, &'static str> {
        match self.local.time(key)? {
            Some(time) => Ok(Some(time)),
            None => self.global.time(key),
        }
    }

    /// The entry's path.
    pub(super) fn path(&self, header: &Header) -> Vec<u8> {
        self.get("GNU.sparse.name")
            .or_else(|| self.get("path"))
            .or(self.long_name.as_deref())
            .map_or_else(|| header.path_bytes().into_owned(), <[u8]>::to_vec)
    }

    fn link(&self, header: &Header) -> Vec<u8> {
        self.get("linkpath")
            .or(self.long_link.as_deref())
            .map_or_else(
                || header.link_name_bytes().unwrap_or_default().into_owned(),
                <[u8]>::to_vec,
            )
    }

    /// Bytes of data after the header.
    pub(super) fn stored(&self, header: &Header) -> Result<u64> {
        let path = self.path(header);
        let pax = self.pax_number("size").map_err(|key| damaged(&path, key))?;
        let old = number(&header.as_old().size).and_then(|size| u64::try_from(size).ok());
        pax.or(old)
            .ok_or_else(|| damaged(&path, "its size is no number"))
    }
}

/// Puts an entry together. `old_sparse` is what GNU's own sparse header says.
pub(super) fn member(
    header: &Header,
    before: &Before,
    old_sparse: Option<Sparse>,
) -> Result<Member> {
    let path = before.path(header);
    let stored = before.stored(header)?;
    let what = what(header, before, &path)?;
    let sparse = match old_sparse {
        Some(sparse) => Some(sparse),
        None => pax_sparse(before).map_err(|error| damaged(&path, error))?,
    };
    Ok(Member {
        attrs: attrs(header, before, &path)?,
        path,
        what,
        stored,
        sparse,
        own: own(before).map_err(|key| damaged(&before.path(header), key))?,
    })
}

fn own(before: &Before) -> Result<Own, &'static str> {
    Ok(Own {
        ino: before.local.number(pax::INO)?,
        layer: before.local.number(pax::LAYER)?,
    })
}

fn what(header: &Header, before: &Before, path: &[u8]) -> Result<What> {
    Ok(match header.entry_type() {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            // Before 1988 a folder was a file whose name ends with a slash.
            if path.ends_with(b"/") {
                What::Folder
            } else if before.local.get(pax::SOCKET).is_some() {
                What::Socket
            } else {
                What::File
            }
        }
        EntryType::Directory => What::Folder,
        EntryType::Link => What::HardLink(before.link(header)),
        EntryType::Symlink => What::Symlink(before.link(header)),
        EntryType::Char => What::CharDevice(device(header, before, path)?),
        EntryType::Block => What::BlockDevice(device(header, before, path)?),
        EntryType::Fifo => What::Fifo,
        other => {
            let kind = match other.as_byte() {
                b'D' => return Ok(What::Folder),
                b'M' => "the continuation of a file from another volume".to_owned(),
                byte => format!("of the unknown type '{}'", byte.escape_ascii()),
            };
            return Err(TreeError::new(
                ErrorKind::Refused,
                format!("the archive has an entry that is {kind}"),
            )
            .at(path));
        }
    })
}

fn device(header: &Header, before: &Before, path: &[u8]) -> Result<u64> {
    let part = |key, field: Option<i128>| -> Result<u32> {
        let pax = before.pax_number(key).map_err(|key| damaged(path, key))?;
        pax.map(i128::from)
            .or(field)
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| damaged(path, "its device number is no number"))
    };
    // The two fields lie at the same place in both formats.
    let fields = header.as_bytes();
    let major = part("SCHILY.devmajor", fields.get(329..337).and_then(number))?;
    let minor = part("SCHILY.devminor", fields.get(337..345).and_then(number))?;
    Ok(rustix::fs::makedev(major, minor))
}

fn attrs(header: &Header, before: &Before, path: &[u8]) -> Result<Attrs> {
    let old = header.as_old();
    let bad = |what| damaged(path, what);
    let id = |key, field: &[u8]| -> Result<u32> {
        let pax = before.pax_number(key).map_err(bad)?;
        pax.map(i128::from)
            .or_else(|| number(field))
            .and_then(|id| u32::try_from(id).ok())
            .filter(|&id| id != u32::MAX)
            .ok_or_else(|| damaged(path, format!("its {key} is no user or group number")))
    };
    let mode = number(&old.mode).ok_or_else(|| bad("its mode is no number"))?;
    let mtime = match before.pax_time("mtime").map_err(bad)? {
        Some(time) => time,
        None => Time {
            secs: number(&old.mtime)
                .and_then(|secs| i64::try_from(secs).ok())
                .ok_or_else(|| bad("its time is no number"))?,
            nanos: 0,
        },
    };
    let atime = before.pax_time("atime").map_err(bad)?;
    Ok(Attrs {
        perm: u32::try_from(mode & 0o7777).unwrap_or_default(),
        uid: id("uid", &old.uid)?,
        gid: id("gid", &old.gid)?,
        // Without one, what was unpacked was last read when it was last written.
        atime: SetTime::At(atime.unwrap_or(mtime)),
        mtime: SetTime::At(mtime),
        xattrs: xattrs(before, path)?,
    })
}

fn xattrs(before: &Before, path: &[u8]) -> Result<Xattrs> {
    let mut found = std::collections::BTreeMap::new();
    for (key, value) in before.global.0.iter().chain(&before.local.0) {
        if let Some(which) = key.strip_prefix(pax::ACL) {
            let name = match which {
                b"access" => ACL_ACCESS,
                b"default" => ACL_DEFAULT,
                other => {
                    let what = format!(
                        "the archive has an ACL of a kind that Linux can't hold ({})",
                        other.escape_ascii()
                    );
                    return Err(TreeError::new(ErrorKind::Refused, what).at(path));
                }
            };
            if !value.is_empty() {
                let binary = acl::from_text(value).map_err(|error| damaged(path, error))?;
                // The binary form, where an archive has both, is the exact one.
                found.entry(name.to_vec()).or_insert(binary);
            }
        } else if let Some(name) = key.strip_prefix(pax::XATTR) {
            found.insert(pax::unescape_xattr(name), value.clone());
        } else if key == b"RHT.security.selinux" && !value.is_empty() {
            found.insert(b"security.selinux".to_vec(), value.clone());
        }
    }
    Ok(found.into_iter().collect())
}

fn pax_sparse(before: &Before) -> Result<Option<Sparse>, &'static str> {
    let local = &before.local;
    match (
        local.number("GNU.sparse.major")?,
        local.number("GNU.sparse.minor")?,
    ) {
        (None, _) if local.get("GNU.sparse.size").is_some() => old_pax_sparse(local).map(Some),
        (None, _) => Ok(None),
        (Some(1), Some(0)) => Ok(Some(Sparse {
            size: local
                .number("GNU.sparse.realsize")?
                .ok_or("its sparse map has no size")?,
            segments: Vec::new(),
            map_in_data: true,
        })),
        (Some(0), _) => old_pax_sparse(local).map(Some),
        _ => Err("its sparse map is in a format that is not known"),
    }
}

/// Formats 0.0 (pairs of records) and 0.1 (one record with all numbers).
fn old_pax_sparse(local: &Records) -> Result<Sparse, &'static str> {
    let size = local
        .number("GNU.sparse.size")?
        .ok_or("its sparse map has no size")?;
    let bad = "its sparse map is no list of numbers";
    let numbers: Vec<u64> = match local.get("GNU.sparse.map") {
        Some(map) => map
            .split(|&byte| byte == b',')
            .map(|n| pax::decimal(n).ok_or(bad))
            .collect::<Result<_, _>>()?,
        None => local
            .0
            .iter()
            .filter(|(key, _)| key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes")
            .map(|(_, n)| pax::decimal(n).ok_or(bad))
            .collect::<Result<_, _>>()?,
    };
    let segments = pairs(&numbers).ok_or(bad)?;
    Ok(Sparse {
        size,
        segments,
        map_in_data: false,
    })
}

/// Offset and length, from a flat list.
pub(super) fn pairs(numbers: &[u64]) -> Option<Vec<(u64, u64)>> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    rest.is_empty().then(|| {
        pairs
            .iter()
            .map(|&[offset, length]| (offset, length))
            .collect()
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
    fn bad_sparse_maps_are_refused() {
        let sparse = |segments| Sparse {
            size: 100,
            segments,
            map_in_data: false,
        };
        assert!(sparse(vec![(0, 10), (50, 10)]).check(20).is_ok());
        assert!(sparse(vec![(0, 10), (5, 10)]).check(20).is_err());
        assert!(sparse(vec![(95, 10)]).check(10).is_err());
        assert!(sparse(vec![(u64::MAX, 10)]).check(10).is_err());
        assert!(sparse(vec![(0, 10)]).check(11).is_err());
    }
}
