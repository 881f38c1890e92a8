//! Writes the entries of a tar archive.
//!
//! The format is that of POSIX: a ustar header block, preceded by a PAX header for values that do not fit into it, and
//! followed by the content. The output is deterministic: the same entries result in the same bytes. The caller
//! chooses the entries.

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
use super::report::TransferReport;
use crate::tree::content;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::walk::{Item, LinkMap};

/// The largest number that fits into a field of 8 bytes.
const FIELD_8: u64 = 0o7_777_777;
/// The largest number that fits into a field of 12 bytes.
const FIELD_12: u64 = 0o77_777_777_777;

/// The record size of GNU tar. An archive is padded to a multiple of it.
const RECORD: u64 = 10240;

pub(super) fn cannot_write(error: std::io::Error) -> TreeError {
    TreeError::io("cannot write the archive", error)
}

/// A layer that is written in its on-disk form, with its marker xattrs.
#[derive(Debug)]
pub(super) struct RawLayer {
    /// The layer id to which marker xattrs in other layers refer.
    pub(super) layer: u64,
    /// The inodes to whose numbers such xattrs refer.
    pub(super) lent: HashSet<u64>,
}

/// The treatment of holes in sparse files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// Only the data segments are written, with a map.
    Skipped,
    /// Holes are written as zeros.
    ///
    /// Image layers must not contain sparse entries: podman and docker unpack a layer and recreate it from its files,
    /// and the result must have the same bytes. Other programs, such as busybox tar, do not know sparse entries.
    Zeros,
}

/// A writer of a tar archive.
pub(super) struct Writer<'a, W: Write> {
    out: BufWriter<W>,
    written: u64,
    sum: Option<Sha256>,
    /// The prefix of every path.
    prefix: Vec<u8>,
    raw: Option<RawLayer>,
    holes: Holes,
    links: LinkMap<Vec<u8>>,
    report: TransferReport,
    progress: OnProgress<'a>,
}

impl<'a, W: Write> Writer<'a, W> {
    /// Creates a writer whose entry names begin with "./", as those of `tar -C DIR .` do.
    pub(super) fn new(output: W, progress: OnProgress<'a>) -> Self {
        Self {
            out: BufWriter::with_capacity(256 << 10, output),
            written: 0,
            sum: None,
            prefix: b"./".to_vec(),
            raw: None,
            holes: Holes::Skipped,
            links: LinkMap::default(),
            report: TransferReport::default(),
            progress,
        }
    }

    /// Sets the treatment of holes.
    pub(super) fn with_holes(mut self, holes: Holes) -> Self {
        self.holes = holes;
        self
    }

    /// Enables the checksum over all bytes.
    pub(super) fn with_checksum(mut self) -> Self {
        self.sum = Some(Sha256::new());
        self
    }

    /// Returns the checksum of all bytes so far in hexadecimal digits, or an empty string without [`Self::with_checksum`].
    pub(super) fn checksum(&self) -> String {
        self.sum.clone().map_or_else(String::new, hex)
    }

    /// Begins a layer: the following entries belong to it, and get `prefix` as the prefix of their paths.
    pub(super) fn begin_layer(&mut self, prefix: Vec<u8>, raw: RawLayer) {
        self.prefix = prefix;
        self.raw = Some(raw);
        self.links = LinkMap::default();
    }

    /// Writes the end of the archive, and returns the flushed output.
    pub(super) fn finish(mut self) -> Result<(W, TransferReport)> {
        let end = (self.written + 1024).next_multiple_of(RECORD) - self.written;
        self.write_zeros(end)?;
        (self.progress)(self.report.done);
        let mut output = self
            .out
            .into_inner()
            .map_err(|error| cannot_write(error.into_error()))?;
        output.flush().map_err(cannot_write)?;
        Ok((output, self.report))
    }

    /// Writes a small file that is not part of a tree.
    pub(super) fn write_own_file(&mut self, path: &[u8], mode: u32, data: &[u8]) -> Result<()> {
        let mut entry = EntryHeader::bare(path.to_vec(), EntryType::Regular, mode);
        entry.size = data.len() as u64;
        self.write_header(entry)?;
        self.write(data)?;
        self.write_zeros((data.len() as u64).next_multiple_of(512) - data.len() as u64)
    }

