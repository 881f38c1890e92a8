//! Copies the content of files.
//!
//! Blocks are shared if the file system supports it. Otherwise only data is copied, and holes are preserved.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::SeekFrom;

use crate::error::{Errno, Error, Result};
use crate::points::{changing, point};
use crate::sys::fault;
use crate::sys::write_back::start_write_back;

/// The maximum size of a step of a copy, in bytes. Between two steps, other threads can access the files.
const STEP: u64 = 4 << 20;

/// The maximum size of a file that is copied with plain reads and writes, if it has no holes.
///
/// For small files that is faster: copy_file_range splices through a pipe, and the search for holes takes two calls.
const SMALL: u64 = 64 << 10;

/// The way in which the content of a file was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// Both files share blocks.
    Shared,
    /// The data was written, or the file is empty.
    Written,
}

/// When the disk gets the content of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteBack {
    /// As soon as each step is copied, because a caller will wait for all of it.
    Early,
    /// When the kernel writes it back.
    Later,
}

/// The parts of a file that [`sync`] makes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncScope {
    /// Content and attributes: fsync(2).
    All,
    /// Content, and the attributes that are needed to read it: fdatasync(2).
    Data,
}

/// Copies the first `len` bytes of `src` over the empty file `dst`, and makes `dst` that long.
/// `src` must not change meanwhile.
pub fn copy_data(src: BorrowedFd<'_>, dst: BorrowedFd<'_>, len: u64) -> Result<()> {
    copy_content(src, dst, len, WriteBack::Later).map(drop)
}

/// Copies content like [`copy_data`], and returns the way in which it was copied.
///
/// With `waited_for`, writeback of each step starts as soon as it is copied, because the caller will wait for writeback
/// of the whole file.
pub fn copy_content(
    src: BorrowedFd<'_>,
    dst: BorrowedFd<'_>,
    len: u64,
    write_back: WriteBack,
) -> Result<Copied> {
    let _change = fault::begin()?;
    if len == 0 {
        return Ok(Copied::Written);
    }
    if rustix::fs::ioctl_ficlone(dst, src).is_ok() {
        return Ok(Copied::Shared);
    }
    if len <= SMALL && super::stat::stat_fd(src)?.blocks * 512 >= len {
        if read_write(src, dst, 0, len)? < len {
            rustix::fs::ftruncate(dst, len)?;
        }
        return Ok(Copied::Written);
    }
    rustix::fs::ftruncate(dst, len)?;
    let mut at = 0;
    while at < len {
        let Some((start, end)) = next_data(src, at, len)? else {
            break;
        };
        let mut step = start;
        while step < end {
            let next = end.min(step + STEP);
            copy_range(src, dst, step, next)?;
            point("in a copy");
            if write_back == WriteBack::Early && len > STEP {
                start_write_back(dst, step, next - step)?;
            }
            step = next;
        }
        at = end;
    }
    Ok(Copied::Written)
}

/// Makes the empty file `dst` share all blocks of `src` (FICLONE).
///
/// The content is that of one moment: the file system writes back the pages of `src` first, and until the copy is
/// complete, every write(2) and every store through a mapping waits.
pub fn share(src: BorrowedFd<'_>, dst: BorrowedFd<'_>) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::ioctl_ficlone(dst, src)?)
}

/// Whether an error of [`share`] means that the file system cannot share blocks.
pub fn cannot_share(error: Error) -> bool {
    matches!(
        error.errno(),
        Errno::OPNOTSUPP | Errno::INVAL | Errno::XDEV | Errno::NOTTY | Errno::NOSYS
    )
}

/// Writes back the dirty pages of a file and waits for the writeback, without a sync.
///
/// The next store to such a page through a mapping is a page fault, which changes the times of the file.
pub fn write_pages(file: impl AsFd) -> Result<()> {
    super::write_back::write_back(file.as_fd())
}

/// Returns the next data extent at or after `at`; `None` if only a hole follows.
fn next_data(src: BorrowedFd<'_>, at: u64, len: u64) -> Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(src, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // The file system does not support SEEK_DATA; treat everything as data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, len))),
        Err(error) => return Err(error.into()),
    };
    if start >= len {
        return Ok(None);
    }
    let end = match rustix::fs::seek(src, SeekFrom::Hole(start)) {
        Ok(end) => end.min(len),
        Err(Errno::NXIO) => len,
        Err(error) => return Err(error.into()),
    };
    Ok(Some((start, end)))
}

