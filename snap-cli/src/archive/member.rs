//! An entry of a tar archive, assembled from its header block and the PAX records and GNU long names before it.
//!
//! No I/O. Names of owners and file flags (chattr) are ignored: owners are numeric. The module does not depend on the
//! target of the entries.

use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::Time;
use tar::{EntryType, Header};

use super::extended::{Extended, Field, NOT_A_NUMBER, NOT_AN_ID, OVERFLOW_ID, Omitted};
use super::pax;
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
    /// The rest of a file that began in another volume.
    Continuation,
    /// An object that Linux cannot store; the text of a note.
    Unstorable(&'static str),
}

/// An entry of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// The path as stored in the archive, not normalized.
    pub(super) path: Vec<u8>,
    pub(super) kind: EntryKind,
    pub(super) attrs: Attrs,
    /// ACLs with names, by the names of their xattrs.
    pub(super) named_acls: Vec<(&'static [u8], Vec<u8>)>,
    /// Properties that Linux cannot store, which were omitted or changed.
    pub(super) omitted: Vec<Omitted>,
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
    // The number ends at the first blank or NUL. Some archivers leave garbage behind that.
    let start = field.trim_ascii_start();
    let is_end = |byte: &u8| *byte == 0 || byte.is_ascii_whitespace();
    let digits = start.split(is_end).next()?;
    if digits.is_empty() {
        return Some(0);
    }
    // A sign begins a number in base 64, which only old versions of GNU tar wrote.
    if !digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) {
        return None;
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
            .map_or_else(|| header_path(header), Clone::clone)
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

/// Returns the path of a header block.
///
/// The prefix counts after the magic number of POSIX, whatever the version is: some archivers do not write "00".
fn header_path(header: &Header) -> Vec<u8> {
    let field = |range: std::ops::Range<usize>| {
        let field = header.as_bytes().get(range).unwrap_or_default();
        field.split(|&byte| byte == 0).next().unwrap_or_default()
    };
    let name = field(0..100);
    let is_posix = header.as_bytes().get(257..263) == Some(b"ustar\0");
    match field(345..500) {
        prefix if is_posix && !prefix.is_empty() => [prefix, b"/", name].concat(),
        _ => name.to_vec(),
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
    let stored = (preceding.local.size.over(&global.size).copied())
        .or_else(|| parse_number(&header.as_old().size).and_then(|size| u64::try_from(size).ok()))
        .ok_or_else(|| damaged(&path, "its size is not a number"))?;
    let mut omitted = std::mem::take(&mut preceding.local.omitted);
    let kind = entry_kind(header, &preceding, global, &path, &mut omitted);
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
    let (attrs, named_acls) = attrs(header, preceding.local, global, &mut omitted);
    Ok(Member {
        attrs,
        named_acls,
        omitted,
        path,
        kind,
        stored,
        sparse,
        cowl,
    })
}

fn entry_kind(
    header: &Header,
    preceding: &PrecedingHeaders,
    global: &Extended,
    path: &[u8],
    omitted: &mut Vec<Omitted>,
) -> EntryKind {
    let device = |kind: fn(u64) -> EntryKind| {
        device(header, preceding, global).map_or(
            EntryKind::Unstorable("skipped a device with a number that Linux does not have"),
            kind,
        )
    };
    if preceding.local.continues {
        return EntryKind::Continuation;
    }
    match header.entry_type() {
        EntryType::Directory => EntryKind::Directory,
        EntryType::Link => EntryKind::HardLink(preceding.link(header, global)),
        EntryType::Symlink => symlink(preceding.link(header, global)),
        EntryType::Char => device(EntryKind::CharDevice),
        EntryType::Block => device(EntryKind::BlockDevice),
        EntryType::Fifo => EntryKind::Fifo,
        kind => {
            match kind.as_byte() {
                b'D' => return EntryKind::Directory,
                b'M' => return EntryKind::Continuation,
                0 | b'0' | b'7' | b'S' => {}
                // POSIX prescribes this.
                other => omitted.push((
                    "imported an entry of an unknown type as a file",
                    vec![other],
                )),
            }
            // In archives from before 1988 a directory is a file whose name ends with a slash.
            if path.ends_with(b"/") {
                EntryKind::Directory
            } else if preceding.local.is_socket {
                EntryKind::Socket
            } else {
                EntryKind::File
            }
        }
    }
}

/// PATH_MAX of Linux, which includes a final NUL.
const PATH_MAX: usize = 4096;

fn symlink(target: Vec<u8>) -> EntryKind {
    if target.is_empty() {
        return EntryKind::Unstorable("skipped a symbolic link without a target");
    }
    if target.contains(&0) || target.len() >= PATH_MAX {
        return EntryKind::Unstorable(
            "skipped a symbolic link with a target that Linux cannot store",
        );
    }
    EntryKind::Symlink(target)
}

/// The largest major number on Linux, which has 12 bits.
const MAJOR_MAX: u32 = 0xfff;
/// The largest minor number on Linux, which has 20 bits.
const MINOR_MAX: u32 = 0xf_ffff;

/// Returns the number of a device, or `None` if Linux has no such number.
fn device(header: &Header, preceding: &PrecedingHeaders, global: &Extended) -> Option<u64> {
    let part = |pax: Option<&u64>, field: std::ops::Range<usize>, max: u32| {
        let field = || header.as_bytes().get(field).and_then(parse_number);
        let number = pax.copied().map(i128::from).or_else(field)?;
        let number = u32::try_from(number).ok();
        number.filter(|&number| number <= max)
    };
    // The two fields have the same offsets in both formats.
    let local = &preceding.local;
    let major = part(local.major.over(&global.major), 329..337, MAJOR_MAX)?;
    let minor = part(local.minor.over(&global.minor), 337..345, MINOR_MAX)?;
    Some(rustix::fs::makedev(major, minor))
}

/// The mode of an object whose header has none that is a number: only the owner has access.
const OWNER_ONLY: i128 = 0o700;

type AttrsAndAcls = (Attrs, Vec<(&'static [u8], Vec<u8>)>);

fn attrs(
    header: &Header,
    local: Extended,
    global: &Extended,
    omitted: &mut Vec<Omitted>,
) -> AttrsAndAcls {
    let old = header.as_old();
    let mut id = |key: &str, pax: Option<&i128>, field: &[u8]| -> u32 {
        let id = pax.copied().or_else(|| parse_number(field));
        let valid = id.and_then(|id| u32::try_from(id).ok());
        valid.filter(|&id| id != u32::MAX).unwrap_or_else(|| {
            // The creator of the object, root, would be a dangerous owner.
            let why = "changed an owner or group that Linux cannot store to 65534";
            omitted.push(match id {
                Some(id) => (why, format!("{key} {id}").into_bytes()),
                None => (NOT_AN_ID, key.into()),
            });
            OVERFLOW_ID
        })
    };
    let (uid, gid) = (
        id("uid", local.uid.over(&global.uid), &old.uid),
        id("gid", local.gid.over(&global.gid), &old.gid),
    );
    let mode = parse_number(&old.mode).unwrap_or_else(|| {
        omitted.push(("changed a mode that is not a number to 0700", Vec::new()));
        OWNER_ONLY
    });
    let time = |field: &Field<Time>, global: &Field<Time>| field.over(global).copied();
    let mtime = match time(&local.mtime, &global.mtime) {
        Some(time) => time,
        None => match parse_number(&old.mtime) {
            Some(secs) if secs > pax::LAST_TIME.secs.into() => pax::LAST_TIME,
            Some(secs) => Time {
                secs: i64::try_from(secs).unwrap_or(pax::FIRST_TIME.secs),
                nanos: 0,
            },
            None => {
                omitted.push((NOT_A_NUMBER, b"mtime".to_vec()));
                Time::default()
            }
        },
    };
    let atime = time(&local.atime, &global.atime);
    let (xattrs, named_acls) = local.into_xattrs(global);
    let attrs = Attrs {
        perm: u32::try_from(mode & 0o7777).unwrap_or_default(),
        uid,
        gid,
        // Without an atime in the archive, the atime equals the mtime.
        atime: SetTime::At(atime.unwrap_or(mtime)),
        mtime: SetTime::At(mtime),
        xattrs,
    };
    (attrs, named_acls)
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
        assert_eq!(parse_number(b"12 3456\0"), Some(0o12));
        assert_eq!(parse_number(b" 644\0garbage"), Some(0o644));
        assert_eq!(parse_number(b"12a\0"), None);
        assert_eq!(parse_number(b"9\0"), None);
        assert_eq!(parse_number(b"-1\0"), None);
        assert_eq!(parse_number(b"+1\0"), None);
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