    /// Writes an entry with its content, or a hard link to an earlier entry of the same file.
    ///
    /// A socket is skipped with a note, except in a raw layer.
    pub(super) fn write_item(&mut self, item: &Item<'_>) -> Result<()> {
        let kind = item.kind();
        if kind == FileKind::Socket && self.raw.is_none() {
            let why = "a socket: a tar archive cannot contain sockets";
            self.report.notes.add(why, item.path);
            return Ok(());
        }
        self.report.done.entries += 1;
        let mut entry = EntryHeader::new(item, &self.prefix, self.raw.as_ref())?;
        if !(self.raw.is_some() && item.is_whiteout()?)
            && let Some(first) = self.links.first(&item.stat, || entry.path.clone())
        {
            entry.kind = EntryType::Link;
            entry.link.clone_from(first);
            // The entry of the first name has the xattrs.
            entry
                .records
                .0
                .retain(|(key, _)| !key.starts_with(b"SCHILY."));
            return self.write_header(entry);
        }
        if kind == FileKind::Symlink {
            entry.link = item.target()?;
        }
        if kind == FileKind::Regular && item.stat.size > 0 {
            self.write_file(item, entry)?;
        } else {
            self.write_header(entry)?;
        }
        (self.progress)(self.report.done);
        Ok(())
    }

    fn write_file(&mut self, item: &Item<'_>, mut entry: EntryHeader) -> Result<()> {
        let fd = item.open()?;
        let size = item.stat.size;
        let mut segments = vec![(0, size)];
        let mut map = Vec::new();
        if self.holes == Holes::Skipped && item.stat.blocks * 512 < size {
            let found = content::segments(fd.as_fd(), size).context("cannot read", item.path)?;
            let found = limit_segments(found, limits::SEGMENTS - 1);
            if found != segments {
                segments = found;
                map = entry.make_sparse(size, &segments);
            }
        }
        entry.size = map.len() as u64 + segments.iter().map(|(_, length)| length).sum::<u64>();
        let padding = entry.size.next_multiple_of(512) - entry.size;
        self.write_header(entry)?;
        self.write(&map)?;
        let mut buffer = vec![0; 256 << 10];
        for (start, length) in segments {
            let mut done = 0;
            while done < length {
                let want = usize::try_from(length - done)
                    .unwrap_or(buffer.len())
                    .min(buffer.len());
                let chunk = buffer.get_mut(..want).unwrap_or_default();
                let got = content::read_at(fd.as_fd(), chunk, start + done);
                if got.context("cannot read", item.path)? < want {
                    let what = "the file was truncated while it was read";
                    return Err(TreeError::new(ErrorKind::Io, what).at(item.path));
                }
                self.write(chunk)?;
                done += want as u64;
                self.report.done.bytes += want as u64;
                (self.progress)(self.report.done);
            }
        }
        self.write_zeros(padding)
    }

    fn write_header(&mut self, entry: EntryHeader) -> Result<()> {
        let (header, records) = entry.finish();
        if !records.0.is_empty() {
            self.write_extended(&records, EntryType::XHeader)?;
        }
        self.write(header.as_bytes())
    }

    /// Writes a comment on the archive, which readers ignore. It must precede all entries.
    pub(super) fn write_comment(&mut self, text: &str) -> Result<()> {
        let mut records = Records::default();
        records.push(*b"comment", text);
        self.write_extended(&records, EntryType::XGlobalHeader)
    }

    fn write_extended(&mut self, records: &Records, kind: EntryType) -> Result<()> {
        let data = records.to_bytes();
        let mut header = Header::new_ustar();
        fill_field(&mut header.as_old_mut().name, b"././@PaxHeader");
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.write(header.as_bytes())?;
        self.write(&data)?;
        self.write_zeros((data.len() as u64).next_multiple_of(512) - data.len() as u64)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.written += data.len() as u64;
        if let Some(sum) = &mut self.sum {
            sum.update(data);
        }
        self.out.write_all(data).map_err(cannot_write)
    }

    fn write_zeros(&mut self, count: u64) -> Result<()> {
        const ZEROS: [u8; 512] = [0; 512];
        let mut left = count;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(512).min(512);
            self.write(ZEROS.get(..length).unwrap_or_default())?;
            left -= length as u64;
        }
        Ok(())
    }
}

