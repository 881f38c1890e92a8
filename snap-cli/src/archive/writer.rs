//! Writing entries of a tar archive: a header block, before it PAX records for what does not fit, after
//! it the content.
//!
//! The format is the POSIX one (ustar with PAX headers where something does not fit), and the same
//! entries always give the same bytes. Which entries an archive has is not known here.

use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::os::fd::AsFd as _;

use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT};
use cowl_layers::sys::stat::FileKind;
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use super::acl;
use super::checksum::hex;
use super::limits;
use super::pax::{self, Records};
use super::report::Report;
use crate::tree::content;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::walk::{Item, LinkMap};

/// The largest number that fits a field of eight bytes, and one of twelve.
const FIELD_8: u64 = 0o7_777_777;
const FIELD_12: u64 = 0o77_777_777_777;

/// GNU tar writes records of this size.
const RECORD: u64 = 10240;

pub(super) fn cannot_write(error: std::io::Error) -> TreeError {
    TreeError::io("can't write the archive", error)
}

/// How a layer is written that is to come back as it lies on the disk, with its marks.
#[derive(Debug)]
pub(super) struct Raw {
    /// The number of the layer, by which marks of other layers name it.
    pub(super) layer: u64,
    /// The inodes whose numbers such marks name.
    pub(super) lends: HashSet<u64>,
}

/// What becomes of the holes of sparse files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holes {
    /// Only the data is written, with a map.
    Left,
    /// Zeros are written. Layers of images must not have sparse entries: podman and docker unpack a layer
    /// and make it again from its files, and its bytes must be the same.
    Filled,
}

/// An archive that is being written.
pub(super) struct Writer<'a, W: Write> {
    out: BufWriter<W>,
    written: u64,
    sum: Option<Sha256>,
    /// Stands before every path.
    prefix: Vec<u8>,
    raw: Option<Raw>,
    holes: Holes,
    links: LinkMap<Vec<u8>>,
    result: Report,
    progress: OnProgress<'a>,
}

impl<'a, W: Write> Writer<'a, W> {
    /// An archive whose names start with "./", as `tar -C DIR .` writes them.
    pub(super) fn new(output: W, progress: OnProgress<'a>) -> Self {
        Self {
            out: BufWriter::with_capacity(256 << 10, output),
            written: 0,
            sum: None,
            prefix: b"./".to_vec(),
            raw: None,
            holes: Holes::Left,
            links: LinkMap::default(),
            result: Report::default(),
            progress,
        }
    }

    /// The same, with this done about holes.
    pub(super) fn with_holes(mut self, holes: Holes) -> Self {
        self.holes = holes;
        self
    }

    /// The same, with a sum of all its bytes.
    pub(super) fn summed(mut self) -> Self {
        self.sum = Some(Sha256::new());
        self
    }

    /// The sum of everything so far, in hexadecimal digits.
    pub(super) fn sum(&self) -> String {
        self.sum.clone().map_or_else(String::new, hex)
    }

    /// From here on entries are those of the layer that lies at this path of the archive.
    pub(super) fn begin_layer(&mut self, prefix: Vec<u8>, raw: Raw) {
        self.prefix = prefix;
        self.raw = Some(raw);
        self.links = LinkMap::default();
    }

    /// Ends the archive, and gives the output back, flushed.
    pub(super) fn finish(mut self) -> Result<(W, Report)> {
        let end = (self.written + 1024).next_multiple_of(RECORD) - self.written;
        self.zeros(end)?;
        (self.progress)(self.result.done);
        let mut output = self
            .out
            .into_inner()
            .map_err(|error| cannot_write(error.into_error()))?;
        output.flush().map_err(cannot_write)?;
        Ok((output, self.result))
    }

    /// An entry that no tree has: a small file of the archive's own.
    pub(super) fn own_file(&mut self, path: &[u8], mode: u32, data: &[u8]) -> Result<()> {
        let mut entry = Entry::bare(path.to_vec(), EntryType::Regular, mode);
        entry.size = data.len() as u64;
        self.head(entry)?;
        self.write(data)?;
        self.zeros((data.len() as u64).next_multiple_of(512) - data.len() as u64)
    }

    /// An entry with its content, or as one more name of a file that was written before.
    pub(super) fn item(&mut self, item: &Item<'_>) -> Result<()> {
        let kind = item.kind();
        if kind == FileKind::Socket && self.raw.is_none() {
            let why = "a socket: a tar archive can't hold one";
            self.result.notes.push((item.path.to_vec(), why));
            return Ok(());
        }
        self.result.done.entries += 1;
        let mut entry = Entry::new(item, &self.prefix, self.raw.as_ref())?;
        if !(self.raw.is_some() && item.is_whiteout()?)
            && let Some(first) = self.links.first(&item.stat, || entry.path.clone())
        {
            entry.kind = EntryType::Link;
            entry.link.clone_from(first);
            // The first name has brought the attributes.
            entry
                .records
                .0
                .retain(|(key, _)| !key.starts_with(b"SCHILY."));
            return self.head(entry);
        }
        if kind == FileKind::Symlink {
            entry.link = item.target()?;
        }
        if kind == FileKind::Regular && item.stat.size > 0 {
            self.file(item, entry)?;
        } else {
            self.head(entry)?;
        }
        (self.progress)(self.result.done);
        Ok(())
    }

