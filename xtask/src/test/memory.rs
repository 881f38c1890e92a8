//! An ext4 in memory on top of /var/tmp, for this run of the tests only.
//!
//! On a disk, tests would mostly wait for its journal. Tests of disks create their own.

use std::path::Path;

use crate::run::{Result, Run, failure, note};

/// A file system in memory.
const MEMORY: &str = "/dev/shm";
/// The mount point: the directory in which tests create theirs.
const MOUNT_POINT: &str = "/var/tmp";
/// The size of the file system.
///
/// Only written data occupies memory.
const SIZE: u64 = 8 << 30;
/// The memory that must be free.
const NEEDED: u64 = 6 << 30;

/// Mounts the file system in this mount namespace, and returns the directory.
///
/// Without the privilege or the memory, tests use the disk.
pub(super) fn mount() -> Result<Option<&'static Path>> {
    if std::env::var_os("COWL_TEST_DIR").is_some() || std::env::var_os("COWL_KEEP").is_some() {
        return Ok(None);
    }
    let free = rustix::fs::statvfs(MEMORY).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if free.min(available_memory()) < NEEDED {
        note("the tests use the disk: not enough free memory");
        return Ok(None);
    }
    match mount_image() {
        Ok(()) => Ok(Some(Path::new(MOUNT_POINT))),
        Err(error) => {
            note(&format!("the tests use the disk: {error}"));
            Ok(None)
        }
    }
}

fn mount_image() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return failure("only root can mount");
    }
    // The loop device holds the image open until the last mount namespace with this mount has ended.
    let image = tempfile::NamedTempFile::new_in(MEMORY)?;
    image.as_file().set_len(SIZE)?;
    Run::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(image.path())
        .unseen()
        .run()?;
    Run::new("mount")
        .args(["-o", "loop,discard"])
        .arg(image.path())
        .arg(MOUNT_POINT)
        .unseen()
        .run()?;
    Run::new("chmod").args(["1777", MOUNT_POINT]).unseen().run()
}

/// Returns the available memory, in bytes.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
