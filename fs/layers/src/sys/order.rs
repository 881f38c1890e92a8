//! The order in which a file system makes changes durable.
//!
//! [`Order`] ensures that a file's content is durable no later than its name. docs/decisions/0012 has the reasons.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

use super::attr::SetTime;
use super::copy::Copied;
use super::write_back::write_back;
use crate::error::Result;

/// The magic number of ext2, ext3 and ext4.
pub(super) const EXT4: u64 = 0xef53;
pub(super) const XFS: u64 = 0x5846_5342;
pub(super) const BTRFS: u64 = 0x9123_683e;

const MOUNTS: &str = "/proc/self/mountinfo";

/// The order in which a file system makes changes durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// One journal records changes of names and of extents in their order, and each commit flushes the disk's cache.
    ///
    /// So content that was written, with its extents recorded, before a rename is durable when the rename is.
    Journal,
    /// A name may become durable long before the object, even if the object has no content and only xattrs.
    NamesFirst,
    /// No order is known. Changes that must be durable before others are synced before them.
    Unknown,
    /// No order is required: the mount is `volatile`, and a power cut may lose unwritten data.
    Volatile,
}

impl Order {
    /// Determines the order of the file system that holds `dir`.
    pub fn for_dir(dir: BorrowedFd<'_>) -> Self {
        match determine(dir) {
            Ok(order) => order,
            Err(error) => {
                log::debug!("cannot identify the file system, every copy-up is synced: {error}");
                Self::Unknown
            }
        }
    }

    /// Ensures that the content of `file` is durable no later than its name.
    ///
    /// To be called before the file is linked or renamed. `copied` is the way in which its content was copied.
    pub fn content_first(self, file: impl AsFd, copied: Copied) -> Result<()> {
        match (self, copied) {
            (Self::Volatile, _) => Ok(()),
            // The shared blocks are durable already, and the journal contains the change of the extents.
            (Self::Journal, Copied::Shared) => Ok(()),
            (Self::Journal, Copied::Written) => write_back(file.as_fd()),
            (Self::NamesFirst | Self::Unknown, _) => {
                super::copy::sync(file, super::copy::SyncScope::All)
            }
        }
    }

    /// Ensures that the attributes and xattrs of a file without content are durable no later than its name.
    ///
    /// To be called before the file is linked or renamed.
    pub fn attributes_first(self, file: impl AsFd) -> Result<()> {
        match self {
            Self::NamesFirst => super::copy::sync(file, super::copy::SyncScope::All),
            Self::Journal | Self::Unknown | Self::Volatile => Ok(()),
        }
    }

    /// Ensures that a power cut cannot separate the two halves of a rename out of `dir` that replaces another object.
    ///
    /// To be called before the rename. btrfs removes the replaced name from its log, but adds the new one only if the
    /// moved object or `dir` has been logged in the same transaction. Until the next transaction, the fsync of any
    /// other file would then make a name durable that leads nowhere, and a lower object would reappear there.
    pub fn before_replacing(self, dir: BorrowedFd<'_>) -> Result<()> {
        match self {
            Self::NamesFirst => {
                // An unchanged directory is not logged. The rename sets the same time.
                super::attr::utimens(dir, SetTime::Keep, SetTime::Now)?;
                super::dir::sync_dir(dir)
            }
            Self::Journal | Self::Unknown | Self::Volatile => Ok(()),
        }
    }

    /// Ensures that a change of a name in `dir` is durable no later than a second one.
    ///
    /// To be called between the two changes.
    pub fn name_first(self, dir: BorrowedFd<'_>) -> Result<()> {
        match self {
            Self::Volatile | Self::Journal => Ok(()),
            Self::NamesFirst | Self::Unknown => super::dir::sync_dir(dir),
        }
    }
}

/// Returns the magic number of the file system that holds `dir`, and the mount options of an ext4 if they are known.
pub(super) fn kind_and_options(dir: BorrowedFd<'_>) -> std::io::Result<(u64, Option<String>)> {
    let kind = kind(dir)?;
    if kind != EXT4 {
        return Ok((kind, None));
    }
    let table = std::fs::read_to_string(MOUNTS)?;
    let options = options(&table, &device(dir)?).map(str::to_owned);
    Ok((kind, options))
}

