//! The entries of a tar stream, one after another, with their data.
//!
//! The blocks are read here and not by the `tar` crate, whose headers are used: it splits PAX
//! records at newlines, which binary attribute values may hold, and expands sparse files. Knows
//! nothing of where entries will be unpacked.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::compress::NeedsMemory;
use super::extended::Extended;
use super::limits;
use super::member::{self, Before, Member, What};
use super::sparse::{Map, MapInData, Sparse};
use crate::tree::error::{ErrorKind, Result, TreeError};

const BLOCK: usize = 512;

/// Slots for runs in one extension block of GNU's sparse header.
const SLOTS: usize = 21;

/// Reads entries from an uncompressed stream.
pub(super) struct Members<R> {
    input: R,
    /// A block that was read ahead.
    ahead: Option<[u8; BLOCK]>,
    /// Whether the end of the stream is the end of the archive: its end marker was read.
    may_end: bool,
    /// Whether another archive follows the end of this one.
    followed: bool,
    /// Bytes of the present entry's data that were not read yet.
    left: u64,
    /// Bytes from there to the next block.
    padding: u64,
    global: Extended,
    /// How many headers were read.
    headers: u64,
    /// The path of the present entry, for errors.
    path: Vec<u8>,
}

impl<R: Read> Members<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            ahead: None,
            may_end: false,
            followed: false,
            left: 0,
            padding: 0,
            global: Extended::default(),
            headers: 0,
            path: Vec::new(),
        }
    }

    /// What is read from.
    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Whether another archive follows the end of this one. Known at the end.
    pub(super) fn is_followed(&self) -> bool {
        self.followed
    }

    /// The next entry; `None` at the end, which has then been read up to the last byte, so that the
    /// checksum of a compressed stream was compared too.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        let mut before = Before::default();
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                if before.any() {
                    return Err(self.truncated());
                }
                return Ok(None);
            };
            match header.entry_type() {
                EntryType::GNULongName => before.long_name = Some(self.long_text(&header)?),
                EntryType::GNULongLink => before.long_link = Some(self.long_text(&header)?),
                EntryType::XHeader => before.local = self.local(&header)?,
                EntryType::XGlobalHeader => self.global(&header)?,
                // 'X' is what Solaris wrote before the standard; 'V' names a volume.
                other => match other.as_byte() {
                    b'X' => before.local = self.local(&header)?,
                    b'V' => self.begin(member::number(&header.as_old().size), &[])?,
                    _ => return self.entry(&header, before).map(Some),
                },
            }
        }
    }

    fn entry(&mut self, header: &Header, before: Before) -> Result<Member> {
        self.path = before.path(header, &self.global);
        let old_sparse = match header.entry_type() {
            EntryType::GNUSparse => Some(self.old_sparse(header)?),
            _ => None,
        };
        let mut member = member::member(header, before, &self.global, old_sparse)?;
        // The directories of incremental archives do hold data: a list of names.
        let has_data = matches!(member.what, What::File | What::Socket)
            || header.entry_type().as_byte() == b'D';
        if has_data {
            self.begin(Some(member.stored.into()), &member.path)?;
        } else {
            self.begin_claimed(member.stored, &member.path)?;
            member.stored = 0;
        }
        if let Some(sparse) = &mut member.sparse {
            if sparse.map_in_data {
                sparse.map = self.map_in_data()?;
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

    /// Begins an entry that has no content, but may claim a size.
    ///
    /// Old writers store the size of the file in the headers of its hard links, without data; POSIX allows data
    /// there (`pax -o linkdata`), too. What comes next decides: a header means that there is no data. So
    /// do blocks of zeros up to the end of the stream: that is the end of the archive.
    fn begin_claimed(&mut self, size: u64, path: &[u8]) -> Result<()> {
        self.begin(Some(size.into()), path)?;
        if size == 0 {
            return Ok(());
        }
        let mut rest = self.left + self.padding;
        (self.left, self.padding) = (0, 0);
        while rest > 0 {
            let mut header = Header::new_old();
            if self.fill(header.as_mut_bytes())? < BLOCK {
                // What is missing is an error there, unless an end marker was read.
                return Ok(());
            }
            let zeros = is_zeros(header.as_bytes());
            if !zeros && !self.may_end && member::checksum_fits(&header) {
                self.ahead = Some(*header.as_bytes());
                return Ok(());
            }
            rest -= BLOCK as u64;
            if !zeros {
                self.may_end = false;
                self.left = rest;
                return Ok(());
            }
            self.may_end = true;
        }
        Ok(())
    }

    /// The next header block, its checksum compared; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let got = self.fill(header.as_mut_bytes())?;
        let first = self.headers == 0;
        if got == 0 && self.may_end {
            return Ok(None);
        }
        self.may_end = false;
        // GNU tar takes an archive that ends between two entries, with a warning. A container made of half
        // an archive (from a connection that broke, say) must not look like a whole one.
        if got < BLOCK {
            return Err(if first { not_a_tar() } else { self.truncated() });
        }
        if is_zeros(header.as_bytes()) {
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
        let mut map = Map::default();
        for slot in &gnu.sparse {
            self.slot(&mut map, &slot.offset, &slot.numbytes)?;
        }
        let mut more = gnu.is_extended();
        let mut blocks = 0;
        while more {
            let mut extended = GnuExtSparseHeader::new();
            if self.fill(extended.as_mut_bytes())? < BLOCK {
                return Err(self.truncated());
            }
            blocks += 1;
            if blocks > limits::SEGMENTS / SLOTS + 1 {
                let what = format!(
                    "the sparse map has more than {blocks} header blocks, which is the limit"
                );
                return Err(limits::exceeded(what, &self.path));
            }
            for slot in extended.sparse() {
                self.slot(&mut map, &slot.offset, &slot.numbytes)?;
            }
            more = extended.is_extended();
        }
        let size = member::number(&gnu.realsize);
        Ok(Sparse {
            size: size
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| self.damaged("its sparse map has no size"))?,
            map,
            map_in_data: false,
        })
    }

    fn slot(&self, map: &mut Map, offset: &[u8], length: &[u8]) -> Result<()> {
        // An unused slot is all zeros.
        if length.first() == Some(&0) && offset.first() == Some(&0) {
            return Ok(());
        }
        let number = |field: &[u8]| member::number(field).and_then(|n| u64::try_from(n).ok());
        let (offset, length) = number(offset)
            .zip(number(length))
            .ok_or_else(|| self.damaged("its sparse map is not a list of numbers"))?;
        map.push(offset, length).map_err(|error| self.here(error))
    }

    fn map_in_data(&mut self) -> Result<Map> {
        let mut map = MapInData::default();
        loop {
            let mut block = [0; BLOCK];
            self.read_data(&mut block)?;
            if let Some(map) = map.block(&block).map_err(|error| self.here(error))? {
                return Ok(map);
            }
        }
    }

    /// An extended header for the next entry.
    fn local(&mut self, header: &Header) -> Result<Extended> {
        let data = self.extension(header, limits::EXTENDED, "the PAX header after this entry")?;
        let mut records = Extended::default();
        records.read(&data).map_err(|error| self.bad_pax(error))?;
        Ok(records)
    }

    /// An extended header for all entries from here on.
    fn global(&mut self, header: &Header) -> Result<()> {
        let what = "the global PAX header after this entry";
        let data = self.extension(header, limits::GLOBAL, what)?;
        let read = self.global.read(&data);
        read.map_err(|error| self.bad_pax(error))?;
        if let Some(bad) = self.global.bad.take() {
            return Err(self.here(bad));
        }
        limits::bytes(
            self.global.attribute_bytes(),
            limits::GLOBAL,
            "what the global PAX headers set",
            &self.path,
        )
    }

    fn bad_pax(&self, error: &str) -> TreeError {
        let what = format!("damaged PAX header after this entry: {error}");
        self.here(TreeError::new(ErrorKind::Damaged, what))
    }

    fn long_text(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut text = self.extension(header, limits::PATH, "the long name after this entry")?;
        if let Some(end) = text.iter().position(|&byte| byte == 0) {
            text.truncate(end);
        }
        Ok(text)
    }

    fn extension(&mut self, header: &Header, limit: u64, what: &str) -> Result<Vec<u8>> {
        let size = member::number(&header.as_old().size);
        self.begin(size, b"")?;
        limits::bytes(self.left, limit, what, &self.path)?;
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

    /// Reads up to the end of the stream, past the first block of the end marker.
    fn drain(&mut self) -> Result<()> {
        let mut header = Header::new_old();
        loop {
            if self.fill(header.as_mut_bytes())? < BLOCK {
                return Ok(());
            }
            self.followed = self.followed || member::checksum_fits(&header);
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut got = 0;
        if let Some(ahead) = self.ahead.take() {
            // Only headers are read ahead, and a header is what is read next.
            for (to, from) in buffer.iter_mut().zip(ahead) {
                *to = from;
                got += 1;
            }
        }
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

fn is_zeros(block: &[u8]) -> bool {
    block.iter().all(|&byte| byte == 0)
}

fn not_a_tar() -> TreeError {
    TreeError::new(
        ErrorKind::NotAnArchive,
        "this is not a tar archive (plain or compressed with gzip, zstd or xz)",
    )
}

/// An error of the reader: the input's own has an errno, a decoder's has none.
fn read_error(error: io::Error, path: &[u8]) -> TreeError {
    if (error.get_ref()).is_some_and(|inner| inner.is::<NeedsMemory>()) {
        return TreeError::new(ErrorKind::Limit, "can't unpack the archive").because(error);
    }
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
