//! Reads the entries of a tar stream in order, with their data.
//!
//! The module uses the header types of the `tar` crate but not its reader, because that splits PAX records at newlines,
//! which binary xattrs can contain, and expands sparse files. It does not depend on the target of the entries.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::compress::{NeedsMemory, StreamEnd};
use super::extended::Extended;
use super::limits;
use super::member::{self, EntryKind, Member, PrecedingHeaders};
use super::rest::{EndlessRest, RestLimit};
use super::sparse::{Map, MapInData, Sparse};
use crate::tree::error::{ErrorKind, Result, TreeError};

const BLOCK: usize = 512;

/// The number of segments in an extension block of GNU's sparse header.
const SLOTS: usize = 21;

/// An unusual end of an archive that was read completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnusualEnd {
    /// Another archive follows.
    Followed,
    /// The end marker is missing, but the compressed stream is complete.
    Missing,
}

/// A reader of the entries of an uncompressed stream.
pub(super) struct Members<R> {
    input: R,
    /// A block that was read but not consumed.
    ahead: Option<[u8; BLOCK]>,
    /// Whether an end marker was read, so that the end of the stream is a valid end of the archive.
    may_end: bool,
    end: StreamEnd,
    /// The condition at the end of the archive, if it is unusual.
    unusual_end: Option<UnusualEnd>,
    /// The unread bytes of the current entry's data.
    left: u64,
    /// The number of padding bytes after the data.
    padding: u64,
    global: Extended,
    /// The number of headers read so far.
    headers: u64,
    /// The path of the current entry, for errors.
    path: Vec<u8>,
    /// The number of bytes that may follow the end of the archive.
    max_rest: u64,
    /// A limit like `max_rest` for the bytes before they are decoded.
    rest: RestLimit,
}