/// Merges neighboring segments, across the smallest holes first, until there are at most `limit`.
fn limit_segments(mut segments: Vec<(u64, u64)>, limit: usize) -> Vec<(u64, u64)> {
    let mut hole = 4096;
    while segments.len() > limit {
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

/// The header of an entry, under construction.
struct EntryHeader {
    header: Header,
    records: Records,
    path: Vec<u8>,
    link: Vec<u8>,
    kind: EntryType,
    size: u64,
    sparse: bool,
}

impl EntryHeader {
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

    fn new(item: &Item<'_>, prefix: &[u8], raw: Option<&RawLayer>) -> Result<Self> {
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
        entry.set_attributes(item)?;
        if let Some(raw) = raw {
            if item.kind() == FileKind::Socket {
                entry.records.push(pax::SOCKET, *b"1");
            }
            if item.path.is_empty() {
                entry.records.push(pax::LAYER, raw.layer.to_string());
            }
            if raw.lent.contains(&item.stat.ino) {
                entry.records.push(pax::INO, item.stat.ino.to_string());
            }
        }
        Ok(entry)
    }

    fn set_attributes(&mut self, item: &Item<'_>) -> Result<()> {
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
                self.records.push(*b"mtime", pax::format_time(stat.mtime));
            }
        }
        if matches!(item.kind(), FileKind::CharDevice | FileKind::BlockDevice) {
            let bad = |error| TreeError::io("cannot write the device number", error).at(item.path);
            self.header
                .set_device_major(rustix::fs::major(stat.rdev))
                .map_err(bad)?;
            self.header
                .set_device_minor(rustix::fs::minor(stat.rdev))
                .map_err(bad)?;
        }
        for (name, value) in item.xattrs()? {
            let acl_kind = match name.as_slice() {
                ACL_ACCESS => Some(&b"access"[..]),
                ACL_DEFAULT => Some(&b"default"[..]),
                _ => None,
            };
            match (acl_kind, acl::to_text(&value)) {
                (Some(kind), Some(text)) => self.records.push([pax::ACL, kind].concat(), text),
                _ => {
                    let key = [pax::XATTR, &pax::escape_xattr(&name)].concat();
                    self.records.push(key, value);
                }
            }
        }
        Ok(())
    }

    /// Turns the entry into a sparse file (PAX format 1.0), and returns the map that must precede its data.
    fn make_sparse(&mut self, size: u64, segments: &[(u64, u64)]) -> Vec<u8> {
        self.records.push(*b"GNU.sparse.major", *b"1");
        self.records.push(*b"GNU.sparse.minor", *b"0");
        self.records.push(*b"GNU.sparse.name", self.path.clone());
        self.records.push(*b"GNU.sparse.realsize", size.to_string());
        self.sparse = true;
        let mut all = segments.to_vec();
        // An empty segment represents a hole at the end.
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
            // A reader without support for sparse files must not unpack the map and data under the file's name.
            fill_field(
                &mut self.header.as_old_mut().name,
                b"./GNUSparseFile.0/sparse",
            );
        } else {
            if !fits(&self.path) {
                self.records.push(*b"path", self.path.clone());
            }
            fill_field(&mut self.header.as_old_mut().name, &self.path);
        }
        if !fits(&self.link) {
            self.records.push(*b"linkpath", self.link.clone());
        }
        fill_field(&mut self.header.as_old_mut().linkname, &self.link);
        if self.size > FIELD_12 {
            self.records.push(*b"size", self.size.to_string());
        }
        self.header.set_size(self.size.min(FIELD_12));
        self.header.set_entry_type(self.kind);
        self.header.set_cksum();
        (self.header, self.records)
    }
}

/// Copies as many bytes as fit into a field of a header. A PAX record holds the complete value.
fn fill_field(field: &mut [u8], bytes: &[u8]) {
    for (to, from) in field.iter_mut().zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smallest_holes_are_merged_when_a_map_has_too_many_segments() {
        let runs = vec![(0, 10), (20, 10), (100_000, 5), (110_000, 5), (900_000, 1)];
        assert_eq!(limit_segments(runs.clone(), 5), runs);
        let four = vec![(0, 30), (100_000, 5), (110_000, 5), (900_000, 1)];
        assert_eq!(limit_segments(runs.clone(), 4), four);
        let three = vec![(0, 30), (100_000, 10_005), (900_000, 1)];
        assert_eq!(limit_segments(runs.clone(), 3), three);
        assert_eq!(limit_segments(runs, 1), [(0, 900_001)]);
    }
}
