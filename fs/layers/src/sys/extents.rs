//! Whether a file has changed since its blocks were shared with a copy.
//!
//! The times do not show it for a store through a mapping: the page fault changes them first and then waits for the file's
//! lock, so they may change before the copy, and the content after it.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::error::Result;

/// The maximum size of a file that a file system stores in its metadata.
const MAX_INLINE: usize = 64 << 10;

/// The range of cachestat(2); length 0 is the rest of the file.
#[repr(C)]
struct CacheRange {
    offset: u64,
    length: u64,
}

/// The result of cachestat(2).
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    in_writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// `struct fiemap` without its array.
#[repr(C)]
struct FiemapHeader {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const EXTENTS: usize = 128;

/// `struct fiemap` with its array.
#[repr(C)]
struct Fiemap {
    header: FiemapHeader,
    extents: [FiemapExtent; EXTENTS],
}

/// FIEMAP_FLAG_SYNC.
const SYNC: u32 = 0x1;
/// FIEMAP_EXTENT_LAST.
const LAST: u32 = 0x1;
/// FIEMAP_EXTENT_UNKNOWN and FIEMAP_EXTENT_DELALLOC: the blocks are not allocated yet.
const UNALLOCATED: u32 = 0x2 | 0x4;
/// FIEMAP_EXTENT_DATA_INLINE.
const INLINE: u32 = 0x200;
/// FIEMAP_EXTENT_UNWRITTEN: the content is zeros. A copy has a hole there.
const UNWRITTEN: u32 = 0x800;

/// The location of a file's content.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    /// The content is in these ranges: offset in the file, offset on the disk, length.
    Blocks(Vec<(u64, u64, u64)>),
    /// The content is in the metadata of the file system.
    Inline,
    /// A part of the content is only in memory.
    Unallocated,
}

/// Whether `file` has not changed since [`super::copy::share`] created `copy` from it.
pub fn is_unchanged(file: impl AsFd, copy: impl AsFd) -> Result<bool> {
    let (file, copy) = (file.as_fd(), copy.as_fd());
    // Pages first: a page that is written between the two calls has other blocks by then.
    if has_unwritten_pages(file)? {
        return Ok(false);
    }
    // A store that has made a page dirty since then is written by the first call, to other blocks.
    match (content(file, SYNC)?, content(copy, 0)?) {
        (Content::Inline, Content::Inline) => Ok(read_start(file)? == read_start(copy)?),
        (Content::Blocks(one), Content::Blocks(other)) => Ok(one == other),
        _ => Ok(false),
    }
}

/// Whether pages of a file are dirty or are being written (cachestat(2), Linux 6.5).
fn has_unwritten_pages(file: BorrowedFd<'_>) -> Result<bool> {
    /// The number of cachestat(2), on all architectures that cowl supports.
    const CACHESTAT: libc::c_long = 451;
    let range = CacheRange {
        offset: 0,
        length: 0,
    };
    let mut found = CacheStat::default();
    // SAFETY: the descriptor is open, and both structs have the layout of the kernel's and outlive the call.
    let done = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut found,
            0,
        )
    };
    nix::errno::Errno::result(done)?;
    Ok(found.dirty > 0 || found.in_writeback > 0)
}

/// Returns the location of a file's content (FIEMAP).
fn content(file: BorrowedFd<'_>, flags: u32) -> Result<Content> {
    let size = super::stat::stat_fd(file)?.size;
    let mut blocks: Vec<(u64, u64, u64)> = Vec::new();
    let mut start = 0;
    while start < size {
        let mut map = Fiemap {
            header: FiemapHeader {
                start,
                // Blocks after the end may be allocated for later writes.
                length: size - start,
                flags,
                mapped: 0,
                count: EXTENTS as u32,
                reserved: 0,
            },
            extents: [FiemapExtent::default(); EXTENTS],
        };
        let opcode = rustix::ioctl::opcode::read_write::<FiemapHeader>(b'f', 11);
        // SAFETY: the descriptor is open, and the struct has the layout of the kernel's, with `count` extents.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), opcode as libc::Ioctl, &raw mut map) };
        nix::errno::Errno::result(done)?;
        let mapped = usize::try_from(map.header.mapped).unwrap_or(EXTENTS);
        let mut is_last = mapped == 0;
        for extent in map.extents.iter().take(mapped) {
            is_last |= extent.flags & LAST != 0;
            start = extent.logical.saturating_add(extent.length);
            if extent.flags & INLINE != 0 {
                return Ok(Content::Inline);
            }
            if extent.flags & UNALLOCATED != 0 {
                return Ok(Content::Unallocated);
            }
            if extent.flags & UNWRITTEN != 0 {
                continue;
            }
            match blocks.last_mut() {
                // Two files can have the same blocks in extents of different lengths.
                Some((logical, physical, length))
                    if *logical + *length == extent.logical
                        && *physical + *length == extent.physical =>
                {
                    *length += extent.length;
                }
                _ => blocks.push((extent.logical, extent.physical, extent.length)),
            }
        }
        if is_last {
            break;
        }
    }
    Ok(Content::Blocks(blocks))
}

/// Reads the content of a file that is stored in the metadata of the file system.
fn read_start(file: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let mut buffer = vec![0; MAX_INLINE];
    let read = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, 0))?;
    buffer.truncate(read);
    Ok(buffer)
}