fn kind(dir: BorrowedFd<'_>) -> std::io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstatfs(dir)?.f_type).unwrap_or_default())
}

fn device(dir: BorrowedFd<'_>) -> std::io::Result<String> {
    let device = rustix::fs::fstat(dir)?.st_dev;
    Ok(format!("{}:{}", major(device), minor(device)))
}

fn determine(dir: BorrowedFd<'_>) -> std::io::Result<Order> {
    let kind = kind(dir)?;
    if kind == BTRFS {
        return Ok(Order::NamesFirst);
    }
    if kind != EXT4 && kind != XFS {
        return Ok(Order::Unknown);
    }
    let device = device(dir)?;
    let table = std::fs::read_to_string(MOUNTS)?;
    let Some(options) = options(&table, &device) else {
        return Ok(Order::Unknown);
    };
    let usual = if kind == XFS {
        is_usual_xfs(options)
    } else {
        is_usual_ext4(options) && has_own_journal(&device)?
    };
    Ok(if usual {
        Order::Journal
    } else {
        Order::Unknown
    })
}

/// Returns the superblock options of the file system on `device` from a table in mountinfo's format.
fn options<'t>(table: &'t str, device: &str) -> Option<&'t str> {
    table
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(device))?
        .split_once(" - ")?
        .1
        .split(' ')
        .nth(2)
}

/// Whether the options of an ext4 leave its usual order intact.
///
/// `data=writeback`, `data=journal`, `nodelalloc` and `dioread_lock` write content in another order, and
/// `journal_async_commit` writes a commit block without waiting for the blocks before it.
fn is_usual_ext4(options: &str) -> bool {
    options.split(',').all(|option| {
        option == "data=ordered"
            || ![
                "data=",
                "journal_async_commit",
                "nodelalloc",
                "dioread_lock",
            ]
            .iter()
            .any(|other| option.starts_with(other))
    })
}

/// Whether an XFS has its log and its content on one device, so that one flush covers both.
fn is_usual_xfs(options: &str) -> bool {
    !options
        .split(',')
        .any(|option| option.starts_with("logdev=") || option.starts_with("rtdev="))
}

/// Whether an ext4 has a journal on its own device.
///
/// Without a journal, changes are committed in no particular order. With one on another device, a commit does not
/// always flush the device that holds the content.
///
/// jbd2 has a /proc directory for each journal, named by the device and, if the journal is a file on it, the file's
/// inode number (8).
fn has_own_journal(device: &str) -> std::io::Result<bool> {
    let link = std::fs::read_link(Path::new("/sys/dev/block").join(device))?;
    let Some(name) = link.file_name().and_then(|name| name.to_str()) else {
        return Ok(false);
    };
    let journal = PathBuf::from(format!("/proc/fs/jbd2/{name}-8"));
    journal.try_exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n\
        30 22 7:1 / /mnt/a\\040b rw - ext4 /dev/loop1 rw,data=writeback\n\
        31 22 7:2 / /x rw master:1 - xfs /dev/loop2 rw,attr2,logdev=/dev/sdb\n";

    #[test]
    fn options_belong_to_the_device() {
        assert_eq!(options(TABLE, "254:0"), Some("rw,discard"));
        assert_eq!(options(TABLE, "7:1"), Some("rw,data=writeback"));
        assert_eq!(options(TABLE, "7:2"), Some("rw,attr2,logdev=/dev/sdb"));
        assert_eq!(options(TABLE, "7:3"), None);
    }

    #[test]
    fn only_default_journal_options_are_usual() {
        assert!(is_usual_ext4("rw,discard,stripe=16"));
        assert!(is_usual_ext4("rw,data=ordered"));
        for other in [
            "rw,data=writeback",
            "data=journal",
            "rw,nodelalloc",
            "rw,dioread_lock",
            "rw,journal_async_commit,data=writeback",
        ] {
            assert!(!is_usual_ext4(other), "{other}");
        }
        assert!(is_usual_xfs("rw,attr2,inode64"));
        assert!(!is_usual_xfs("rw,logdev=/dev/sdb"));
    }

    #[test]
    fn tmpfs_has_an_unknown_order() {
        let dir = rustix::fs::open("/dev/shm", rustix::fs::OFlags::PATH, 0.into()).unwrap();
        assert_eq!(Order::for_dir(dir.as_fd()), Order::Unknown);
    }
}
