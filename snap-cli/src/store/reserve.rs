//! Reserved disk space.
//!
//! On a full disk, a command that frees space first needs a little space itself, for a new manifest or a lock file. The
//! reserve consists of several files, so that it contains inodes as well. It is released when such a command fails on a
//! full disk, and allocated again when there is enough space (docs/decisions/0009).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::run::probe;
use super::{Store, disk};
use crate::error::{Error, Result};

/// The number of files.
const FILES: u64 = 8;
/// The maximum size of all files, in bytes.
const MAX_SIZE: u64 = 1 << 20;
/// The reserve uses at most this fraction of the disk: one of so many parts.
const DISK_FRACTION: u64 = 128;
/// A disk with fewer available bytes may be full for a mount.
const FULL_BELOW: u64 = 64 << 10;
/// The reserve is allocated only if so many times its size and inodes are available.
const MIN_FREE_FACTOR: u64 = 8;

fn reserve_dir(store: &Store) -> PathBuf {
    store.root().join("reserve")
}

/// Allocates the reserve if it does not exist and enough space is available.
pub fn ensure(store: &Store) -> Result<()> {
    let dir = reserve_dir(store);
    let existing = disk::names(&dir)?;
    if existing.len() as u64 >= FILES {
        return Ok(());
    }
    let at = |error: Errno| {
        Error::at(
            "inspect the disk of",
            store.root(),
            std::io::Error::from(error),
        )
    };
    let space = rustix::fs::statvfs(store.root()).map_err(at)?;
    let size = (space.f_blocks * space.f_frsize / DISK_FRACTION).min(MAX_SIZE) / FILES;
    let has_space = space.f_bavail * space.f_frsize >= size * FILES * MIN_FREE_FACTOR;
    // A file system that allocates inodes dynamically reports none.
    let has_inodes = space.f_files == 0 || space.f_favail >= FILES * MIN_FREE_FACTOR;
    if !has_space || !has_inodes {
        return Ok(());
    }
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::at("create the directory", &dir, error));
        }
        Ok(()) | Err(_) => {}
    }
    for number in 0..FILES {
        let path = dir.join(number.to_string());
        if let Err(error) = allocate(&path, size) {
            disk::remove_if_exists(&path)?;
            return Err(Error::at("reserve space in", &path, error));
        }
    }
    Ok(())
}

/// Releases the reserve if the disk is full, before a mount: removing a lower file needs space for a whiteout.
pub fn release_if_full(store: &Store) -> Result<()> {
    let space = rustix::fs::statvfs(store.root()).map_err(|error| {
        Error::at(
            "inspect the disk of",
            store.root(),
            std::io::Error::from(error),
        )
    })?;
    let few_inodes = space.f_files != 0 && space.f_favail < FILES;
    if space.f_bavail * space.f_frsize >= FULL_BELOW && !few_inodes {
        return Ok(());
    }
    // The numbers of statfs(2) are not exact, and root may use more, so try to write.
    let full = probe(&store.paths().locks()).is_err_and(|error| error.is_no_space());
    if full && release(store)? {
        log::warn!("the disk is full: released the reserved space");
    }
    Ok(())
}

/// Releases the reserve. Returns false if there was none.
pub fn release(store: &Store) -> Result<bool> {
    let dir = reserve_dir(store);
    let existing = disk::names(&dir)?;
    for name in &existing {
        disk::remove_if_exists(&dir.join(name))?;
    }
    if existing.is_empty() {
        return Ok(false);
    }
    // The file system may reuse the space only after a journal commit.
    disk::sync_dir(&dir)?;
    Ok(true)
}

/// Creates a file of `size` bytes unless it exists.
fn allocate(path: &std::path::Path, size: u64) -> std::io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let mut file: File = match made {
        Ok(file) => file,
        // A race with another command, or an interrupted one.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error),
    };
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let block = [0x5a; 4096];
            for _ in 0..size / 4096 {
                file.write_all(&block)?;
            }
            Ok(())
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Session;
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    #[test]
    fn the_reserve_can_be_allocated_and_released_repeatedly() {
        let dir = tempfile::tempdir().unwrap();
        let session = Session {
            command: "test".to_owned(),
            patience: Duration::ZERO,
            mounts: Default::default(),
            program: None,
        };
        let store = Store::open_or_make(&dir.path().join("store"), session).unwrap();
        assert!(!release(&store).unwrap());
        for _ in 0..2 {
            ensure(&store).unwrap();
            ensure(&store).unwrap();
            let taken = |number: u64| {
                let meta = std::fs::metadata(reserve_dir(&store).join(number.to_string()));
                meta.unwrap().blocks() * 512
            };
            let taken: u64 = (0..FILES).map(taken).sum();
            assert!(taken >= MAX_SIZE / 4, "{taken}");
            assert!(release(&store).unwrap());
            assert!(!release(&store).unwrap());
        }
    }
}
