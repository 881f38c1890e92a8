//! The entries of a tar stream, one after another, with their data.
//!
//! The blocks are read here and not by the `tar` crate, whose headers are used: it splits PAX
//! records at newlines, which binary attribute values may hold, and expands sparse files. Knows
//! nothing of where entries will be unpacked.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::member::{self, Before, Member, Sparse};
use super::pax::{self, Records};
use crate::delta::error::{ErrorKind, Result, TreeError};

const BLOCK: usize = 512;

/// No header before an entry is larger than this: paths and attributes have limits far below.
const EXTENSION_MAX: u64 = 16 << 20;

/// Digits of the largest 64-bit number.
const LONGEST_NUMBER: usize = 20;

/// Reads entries from an uncompressed stream.
pub(super) struct Members<R> {
    input: R,
    /// Bytes of the present entry's data that were not read yet.
    left: u64,
    /// Bytes from there to the next block.
    padding: u64,
    global: Records,
    /// How many headers were read.
    headers: u64,
    /// The path of the present entry, for errors.
    path: Vec<u8>,
}

impl<R: Read> Members<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            left: 0,
            padding: 0,
            global: Records::default(),
            headers: 0,
            path: Vec::new(),
        }
    }

    /// What is read from.
    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// The next entry; `None` at the end, which has then been read up to the last byte, so that the
    /// checksum of a compressed stream was compared too.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        let mut before = Before::default();
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                let pending = before.long_name.is_some()
                    || before.long_link.is_some()
                    || !before.local.0.is_empty();
                if pending {
                    return Err(self.truncated());
                }
                return Ok(None);
            };
            match header.entry_type() {
                EntryType::GNULongName => before.long_name = Some(self.long_text(&header)?),
                EntryType::GNULongLink => before.long_link = Some(self.long_text(&header)?),
                EntryType::XHeader => before.local = self.records(&header)?,
                EntryType::XGlobalHeader => {
                    let records = self.records(&header)?;
                    self.global.0.extend(records.0);
                }
                // 'X' is what Solaris wrote before the standard; 'V' names a volume.
                other => match other.as_byte() {
                    b'X' => before.local = self.records(&header)?,
                    b'V' => self.begin(member::number(&header.as_old().size), &[])?,
                    _ => {
                        before.global = std::mem::take(&mut self.global);
                        let member = self.entry(&header, &before);
                        self.global = before.global;
                        return member.map(Some);
                    }
                },
            }
        }
    }

    fn entry(&mut self, header: &Header, before: &Before) -> Result<Member> {
        self.path = before.path(header);
        let old_sparse = match header.entry_type() {
            EntryType::GNUSparse => Some(self.old_sparse(header)?),
            _ => None,
        };
        let mut member = member::member(header, before, old_sparse)?;
        // Old writers give a size to what has no data; only these have data in the stream.
        let stored = match header.entry_type() {
            EntryType::Symlink
            | EntryType::Char
            | EntryType::Block
            | EntryType::Fifo
            | EntryType::Directory => 0,
            _ => member.stored,
        };
        member.stored = stored;
        self.begin(Some(stored.into()), &member.path)?;
        if let Some(sparse) = &mut member.sparse {
            if sparse.map_in_data {
                sparse.segments = self.map_in_data()?;
            }
            sparse
                .check(self.left)
                .map_err(|error| self.damaged(error))?;
        }
        Ok(member)
    }

    fn begin(&mut self, size: Option<i128>, path: &[u8]) -> Result<()> {
        self.left = size
            .and_then(|size| u64::try_from(size).ok())
            .filter(|&size| i64::try_from(size).is_ok())
            .ok_or_else(|| {
                TreeError::new(ErrorKind::Damaged, "damaged entry: an impossible size").at(path)
            })?;
        self.padding = self.left.next_multiple_of(BLOCK as u64) - self.left;
        Ok(())
    }

    /// The next header block, its checksum compared; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let got = self.fill(header.as_mut_bytes())?;
        let first = self.headers == 0;
        // GNU tar takes an archive that ends between two entries, with a warning. A container made of half
        // an archive (from a connection that broke, say) must not look like a whole one.
        if got < BLOCK {
            return Err(if first { not_a_tar() } else { self.truncated() });
        }
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            if first {
                let what = "the archive has no entries";
                return Err(TreeError::new(ErrorKind::Empty, what));
            }
            self.drain()?;
            return Ok(None);
        }
        if !member::checksum_fits(&header) {
            return Err(if first {
                not_a_tar()
            } else {
                TreeError::new(
                    ErrorKind::Damaged,
                    "the archive is damaged: no valid header after this entry",
                )
                .at(self.path.as_slice())
            });
        }
        self.headers += 1;
        Ok(Some(header))
    }

    fn old_sparse(&mut self, header: &Header) -> Result<Sparse> {
        let gnu = header
            .as_gnu()
            .ok_or_else(|| self.damaged("a sparse file without GNU's header"))?;
        let mut fields: Vec<_> = gnu.sparse.iter().map(|s| (s.offset, s.numbytes)).collect();
        let mut more = gnu.is_extended();
        let size = member::number(&gnu.realsize);
        while more {
            let mut extended = GnuExtSparseHeader::new();
            if self.fill(extended.as_mut_bytes())? < BLOCK {
                return Err(self.truncated());
            }
            fields.extend(extended.sparse().iter().map(|s| (s.offset, s.numbytes)));
            more = extended.is_extended();
        }
        let number = |field: &[u8]| member::number(field).and_then(|n| u64::try_from(n).ok());
        let mut segments = Vec::new();
        for (offset, length) in &fields {
            // An unused slot is all zeros.
            if length.first() == Some(&0) && offset.first() == Some(&0) {
                continue;
            }
            let pair = number(offset).zip(number(length));
            segments
                .push(pair.ok_or_else(|| self.damaged("its sparse map is no list of numbers"))?);
        }
        Ok(Sparse {
            size: size
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| self.damaged("its sparse map has no size"))?,
            segments,
            map_in_data: false,
        })
    }

    /// PAX sparse format 1.0: decimal numbers, a line each, padded to a block; the first says how
    /// many pairs follow.
    fn map_in_data(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut count = None;
        let mut numbers = Vec::new();
        let mut line = Vec::new();
        loop {
            let mut block = [0; BLOCK];
            self.read_data(&mut block)?;
            for byte in block {
                let bad = "its sparse map is no list of numbers";
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > LONGEST_NUMBER {
                        return Err(self.damaged(bad));
                    }
                    continue;
                }
                let number = pax::decimal(&line).ok_or_else(|| self.damaged(bad))?;
                line.clear();
                match count {
                    None => count = Some(number),
                    Some(_) => numbers.push(number),
                }
                if count.and_then(|count| count.checked_mul(2)) == Some(numbers.len() as u64) {
                    return member::pairs(&numbers).ok_or_else(|| self.damaged(bad));
                }
            }
        }
    }

    fn records(&mut self, header: &Header) -> Result<Records> {
        let data = self.extension(header)?;
        Records::parse(&data).map_err(|error| {
            let what = format!("damaged PAX header after this entry: {error}");
            TreeError::new(ErrorKind::Damaged, what).at(self.path.as_slice())
        })
    }

    fn long_text(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut text = self.extension(header)?;
        if let Some(end) = text.iter().position(|&byte| byte == 0) {
            text.truncate(end);
        }
        Ok(text)
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>> {
        let size = member::number(&header.as_old().size);
        self.begin(size, b"")?;
        if self.left > EXTENSION_MAX {
            return Err(self.damaged("an extended header of more than 16 MiB"));
        }
        let mut data = vec![0; usize::try_from(self.left).unwrap_or_default()];
        self.read_data(&mut data)?;
        Ok(data)
    }

    /// Fills the buffer from the present entry's data; an entry that ends earlier is an error.
    pub(super) fn read_data(&mut self, buffer: &mut [u8]) -> Result<()> {
        if buffer.len() as u64 > self.left {
            return Err(self.damaged("its data is shorter than it says"));
        }
        if self.fill(buffer)? < buffer.len() {
            return Err(self.truncated());
        }
        self.left -= buffer.len() as u64;
        Ok(())
    }

    /// Reads over what is left of the present entry.
    pub(super) fn skip_rest(&mut self) -> Result<()> {
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut self.input.by_ref().take(rest), &mut io::sink())
            .map_err(|error| read_error(error, &self.path))?;
        if skipped < self.left {
            return Err(self.truncated());
        }
        // Padding that is cut off at the very end costs nothing: GNU tar takes it too.
        self.left = 0;
        self.padding = 0;
        Ok(())
    }

    /// Reads up to the end of the stream.
    fn drain(&mut self) -> Result<()> {
        io::copy(&mut self.input, &mut io::sink())
            .map(drop)
            .map_err(|error| read_error(error, &self.path))
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut got = 0;
        while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) => break,
                Ok(n) => got += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read_error(error, &self.path)),
            }
        }
        Ok(got)
    }

    fn truncated(&self) -> TreeError {
        self.here(TreeError::new(
            ErrorKind::Truncated,
            "the archive ends in the middle",
        ))
    }

    fn damaged(&self, what: &str) -> TreeError {
        self.here(TreeError::new(
            ErrorKind::Damaged,
            format!("damaged entry: {what}"),
        ))
    }

    /// Says of an error at which entry it came up; before the first there is none to name.
    fn here(&self, error: TreeError) -> TreeError {
        if self.path.is_empty() {
            error
        } else {
            error.at(self.path.as_slice())
        }
    }
}

fn not_a_tar() -> TreeError {
    TreeError::new(
        ErrorKind::NotAnArchive,
        "this is not a tar archive (plain or compressed with gzip, zstd or xz)",
    )
}

/// An error of the reader: the input's own has an errno, a decoder's has none.
fn read_error(error: io::Error, path: &[u8]) -> TreeError {
    let (kind, what) = match (error.raw_os_error(), error.kind()) {
        (Some(_), _) => return TreeError::io("can't read the archive", error),
        (None, io::ErrorKind::UnexpectedEof) => (
            ErrorKind::Truncated,
            "the compressed archive ends in the middle, after",
        ),
        (None, _) => (
            ErrorKind::Damaged,
            "the compressed archive is damaged after",
        ),
    };
    TreeError::new(kind, what).at(path).because(error)
}
