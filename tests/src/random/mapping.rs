//! Shared mappings of files. Data is copied through a pipe, so that the kernel accesses the mapped memory and a fault
//! is reported as EFAULT instead of killing the test with SIGBUS.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::FileType;
use rustix::io::{Errno, Result};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{
    FileOffset, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice, WriteVolatile,
};

/// Number of bytes that a pipe accepts without a concurrent reader.
const PIPE_SIZE: usize = 4096;

/// A shared mapping from the beginning of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    region: MmapRegion,
    file: File,
}

impl Mapping {
    /// Maps the file up to its current size.
    pub(super) fn new(fd: &OwnedFd, write: bool) -> Result<Mapping> {
        let file = File::from(fd.try_clone().map_err(errno)?);
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::NODEV);
        }
        let size = usize::try_from(stat.st_size).map_err(|_| Errno::FBIG)?;
        let prot = nix::libc::PROT_READ | if write { nix::libc::PROT_WRITE } else { 0 };
        let offset = FileOffset::new(file.try_clone().map_err(errno)?, 0);
        let region = MmapRegion::build(Some(offset), size, prot, nix::libc::MAP_SHARED).map_err(
            |error| match error {
                MmapRegionError::Mmap(error) => errno(error),
                other => panic!("cannot map the file: {other}"),
            },
        )?;
        Ok(Mapping { region, file })
    }

    /// Returns the requested range as far as it is inside the file's current size. The content between the end of the
    /// file and the end of its page is undefined.
    fn part(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_, impl BitmapSlice>> {
        let size = u64::try_from(rustix::fs::fstat(&self.file)?.st_size).unwrap_or_default();
        let end = size.min(self.region.len() as u64);
        let offset = offset.min(end);
        let len = usize::try_from(end - offset)
            .unwrap_or(PIPE_SIZE)
            .min(len)
            .min(PIPE_SIZE);
        let offset = usize::try_from(offset).unwrap_or_default();
        Ok(self
            .region
            .get_slice(offset, len)
            .expect("a range inside the mapping"))
    }

    pub(super) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let part = self.part(offset, len)?;
        let mut bytes = vec![0; part.len()];
        if !bytes.is_empty() {
            let (mut reader, mut writer) = std::io::pipe().map_err(errno)?;
            File::from(OwnedFd::from(writer.try_clone().map_err(errno)?))
                .write_all_volatile(&part)
                .map_err(volatile)?;
            std::io::Write::flush(&mut writer).map_err(errno)?;
            std::io::Read::read_exact(&mut reader, &mut bytes).map_err(errno)?;
        }
        Ok(bytes)
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<usize> {
        let mut part = self.part(offset, data.len())?;
        if part.is_empty() {
            return Ok(0);
        }
        let (reader, mut writer) = std::io::pipe().map_err(errno)?;
        std::io::Write::write_all(&mut writer, &data[..part.len()]).map_err(errno)?;
        File::from(OwnedFd::from(reader))
            .read_exact_volatile(&mut part)
            .map_err(volatile)?;
        Ok(part.len())
    }

    /// Writes the file's dirty pages, as msync(MS_SYNC) of the whole mapping does.
    pub(super) fn sync(&self) -> Result<()> {
        rustix::fs::fdatasync(&self.file)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn volatile(error: VolatileMemoryError) -> Errno {
    match error {
        VolatileMemoryError::IOError(error) => errno(error),
        other => panic!("cannot access the mapping: {other}"),
    }
}
