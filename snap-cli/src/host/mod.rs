//! The host: mounts, processes that use them, control groups, hooks, and files outside the store.
//!
//! The modules do not depend on stores and containers.

pub mod cgroup;
pub mod dir_users;
pub mod files;
pub mod freezer;
pub mod hooks;
pub mod mountinfo;
pub mod process;
pub mod programs;
pub mod reach;
pub mod rootless;
pub mod users;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Returns the id of this boot. Process ids and mounts that were recorded in another boot are invalid.
pub fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(path)
        .map(|id| id.trim().to_owned())
        .map_err(|error| Error::at("read", path, error))
}

/// Returns the sequence number of the disk of the file system that contains `path`; `None` if there is none.
///
/// The kernel assigns a new number whenever a disk is attached, even if the same disk was attached before in this boot.
/// For a file system on several disks, the number is that of the disk with which it was mounted.
pub fn disk_sequence(path: &Path) -> Option<u64> {
    let disk = disk_of(path)?;
    // A partition has the number of its disk.
    let read = |name: &str| std::fs::read_to_string(disk.join(name)).ok();
    let text = read("diskseq").or_else(|| read("../diskseq"))?;
    text.trim().parse().ok()
}

/// Returns a number that identifies the current instance of the mounted file system that contains `path`; `None` if its
/// type has none.
///
/// The number changes when the file system is unmounted everywhere and mounted again. It is the inode number of the
/// directory of the file system in sysfs, which assigns consecutive numbers.
pub fn filesystem_sequence(path: &Path) -> Option<u64> {
    let disk = std::fs::canonicalize(disk_of(path)?).ok()?;
    let name = disk.file_name()?;
    let number = |dir: PathBuf| std::fs::metadata(dir).ok().map(|meta| meta.ino());
    let kinds = ["ext4", "xfs", "f2fs"].iter();
    let mut dirs = kinds.map(|kind| Path::new("/sys/fs").join(kind).join(name));
    let found = dirs.find_map(number);
    found.or_else(|| {
        let mut all = std::fs::read_dir("/sys/fs/btrfs").ok()?.flatten();
        let has_disk = |dir: &PathBuf| dir.join("devices").join(name).symlink_metadata().is_ok();
        all.find_map(|entry| Some(entry.path()).filter(has_disk))
            .and_then(number)
    })
}

/// Returns the directory in sysfs of the disk of the file system that contains `path`.
fn disk_of(path: &Path) -> Option<PathBuf> {
    let disk = |dev: u64| {
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        let disk = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        disk.is_dir().then_some(disk)
    };
    disk(std::fs::metadata(path).ok()?.dev()).or_else(|| {
        // The device number of a btrfs subvolume is not that of a disk.
        let source = mountinfo::find_containing(path).ok()?.source;
        let source = Path::new(OsStr::from_bytes(&source));
        let meta = std::fs::metadata(source).ok()?;
        let is_disk = source.is_absolute() && meta.file_type().is_block_device();
        disk(meta.rdev()).filter(|_| is_disk)
    })
}
