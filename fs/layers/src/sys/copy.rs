//! Copying the content of a file: shared blocks where the file system can, else the data alone, with
//! holes kept.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::SeekFrom;

use crate::error::{Errno, Error, Result};
use crate::sys::fault;
use crate::sys::write_back::start_write_back;

/// One step of a copy, in bytes; between two steps others get their turn.
const STEP: u64 = 4 << 20;

/// Up to here a file without holes is read and written in one step: copy_file_range goes through a pipe,
/// and looking for holes takes two calls.
const SMALL: u64 = 64 << 10;

/// How the content of a file was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// Both files have the same blocks.
    Shared,
    /// It was written, or there was none.
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

/// What [`sync`] writes to the disk.
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

/// Like [`copy_data`]; returns how the content was copied.
pub fn copy_content(
    src: BorrowedFd<'_>,
    dst: BorrowedFd<'_>,
    len: u64,
    write_back: WriteBack,
) -> Result<Copied> {
    fault::hit()?;
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
            if write_back == WriteBack::Early && len > STEP {
                start_write_back(dst, step, next - step)?;
            }
            step = next;
        }
        at = end;
    }
    Ok(Copied::Written)
}

/// The next run of data at or after `at`; `None` when only a hole is left.
fn next_data(src: BorrowedFd<'_>, at: u64, len: u64) -> Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(src, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system without SEEK_DATA: everything is data.
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
            // The file got shorter under us: what is gone reads as zero, as a hole.
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

/// Returns how far there was something to copy: what is gone when the file got shorter under us reads as
/// zero, as a hole.
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

/// Writes all of `data` at `at`.
pub fn write_all(dst: impl AsFd, data: &[u8], at: u64) -> Result<()> {
    let mut done = 0;
    while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
        done += write_some(&dst, rest, at + done as u64)?;
    }
    Ok(())
}

/// Writes what there is room for of `data` at `at`, at least one byte, and says how much that was.
pub fn write_some(dst: impl AsFd, data: &[u8], at: u64) -> Result<usize> {
    match rustix::io::retry_on_intr(|| rustix::io::pwrite(&dst, data, at))? {
        0 if !data.is_empty() => Err(Error::Errno(Errno::IO)),
        done => Ok(done),
    }
}

/// Writes a file to the disk.
pub fn sync(fd: impl AsFd, scope: SyncScope) -> Result<()> {
    fault::hit()?;
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

    /// Bytes around every size at which the way changes, and holes, arrive as they were.
    #[test]
    fn every_size_is_copied_whole_and_holes_stay() {
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

    /// What is not there any more reads as zero.
    #[test]
    fn a_file_that_got_shorter_is_copied_to_its_old_size() {
        let (src, dst) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        src.write_all_at(&[7; 4096], 0).unwrap();
        copy_data(src.as_fd(), dst.as_fd(), 4099).unwrap();
        let mut found = [1; 4099];
        dst.read_exact_at(&mut found, 0).unwrap();
        assert_eq!((found[4095], found[4096], found[4098]), (7, 0, 0));
    }
}