impl<R: Read> Members<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            ahead: None,
            may_end: false,
            end: StreamEnd::Unmarked,
            unusual_end: None,
            left: 0,
            padding: 0,
            global: Extended::default(),
            headers: 0,
            path: Vec::new(),
            max_rest: u64::MAX,
            rest: RestLimit::default(),
        }
    }

    /// Sets the limit of the input, which [`Self::limit_rest`] applies as well.
    pub(super) fn set_rest(&mut self, rest: RestLimit) {
        self.rest = rest;
    }

    /// Limits what may follow the end of the archive, before and after it is decoded. It is read to find out whether
    /// the stream is complete.
    pub(super) fn limit_rest(&mut self, bytes: u64) {
        self.max_rest = bytes;
    }

    /// Returns the underlying reader.
    pub(super) fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Sets the condition for an archive without an end marker, which is otherwise truncated.
    pub(super) fn set_end(&mut self, end: StreamEnd) {
        self.end = end;
    }

    /// Returns what is unusual at the end of the archive. Only valid after [`Self::next`] returned `None`.
    pub(super) fn unusual_end(&self) -> Option<UnusualEnd> {
        self.unusual_end
    }

    /// Returns the next entry, or `None` at the end of the archive.
    ///
    /// At the end the stream has been read up to its last byte, so that the decoder has verified the checksum of a
    /// compressed stream.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        self.next_member().map_err(with_hint)
    }

    fn next_member(&mut self) -> Result<Option<Member>> {
        let mut preceding = PrecedingHeaders::default();
        loop {
            self.skip_rest()?;
            let Some(header) = self.read_header()? else {
                if preceding.is_any() {
                    let what = "the archive ends between an extended header and its entry, after";
                    return Err(self.at_entry(TreeError::new(ErrorKind::Truncated, what)));
                }
                return Ok(None);
            };
            match header.entry_type() {
                EntryType::GNULongName => preceding.long_name = Some(self.read_long_text(&header)?),
                EntryType::GNULongLink => preceding.long_link = Some(self.read_long_text(&header)?),
                EntryType::XHeader => preceding.local = self.read_local(&header)?,
                EntryType::XGlobalHeader => self.read_global(&header)?,
                // 'X' is the type that Solaris used before the standard; 'V' is a volume label.
                other => match other.as_byte() {
                    b'X' => preceding.local = self.read_local(&header)?,
                    b'V' => self.begin(member::parse_number(&header.as_old().size), &[])?,
                    _ => return self.read_entry(&header, preceding).map(Some),
                },
            }
        }
    }

    fn read_entry(&mut self, header: &Header, mut preceding: PrecedingHeaders) -> Result<Member> {
        self.path = preceding.path(header, &self.global);
        // GNU tar writes this record in the global header of a volume, for the first entry only.
        preceding.local.continues |= std::mem::take(&mut self.global.continues);
        let gnu_sparse = match header.entry_type() {
            EntryType::GNUSparse => Some(self.read_gnu_sparse(header)?),
            _ => None,
        };
        let mut member = member::assemble(header, preceding, &self.global, gnu_sparse)?;
        member.omitted.append(&mut self.global.omitted);
        // Directories in incremental archives have data, too: a list of names.
        let has_data = match member.kind {
            EntryKind::File | EntryKind::Socket | EntryKind::Continuation => true,
            _ => header.entry_type().as_byte() == b'D',
        };
        if has_data {
            self.begin(Some(member.stored.into()), &member.path)?;
        } else {
            self.begin_claimed(member.stored, &member.path)?;
            member.stored = 0;
        }
        // Only files have a map, and the rest of a file has none.
        if member.kind != EntryKind::File {
            member.sparse = None;
        }
        if let Some(sparse) = &mut member.sparse {
            if sparse.map_in_data {
                sparse.map = self.read_map_in_data()?;
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

    /// Begins an entry without content, whose header may nevertheless contain a size.
    ///
    /// Old writers store the size of the file in the headers of its hard links, without data; POSIX permits data
    /// there (`pax -o linkdata`), too. The next block decides: if it is a valid header, there is no data. The same
    /// holds for blocks of zeros up to the end of the stream, because those are the end of the archive.
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
                // The next read reports the truncation, unless an end marker was read.
                return Ok(());
            }
            let zeros = is_zeros(header.as_bytes());
            if !zeros && !self.may_end && member::has_valid_checksum(&header) {
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

    /// Reads the next header block and verifies its checksum; returns `None` at the end of the archive.
    fn read_header(&mut self) -> Result<Option<Header>> {
        let mut header = Header::new_old();
        let got = self.fill(header.as_mut_bytes())?;
        let first = self.headers == 0;
        if got == 0 && self.may_end {
            return Ok(None);
        }
        self.may_end = false;
        // GNU tar accepts an archive that ends between two entries. Here it is an error unless the decoder has verified
        // the end: a container from a truncated archive, for example after a broken connection, must not pass for a
        // complete one.
        if got == 0 && !first && self.end == StreamEnd::Marked {
            self.unusual_end = Some(UnusualEnd::Missing);
            return Ok(None);
        }
        if got == 0 && !first {
            return Err(self.truncated().hint(NO_END_MARKER));
        }
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
        if !member::has_valid_checksum(&header) {
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

    fn read_gnu_sparse(&mut self, header: &Header) -> Result<Sparse> {
        let gnu = header
            .as_gnu()
            .ok_or_else(|| self.damaged("a sparse file without a GNU header"))?;
        let mut map = Map::default();
        for slot in &gnu.sparse {
            self.add_slot(&mut map, &slot.offset, &slot.numbytes)?;
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
                self.add_slot(&mut map, &slot.offset, &slot.numbytes)?;
            }
            more = extended.is_extended();
        }
        let size = member::parse_number(&gnu.realsize);
        Ok(Sparse {
            size: size
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| self.damaged("its sparse map has no size"))?,
            map,
            map_in_data: false,
        })
    }

    fn add_slot(&self, map: &mut Map, offset: &[u8], length: &[u8]) -> Result<()> {
        // An unused slot is all zeros.
        if length.first() == Some(&0) && offset.first() == Some(&0) {
            return Ok(());
        }
        let number = |field: &[u8]| member::parse_number(field).and_then(|n| u64::try_from(n).ok());
        let (offset, length) = number(offset)
            .zip(number(length))
            .ok_or_else(|| self.damaged("its sparse map is not a list of numbers"))?;
        map.push(offset, length)
            .map_err(|error| self.at_entry(error))
    }

    fn read_map_in_data(&mut self) -> Result<Map> {
        let mut map = MapInData::default();
        loop {
            let mut block = [0; BLOCK];
            self.read_data(&mut block)?;
            if let Some(map) = map.block(&block).map_err(|error| self.at_entry(error))? {
                return Ok(map);
            }
        }
    }

    /// Reads an extended header that applies to the next entry.
    fn read_local(&mut self, header: &Header) -> Result<Extended> {
        let data =
            self.read_extension(header, limits::EXTENDED, "the PAX header after this entry")?;
        let mut records = Extended::default();
        records.read(&data).map_err(|error| self.bad_pax(error))?;
        Ok(records)
    }

    /// Reads an extended header that applies to all following entries.
    fn read_global(&mut self, header: &Header) -> Result<()> {
        let what = "the global PAX header after this entry";
        let data = self.read_extension(header, limits::GLOBAL, what)?;
        let read = self.global.read(&data);
        read.map_err(|error| self.bad_pax(error))?;
        if let Some(bad) = self.global.bad.take() {
            return Err(self.at_entry(bad));
        }
        limits::check_size(
            self.global.xattr_bytes(),
            limits::GLOBAL,
            "the set of global PAX records",
            &self.path,
        )
    }

    fn bad_pax(&self, error: &str) -> TreeError {
        let what = format!("damaged PAX header after this entry: {error}");
        self.at_entry(TreeError::new(ErrorKind::Damaged, what))
    }

    fn read_long_text(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut text =
            self.read_extension(header, limits::PATH, "the long name after this entry")?;
        if let Some(end) = text.iter().position(|&byte| byte == 0) {
            text.truncate(end);
        }
        Ok(text)
    }

    fn read_extension(&mut self, header: &Header, limit: u64, what: &str) -> Result<Vec<u8>> {
        let size = member::parse_number(&header.as_old().size);
        self.begin(size, b"")?;
        limits::check_size(self.left, limit, what, &self.path)?;
        let mut data = vec![0; usize::try_from(self.left).unwrap_or_default()];
        self.read_data(&mut data)?;
        Ok(data)
    }

    /// Fills the buffer from the current entry's data. It is an error if less data remains.
    pub(super) fn read_data(&mut self, buffer: &mut [u8]) -> Result<()> {
        if buffer.len() as u64 > self.left {
            return Err(self.damaged("its data is shorter than its size"));
        }
        if self.fill(buffer)? < buffer.len() {
            return Err(self.truncated());
        }
        self.left -= buffer.len() as u64;
        Ok(())
    }

    /// Returns the number of bytes up to the next header. The caller moves its input there.
    pub(super) fn pass_rest(&mut self) -> u64 {
        std::mem::take(&mut self.left) + std::mem::take(&mut self.padding)
    }

    /// Skips the rest of the current entry.
    pub(super) fn skip_rest(&mut self) -> Result<()> {
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut self.input.by_ref().take(rest), &mut io::sink())
            .map_err(|error| read_error(error, &self.path))?;
        if skipped < self.left {
            return Err(self.truncated());
        }
        // Truncated padding at the end of the stream loses no data; GNU tar accepts it, too.
        self.left = 0;
        self.padding = 0;
        Ok(())
    }

    /// Reads up to the end of the stream, past the first block of the end marker.
    fn drain(&mut self) -> Result<()> {
        let mut header = Header::new_old();
        let mut left = self.max_rest;
        if left < u64::MAX {
            self.rest.set(left);
        }
        loop {
            if self.fill(header.as_mut_bytes())? < BLOCK {
                return Ok(());
            }
            left = left.checked_sub(BLOCK as u64).ok_or_else(|| {
                let endless = EndlessRest(self.max_rest);
                TreeError::new(ErrorKind::Limit, endless.to_string())
            })?;
            if member::has_valid_checksum(&header) {
                self.unusual_end = Some(UnusualEnd::Followed);
            }
        }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut got = 0;
        if let Some(ahead) = self.ahead.take() {
            // Only headers are read ahead, and the next read is one of a header.
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
        self.at_entry(TreeError::new(
            ErrorKind::Truncated,
            "the archive is truncated",
        ))
    }

    fn damaged(&self, what: &str) -> TreeError {
        self.at_entry(TreeError::new(
            ErrorKind::Damaged,
            format!("damaged entry: {what}"),
        ))
    }

    /// Adds the path of the current entry to an error, if there is one yet.
    fn at_entry(&self, error: TreeError) -> TreeError {
        if self.path.is_empty() {
            error
        } else {
            error.at(self.path.as_slice())
        }
    }
}

const NO_END_MARKER: &str = "download or create the archive again; if it is complete and its writer \
                             writes no end marker, append one: truncate -s +1024 FILE";

/// Adds a hint to the error of a damaged archive.
fn with_hint(error: TreeError) -> TreeError {
    match error.kind() {
        ErrorKind::Damaged => error.hint("download or create the archive again"),
        _ => error,
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

/// Converts an error of the reader. An error of the input has an errno; one of a decoder or of the frames of a
/// connection has none.
fn read_error(error: io::Error, path: &[u8]) -> TreeError {
    if (error.get_ref()).is_some_and(|inner| inner.is::<NeedsMemory>()) {
        return TreeError::new(ErrorKind::Limit, "cannot unpack the archive").because(error);
    }
    let inner = error.get_ref();
    if let Some(endless) = inner.and_then(|inner| inner.downcast_ref::<EndlessRest>()) {
        return TreeError::new(ErrorKind::Limit, endless.to_string());
    }
    let (kind, what) = match (error.raw_os_error(), error.kind()) {
        (Some(_), _) => return TreeError::io("cannot read the archive", error),
        (None, io::ErrorKind::UnexpectedEof) => (ErrorKind::Truncated, "the archive is truncated"),
        (None, _) => (ErrorKind::Damaged, "the archive is damaged"),
    };
    // Before the first entry there is no path.
    if path.is_empty() {
        return TreeError::new(kind, what).because(error);
    }
    let what = format!("{what} after");
    TreeError::new(kind, what).at(path).because(error)
}
