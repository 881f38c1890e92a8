//! Starts writeback early, in the cases in which the file system below does so in a plain directory.
//!
//! Programs replace a file by renaming a new one over it, or by truncating and rewriting it, often without a sync.
//! ext4 (`auto_da_alloc`) and btrfs start writeback of the new content at the rename; ext4, XFS and btrfs start it at
//! the close after a truncation. The next journal commit then rarely contains the new name without its content. These
//! file systems cannot detect that a name in the upper layer replaces one of a lower layer. Starting writeback
//! neither blocks nor guarantees durability (docs/decisions/0012).

use std::os::fd::{AsFd, BorrowedFd};

use serde::{Deserialize, Serialize};

use super::order;
use super::write_back::start_write_back;

/// The cases in which a file system starts writeback early.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Early {
    /// A file is renamed over another.
    pub on_replace: bool,
    /// A file is closed that was truncated to size 0.
    pub on_rewrite: bool,
    /// A file is closed that was truncated to any size.
    pub on_any_cut: bool,
}

impl Early {
    /// Returns the cases of the file system that holds `dir`.
    pub fn for_dir(dir: BorrowedFd<'_>) -> Self {
        match order::kind_and_options(dir) {
            Ok((order::EXT4, Some(options))) => Self::for_ext4(&options),
            Ok((order::XFS, _)) => Self {
                on_any_cut: true,
                ..Self::default()
            },
            Ok((order::BTRFS, _)) => Self {
                on_replace: true,
                on_rewrite: true,
                on_any_cut: false,
            },
            Ok(_) => Self::default(),
            Err(error) => {
                log::debug!(
                    "cannot identify the file system, writeback is not started early: {error}"
                );
                Self::default()
            }
        }
    }

    /// Without delayed allocation, blocks are allocated as they are written, and data=ordered covers them.
    fn for_ext4(options: &str) -> Self {
        let off = ["noauto_da_alloc", "nodelalloc", "data=journal"];
        let is_on = !options.split(',').any(|option| off.contains(&option));
        Self {
            on_replace: is_on,
            on_rewrite: is_on,
            on_any_cut: false,
        }
    }

    /// Whether content that is written after a truncation to `size` is written back at the close.
    pub fn after_cut(self, size: u64) -> bool {
        self.on_any_cut || (self.on_rewrite && size == 0)
    }
}

/// Starts writeback of all dirty pages of a file, without waiting.
///
/// An error is only logged: the caller's operation does not depend on it.
pub fn start(file: impl AsFd) {
    if let Err(error) = start_write_back(file.as_fd(), 0, 0) {
        log::debug!("cannot start writeback: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_options_disable_early_writeback() {
        assert!(Early::for_ext4("rw,discard,stripe=16").on_replace);
        assert!(Early::for_ext4("rw,data=ordered").on_rewrite);
        for off in [
            "rw,noauto_da_alloc",
            "nodelalloc,data=ordered",
            "rw,data=journal",
        ] {
            assert_eq!(Early::for_ext4(off), Early::default(), "{off}");
        }
    }

    #[test]
    fn configured_truncations_start_writeback() {
        let none = Early::default();
        assert!(!none.after_cut(0));
        let rewrite = Early {
            on_rewrite: true,
            ..none
        };
        assert!(rewrite.after_cut(0) && !rewrite.after_cut(1));
        let any = Early {
            on_any_cut: true,
            ..none
        };
        assert!(any.after_cut(0) && any.after_cut(1));
    }

    #[test]
    fn tmpfs_starts_no_early_writeback() {
        let dir = rustix::fs::open("/dev/shm", rustix::fs::OFlags::PATH, 0.into()).unwrap();
        assert_eq!(Early::for_dir(dir.as_fd()), Early::default());
    }
}
