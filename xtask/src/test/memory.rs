//! An ext4 in memory in place of /var/tmp, for the tests of this program alone: on a disk, tests wait mostly for its
//! journal. Tests about disks make their own.

use std::path::Path;

use crate::run::{Result, Run, failure, note};

/// A file system in memory.
const MEMORY: &str = "/dev/shm";
/// The directory that it covers, where tests make theirs.
const PLACE: &str = "/var/tmp";
/// The size of the file system. Only what is written takes memory.
const SIZE: u64 = 8 << 30;
/// The memory that must be free.
const NEEDED: u64 = 6 << 30;

/// Mounts the file system in this mount namespace. Returns the directory; without the privilege or the memory, tests
/// stay on the disk.
pub(super) fn mount() -> Result<Option<&'static Path>> {
    if std::env::var_os("COWL_TEST_DIR").is_some() || std::env::var_os("COWL_KEEP").is_some() {
        return Ok(None);
    }
    let free = rustix::fs::statvfs(MEMORY).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    if free.min(available_memory()) < NEEDED {
        note("the tests use the disk: too little memory is free");
        return Ok(None);
    }
    match mount_image() {
        Ok(()) => Ok(Some(Path::new(PLACE))),
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
    // The loop device keeps the image, until the last mount namespace with this mount has ended.
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
        .arg(PLACE)
        .unseen()
        .run()?;
    Run::new("chmod").args(["1777", PLACE]).unseen().run()
}

/// Returns the memory that the kernel can give, in bytes.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
