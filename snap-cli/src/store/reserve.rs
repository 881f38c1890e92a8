//! Space that is kept for the day when the disk is full: then what frees space needs a little of it first
//! (a new manifest, a lock file). A few files, so that inodes are kept too. It is given up when such a
//! command meets a full disk, and set aside anew when there is room (docs/decisions/0009).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::run::probe;
use super::{Store, disk};
use crate::error::{Error, Result};

/// How many files.
const FILES: u64 = 8;
/// How much in all, on a disk that is not small.
const MAX_SIZE: u64 = 1 << 20;
/// Of a small disk only this part.
const DISK_FRACTION: u64 = 128;
/// With less than this a disk is full to a mount.
const FULL_BELOW: u64 = 64 << 10;
/// It is set aside only where there is so many times as much room.
const MIN_FREE_FACTOR: u64 = 8;

fn reserve_dir(store: &Store) -> PathBuf {
    store.root().join("reserve")
}

/// Sets the reserve aside if it is not there and there is room for it.
pub fn ensure(store: &Store) -> Result<()> {
    let dir = reserve_dir(store);
    let existing = disk::names(&dir)?;
    if existing.len() as u64 >= FILES {
        return Ok(());
    }
    let at = |error: Errno| {
        Error::at(
            "look at the disk of",
            store.root(),
            std::io::Error::from(error),
        )
    };
    let space = rustix::fs::statvfs(store.root()).map_err(at)?;
    let size = (space.f_blocks * space.f_frsize / DISK_FRACTION).min(MAX_SIZE) / FILES;
    let has_space = space.f_bavail * space.f_frsize >= size * FILES * MIN_FREE_FACTOR;
    // Where inodes are made as they are needed, none are counted.
    let has_inodes = space.f_files == 0 || space.f_favail >= FILES * MIN_FREE_FACTOR;
    if !has_space || !has_inodes {
        return Ok(());
    }
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(Error::at("make the folder", &dir, error));
        }
        Ok(()) | Err(_) => {}
    }
    for number in 0..FILES {
        let path = dir.join(number.to_string());
        if let Err(error) = allocate(&path, size) {
            disk::remove_if_exists(&path)?;
            return Err(Error::at("set space aside in", &path, error));
        }
    }
    Ok(())
}

/// Gives the reserve up where the disk is full, for a mount: removing a lower file needs a little space.
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
    // What statfs reports is not exact, and root may use more.
    let full = probe(&store.paths().locks()).is_err_and(|error| error.is_no_space());
    if full && release(store)? {
        log::warn!("the disk is full: using the space that was set aside for this");
    }
    Ok(())
}

/// Gives the reserve up; false where there was none.
pub fn release(store: &Store) -> Result<bool> {
    let dir = reserve_dir(store);
    let existing = disk::names(&dir)?;
    for name in &existing {
        disk::remove_if_exists(&dir.join(name))?;
    }
    if existing.is_empty() {
        return Ok(false);
    }
    // What was freed is free when the disk's journal says so.
    disk::sync_dir(&dir)?;
    Ok(true)
}

fn allocate(path: &std::path::Path, size: u64) -> std::io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    let mut file: File = match made {
        Ok(file) => file,
        // Another command is at it, or was.
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
    fn it_is_kept_given_up_and_kept_again() {
        let dir = tempfile::tempdir().unwrap();
        let session = Session {
            command: "test".to_owned(),
            patience: Duration::ZERO,
            mounts: Default::default(),
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