    fn file(&mut self, item: &Item<'_>, mut entry: Entry) -> Result<()> {
        let fd = item.open()?;
        let size = item.stat.size;
        let mut segments = vec![(0, size)];
        let mut map = Vec::new();
        if self.holes == Holes::Left && item.stat.blocks * 512 < size {
            let found = content::segments(fd.as_fd(), size).context("can't read", item.path)?;
            let found = at_most(found, limits::SEGMENTS - 1);
            if found != segments {
                segments = found;
                map = entry.make_sparse(size, &segments);
            }
        }
        entry.size = map.len() as u64 + segments.iter().map(|(_, length)| length).sum::<u64>();
        let padding = entry.size.next_multiple_of(512) - entry.size;
        self.head(entry)?;
        self.write(&map)?;
        let mut buffer = vec![0; 256 << 10];
        for (start, length) in segments {
            let mut done = 0;
            while done < length {
                let want = usize::try_from(length - done)
                    .unwrap_or(buffer.len())
                    .min(buffer.len());
                let part = buffer.get_mut(..want).unwrap_or_default();
                let got = content::read_at(fd.as_fd(), part, start + done);
                if got.context("can't read", item.path)? < want {
                    let what = "the file got shorter while it was read";
                    return Err(TreeError::new(ErrorKind::Io, what).at(item.path));
                }
                self.write(part)?;
                done += want as u64;
                self.result.done.bytes += want as u64;
                (self.progress)(self.result.done);
            }
        }
        self.zeros(padding)
    }

    fn head(&mut self, entry: Entry) -> Result<()> {
        let (header, records) = entry.finish();
        if !records.0.is_empty() {
            self.extended(&records, EntryType::XHeader)?;
        }
        self.write(header.as_bytes())
    }

    /// Writes a comment on the whole archive, which readers pass over. Comes first.
    pub(super) fn comment(&mut self, text: &str) -> Result<()> {
        let mut records = Records::default();
        records.push(*b"comment", text);
        self.extended(&records, EntryType::XGlobalHeader)
    }

    fn extended(&mut self, records: &Records, kind: EntryType) -> Result<()> {
        let data = records.write();
        let mut header = Header::new_ustar();
        put(&mut header.as_old_mut().name, b"././@PaxHeader");
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.write(header.as_bytes())?;
        self.write(&data)?;
        self.zeros((data.len() as u64).next_multiple_of(512) - data.len() as u64)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.written += data.len() as u64;
        if let Some(sum) = &mut self.sum {
            sum.update(data);
        }
        self.out.write_all(data).map_err(cannot_write)
    }

    fn zeros(&mut self, count: u64) -> Result<()> {
        const ZEROS: [u8; 512] = [0; 512];
        let mut left = count;
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(512).min(512);
            self.write(ZEROS.get(..part).unwrap_or_default())?;
            left -= part as u64;
        }
        Ok(())
    }
}

/// Joins neighboring runs of data until there are no more than `most`: the smallest holes are written as
/// zeros.
fn at_most(mut segments: Vec<(u64, u64)>, most: usize) -> Vec<(u64, u64)> {
    let mut hole = 4096;
    while segments.len() > most {
        segments.dedup_by(|next, last| {
            let end = last.0 + last.1;
            let joined = next.0 - end <= hole;
            if joined {
                last.1 = next.0 + next.1 - last.0;
            }
            joined
        });
        hole *= 2;
    }
    segments
}

/// An entry's header in the making.
struct Entry {
    header: Header,
    records: Records,
    path: Vec<u8>,
    link: Vec<u8>,
    kind: EntryType,
    size: u64,
    sparse: bool,
}

impl Entry {
    fn bare(path: Vec<u8>, kind: EntryType, mode: u32) -> Self {
        let mut header = Header::new_ustar();
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        Self {
            header,
            records: Records::default(),
            path,
            link: Vec::new(),
            kind,
            size: 0,
            sparse: false,
        }
    }

    fn new(item: &Item<'_>, prefix: &[u8], raw: Option<&Raw>) -> Result<Self> {
        let mut path = [prefix, item.path].concat();
        if item.kind() == FileKind::Directory && !item.path.is_empty() {
            path.push(b'/');
        }
        let kind = match item.kind() {
            FileKind::Directory => EntryType::Directory,
            FileKind::Symlink => EntryType::Symlink,
            FileKind::Fifo => EntryType::Fifo,
            FileKind::CharDevice => EntryType::Char,
            FileKind::BlockDevice => EntryType::Block,
            FileKind::Regular | FileKind::Socket => EntryType::Regular,
        };
        let mut entry = Self::bare(path, kind, 0);
        entry.attributes(item)?;
        if let Some(raw) = raw {
            if item.kind() == FileKind::Socket {
                entry.records.push(pax::SOCKET, *b"1");
            }
            if item.path.is_empty() {
                entry.records.push(pax::LAYER, raw.layer.to_string());
            }
            if raw.lends.contains(&item.stat.ino) {
                entry.records.push(pax::INO, item.stat.ino.to_string());
            }
        }
        Ok(entry)
    }

