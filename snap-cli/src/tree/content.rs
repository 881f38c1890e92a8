//! The data of regular files. A hole and written zeros are equivalent.

use std::os::fd::{AsFd, BorrowedFd};

use cowl_layers::error::Errno;
use cowl_layers::error::Result;
use rustix::fs::SeekFrom;

/// The size of the blocks that are read and compared.
const BLOCK: usize = 64 << 10;

/// Returns the start and end of the next run of data at or after the offset `at`; `None` if only a hole follows.
pub(crate) fn next_data(fd: BorrowedFd<'_>, at: u64, size: u64) -> Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // The file system does not report holes, so everything counts as data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
        Err(error) => return Err(error.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = match rustix::fs::seek(fd, SeekFrom::Hole(start)) {
        Ok(end) if end > start => end.min(size),
        Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => size,
        Err(error) => return Err(error.into()),
    };
    Ok(Some((start, end)))
}

/// Returns the offset and length of each run of data.
pub(crate) fn segments(fd: BorrowedFd<'_>, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size
        && let Some((start, end)) = next_data(fd, at, size)?
    {
        found.push((start, end - start));
        at = end;
    }
    Ok(found)
}

/// Reads at the offset `at` until the buffer is full or the file ends, and returns the number of bytes.
pub(crate) fn read_at(fd: BorrowedFd<'_>, buffer: &mut [u8], at: u64) -> Result<usize> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        let n = rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut *rest, at + got as u64))?;
        if n == 0 {
            break;
        }
        got += n;
    }
    Ok(got)
}

/// An iteration over the blocks of a file that are not all zeros.
pub(crate) struct Blocks<F> {
    fd: F,
    size: u64,
    at: u64,
    data_end: u64,
    buffer: Vec<u8>,
}

impl<F: AsFd> Blocks<F> {
    /// Creates an iteration over the first `size` bytes of a file.
    pub(crate) fn new(fd: F, size: u64) -> Self {
        Self {
            fd,
            size,
            at: 0,
            data_end: 0,
            buffer: vec![0; BLOCK],
        }
    }

    /// Returns the offset and the bytes of the next block.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, &[u8])>> {
        let length = loop {
            if self.at >= self.size {
                return Ok(None);
            }
            if self.at >= self.data_end {
                let Some((start, end)) = next_data(self.fd.as_fd(), self.at, self.size)? else {
                    return Ok(None);
                };
                // Blocks are aligned, so that their offsets do not depend on where holes are.
                self.at = self.at.max(start - start % BLOCK as u64);
                self.data_end = end;
            }
            let length = usize::try_from(self.size - self.at)
                .unwrap_or(BLOCK)
                .min(BLOCK);
            let block = self.buffer.get_mut(..length).unwrap_or_default();
            let got = read_at(self.fd.as_fd(), block, self.at)?;
            block.get_mut(got..).unwrap_or_default().fill(0);
            self.at += length as u64;
            if block.iter().any(|&byte| byte != 0) {
                break length;
            }
        };
        let block = self.buffer.get(..length).unwrap_or_default();
        Ok(Some((self.at - length as u64, block)))
    }
}

/// Returns whether two files of the same size have the same content.
pub(crate) fn is_same(one: impl AsFd, two: impl AsFd, size: u64) -> Result<bool> {
    let mut one = Blocks::new(one, size);
    let mut two = Blocks::new(two, size);
    loop {
        match (one.next()?, two.next()?) {
            (None, None) => return Ok(true),
            (a, b) if a != b => return Ok(false),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_hole_equals_written_zeros() {
        let size = 5 * BLOCK as u64 + 17;
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(size).unwrap();
        sparse.write_all_at(b"x", 3 * BLOCK as u64 + 5).unwrap();
        let mut full = tempfile::tempfile().unwrap();
        full.write_all(&vec![0; usize::try_from(size).unwrap()])
            .unwrap();
        full.write_all_at(b"x", 3 * BLOCK as u64 + 5).unwrap();
        assert!(is_same(&sparse, &full, size).unwrap());
        full.write_all_at(b"y", size - 1).unwrap();
        assert!(!is_same(&sparse, &full, size).unwrap());
        sparse.write_all_at(b"y", size - 1).unwrap();
        assert!(is_same(&sparse, &full, size).unwrap());
        full.write_all_at(b"z", 0).unwrap();
        assert!(!is_same(&sparse, &full, size).unwrap());
    }
}
