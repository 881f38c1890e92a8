//! Conversion of [`TreeError`] to the manager's error type, with hints.

use cowl_layers::sys::user_namespace::is_system_root;

use super::error::{ErrorKind, TreeError};
use crate::error::Error;

impl From<TreeError> for Error {
    fn from(error: TreeError) -> Self {
        let error = match error.into_error() {
            Ok(whole) => return whole,
            Err(error) => error,
        };
        let hint = match error.kind() {
            ErrorKind::NotPermitted | ErrorKind::Unsupported => {
                let is_root = rustix::process::geteuid().is_root();
                match (is_root, is_system_root()) {
                    (false, _) => Some("run the command as root, for example with sudo"),
                    (true, false) => Some(
                        "`cowl doctor` reports the ids that your namespace lacks; or run the command as root",
                    ),
                    // root needs another hint, which depends on the system call.
                    (true, true) => None,
                }
            }
            ErrorKind::NoSpace => Some("free some space; nothing was changed"),
            ErrorKind::NotAnArchive => Some(
                "give a directory or a tar archive, which may be compressed with gzip, zstd or xz",
            ),
            ErrorKind::WholeContainer => Some("import it with its snapshots: cowl import FILE"),
            ErrorKind::Limit => Some(
                "if you trust the archive, unpack it with tar and pass the directory: --from DIR",
            ),
            ErrorKind::Image => Some(
                "images are read from files: oci:DIR, oci-archive:FILE or docker-archive:FILE (skopeo copy \
                 writes them); --force imports the files of the image unchanged",
            ),
            ErrorKind::Truncated => Some("it was cut off: download, create or send it again"),
            ErrorKind::Io
            | ErrorKind::NotFound
            | ErrorKind::Empty
            | ErrorKind::Damaged
            | ErrorKind::Refused
            | ErrorKind::Overlap => None,
        };
        let hint = error.own_hint().or(hint).map(str::to_owned);
        let (what, source) = error.into_parts();
        // The cause remains: callers distinguish a full disk from other failures.
        Self {
            hint,
            source,
            ..Self::failed(what)
        }
    }
}
