//! Errors of trees as errors of the manager, with hints.

use super::error::{ErrorKind, TreeError};
use crate::error::Error;

impl From<TreeError> for Error {
    fn from(error: TreeError) -> Self {
        let hint = match error.kind() {
            ErrorKind::NotPermitted => Some("are you root? run it with sudo"),
            ErrorKind::NoSpace => Some("make room on the disk; nothing was changed"),
            ErrorKind::NotAnArchive => {
                Some("give a folder, or a tar archive: plain, or compressed by gzip, zstd or xz")
            }
            ErrorKind::WholeContainer => Some("cowl import FILE brings it back, snapshots and all"),
            ErrorKind::Limit => {
                Some("if you trust it, unpack it with tar and give cowl the directory: --from DIR")
            }
            ErrorKind::Image => Some(
                "unpack it first: umoci unpack, or podman create and podman export; \
                 --force takes its files as they are",
            ),
            ErrorKind::Truncated => Some("the file was cut short: fetch or make it anew"),
            ErrorKind::Io
            | ErrorKind::NotFound
            | ErrorKind::Empty
            | ErrorKind::Damaged
            | ErrorKind::Refused
            | ErrorKind::Overlap => None,
        };
        let new = Self::failed(error.to_string());
        match hint {
            Some(hint) => new.hint(hint),
            None => new,
        }
    }
}