fn copy_range(src: BorrowedFd<'_>, dst: BorrowedFd<'_>, start: u64, end: u64) -> Result<()> {
    let (mut from, mut to) = (start, start);
    while from < end {
        let want = usize::try_from(end - from).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(src, Some(&mut from), dst, Some(&mut to), want) {
            // The file was truncated concurrently. The rest of the copy stays a hole.
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return read_write(src, dst, from, end).map(drop);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Copies a range with reads and writes, and returns the offset where the data ended.
///
/// That is before `end` if the file was truncated concurrently. The rest of the copy stays a hole.
fn read_write(src: BorrowedFd<'_>, dst: BorrowedFd<'_>, start: u64, end: u64) -> Result<u64> {
    let most = usize::try_from(end - start).unwrap_or(usize::MAX);
    let mut buffer = vec![0_u8; most.min(256 << 10)];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at)
            .unwrap_or(buffer.len())
            .min(buffer.len());
        let part = buffer.get_mut(..want).unwrap_or_default();
        let got = rustix::io::retry_on_intr(|| rustix::io::pread(src, &mut *part, at))?;
        if got == 0 {
            break;
        }
        write_all(dst, part.get(..got).unwrap_or_default(), at)?;
        at += got as u64;
    }
    Ok(at)
}

/// Writes all of `data` at the offset `at`.
pub fn write_all(dst: impl AsFd, data: &[u8], at: u64) -> Result<()> {
    let mut done = 0;
    while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
        done += write_some(&dst, rest, at + done as u64)?;
    }
    Ok(())
}

/// Writes as much of `data` as possible at the offset `at`, at least one byte, and returns the number of bytes.
pub fn write_some(dst: impl AsFd, data: &[u8], at: u64) -> Result<usize> {
    let _change = changing();
    match rustix::io::retry_on_intr(|| rustix::io::pwrite(&dst, data, at))? {
        0 if !data.is_empty() => Err(Error::Errno(Errno::IO)),
        done => Ok(done),
    }
}

/// Writes a file to the disk.
pub fn sync(fd: impl AsFd, scope: SyncScope) -> Result<()> {
    let _change = fault::begin()?;
    let done = match scope {
        SyncScope::Data => rustix::fs::fdatasync(fd),
        SyncScope::All => rustix::fs::fsync(fd),
    };
    Ok(done?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    /// Copies files of sizes around each threshold, and files with holes, and compares the content.
    #[test]
    fn all_sizes_are_copied_completely_and_holes_preserved() {
        for len in [0, 1, 4096, SMALL - 1, SMALL, SMALL + 1, 9 << 20] {
            let (src, dst) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            let data: Vec<u8> = (0..len).map(|at| (at % 251) as u8 + 1).collect();
            src.write_all_at(&data, 0).unwrap();
            copy_content(src.as_fd(), dst.as_fd(), len, WriteBack::Early).unwrap();
            let mut found = vec![0; data.len()];
            assert_eq!(dst.metadata().unwrap().len(), len);
            dst.read_exact_at(&mut found, 0).unwrap();
            assert!(found == data, "{len} bytes");
        }
        for len in [SMALL, 1 << 20] {
            let (src, dst) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            src.set_len(len).unwrap();
            src.write_all_at(b"end", len - 3).unwrap();
            copy_content(src.as_fd(), dst.as_fd(), len, WriteBack::Early).unwrap();
            let mut found = vec![1; usize::try_from(len).unwrap()];
            dst.read_exact_at(&mut found, 0).unwrap();
            assert!(found.ends_with(b"\0end"));
            assert!(dst.metadata().unwrap().blocks() * 512 < len, "{len} bytes");
        }
    }

    /// Checks that the rest of a file that was truncated during the copy reads as zeros.
    #[test]
    fn copy_of_a_truncated_file_has_the_requested_size() {
        let (src, dst) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        src.write_all_at(&[7; 4096], 0).unwrap();
        copy_data(src.as_fd(), dst.as_fd(), 4099).unwrap();
        let mut found = [1; 4099];
        dst.read_exact_at(&mut found, 0).unwrap();
        assert_eq!((found[4095], found[4096], found[4098]), (7, 0, 0));
    }
}