    fn attributes(&mut self, item: &Item<'_>) -> Result<()> {
        let stat = &item.stat;
        self.header.set_mode(stat.perm());
        let ids = [("uid", stat.uid), ("gid", stat.gid)];
        for (key, id) in ids.map(|(key, id)| (key, u64::from(id))) {
            if id > FIELD_8 {
                self.records.push(key, id.to_string());
            }
        }
        self.header.set_uid(u64::from(stat.uid).min(FIELD_8));
        self.header.set_gid(u64::from(stat.gid).min(FIELD_8));
        match u64::try_from(stat.mtime.secs) {
            Ok(secs) if secs <= FIELD_12 && stat.mtime.nanos == 0 => self.header.set_mtime(secs),
            other => {
                self.header
                    .set_mtime(other.map_or(0, |secs| secs.min(FIELD_12)));
                self.records.push(*b"mtime", pax::time_text(stat.mtime));
            }
        }
        if matches!(item.kind(), FileKind::CharDevice | FileKind::BlockDevice) {
            let bad = |error| TreeError::io("can't write the device number", error).at(item.path);
            self.header
                .set_device_major(rustix::fs::major(stat.rdev))
                .map_err(bad)?;
            self.header
                .set_device_minor(rustix::fs::minor(stat.rdev))
                .map_err(bad)?;
        }
        for (name, value) in item.xattrs()? {
            let which = match name.as_slice() {
                ACL_ACCESS => Some(&b"access"[..]),
                ACL_DEFAULT => Some(&b"default"[..]),
                _ => None,
            };
            match (which, acl::to_text(&value)) {
                (Some(which), Some(text)) => self.records.push([pax::ACL, which].concat(), text),
                _ => {
                    let key = [pax::XATTR, &pax::escape_xattr(&name)].concat();
                    self.records.push(key, value);
                }
            }
        }
        Ok(())
    }

    /// Makes it a sparse file (PAX format 1.0) and gives the map that its data begins with.
    fn make_sparse(&mut self, size: u64, segments: &[(u64, u64)]) -> Vec<u8> {
        self.records.push(*b"GNU.sparse.major", *b"1");
        self.records.push(*b"GNU.sparse.minor", *b"0");
        self.records.push(*b"GNU.sparse.name", self.path.clone());
        self.records.push(*b"GNU.sparse.realsize", size.to_string());
        self.sparse = true;
        let mut all = segments.to_vec();
        // A hole at the end is told by an empty part.
        if segments
            .last()
            .is_none_or(|(start, length)| start + length < size)
        {
            all.push((size, 0));
        }
        let mut map = format!("{}\n", all.len());
        for (start, length) in all {
            map += &format!("{start}\n{length}\n");
        }
        let mut map = map.into_bytes();
        map.resize(map.len().next_multiple_of(512), 0);
        map
    }

    fn finish(mut self) -> (Header, Records) {
        let fits = |bytes: &[u8]| bytes.len() <= 100 && bytes.is_ascii();
        if self.sparse {
            // What a reader that knows no sparse files unpacks must not have the file's name.
            put(
                &mut self.header.as_old_mut().name,
                b"./GNUSparseFile.0/sparse",
            );
        } else {
            if !fits(&self.path) {
                self.records.push(*b"path", self.path.clone());
            }
            put(&mut self.header.as_old_mut().name, &self.path);
        }
        if !fits(&self.link) {
            self.records.push(*b"linkpath", self.link.clone());
        }
        put(&mut self.header.as_old_mut().linkname, &self.link);
        if self.size > FIELD_12 {
            self.records.push(*b"size", self.size.to_string());
        }
        self.header.set_size(self.size.min(FIELD_12));
        self.header.set_entry_type(self.kind);
        self.header.set_cksum();
        (self.header, self.records)
    }
}

/// Puts as much of the bytes into a field as it takes; the rest stands in a record.
fn put(field: &mut [u8], bytes: &[u8]) {
    for (to, from) in field.iter_mut().zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_holes_go_when_a_map_has_too_many_parts() {
        let runs = vec![(0, 10), (20, 10), (100_000, 5), (110_000, 5), (900_000, 1)];
        assert_eq!(at_most(runs.clone(), 5), runs);
        let four = vec![(0, 30), (100_000, 5), (110_000, 5), (900_000, 1)];
        assert_eq!(at_most(runs.clone(), 4), four);
        let three = vec![(0, 30), (100_000, 10_005), (900_000, 1)];
        assert_eq!(at_most(runs.clone(), 3), three);
        assert_eq!(at_most(runs, 1), [(0, 900_001)]);
    }
}
