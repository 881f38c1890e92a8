//! Connections to the daemon of a mounted container.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowlfs::control::{Client, ControlError};

use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::manifest::ContainerId;
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// The socket's name in the run directory.
const SOCKET: &str = "sock";

/// The time that a killed daemon may take to exit: the kernel closes its descriptors first.
pub const ENDING: Duration = Duration::from_secs(3);
/// The interval between checks of whether a daemon has exited.
pub const PAUSE: Duration = Duration::from_millis(5);

/// Returns the path of the socket. It may be longer than an address allows; `cowlfs` handles that.
pub fn socket(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join(SOCKET)
}

/// Connects to the daemon of a container. A mount of kernel overlayfs has none.
pub fn connect(store: &Store, id: ContainerId) -> Result<Client> {
    connect_at(&socket(store, id))
}

/// Connects to the daemon that listens at `path`.
pub(super) fn connect_at(path: &Path) -> Result<Client> {
    Client::connect(path).map_err(|error| match error {
        ControlError::Io(error) => {
            Error::at("connect to the daemon at", path, error).hint(format!(
                "read its log, {}; if it died, the next command mounts the container again",
                path.with_file_name("log").shown()
            ))
        }
        other => to_error(&other),
    })
}

/// Converts a failed request to a daemon to an error with a hint.
pub fn to_error(error: &ControlError) -> Error {
    let refused = Error::failed("the daemon failed").because(error.to_string());
    match error {
        ControlError::Ending { .. } => Error::busy(error.to_string())
            .hint("try again when it has ended: it waits for a disk or for another file system"),
        ControlError::Silent { pid, state } => Error::busy(error.to_string()).hint(match state {
            Some('T') => format!(
                "resume it: kill -CONT {pid}; or kill it, which makes programs in the mount fail: cowl umount --force NAME"
            ),
            _ => "try again later; or kill it, which makes programs in the mount fail: cowl umount --force NAME".to_owned(),
        }),
        ControlError::NotUnderstood(_) => {
            refused.hint("unmount it with `cowl umount`, then mount it again")
        }
        _ => refused,
    }
}

/// Returns whether the daemon that holds `lock` during its lifetime and listens at `socket` is alive.
///
/// A killed daemon may hold its lock for a while, and the kernel still accepts connections to its socket, so only
/// an answer proves that it is alive. A daemon that does not answer because it is stopped counts as alive.
pub(super) fn is_alive(lock: &Path, socket: &Path) -> Result<bool> {
    let alive = poll_until(Instant::now() + ENDING, PAUSE, || {
        Ok::<_, Error>(match Lock::is_held(lock)? {
            false => Some(false),
            true if is_ending(socket) => None,
            true => Some(true),
        })
    })?;
    Ok(alive.unwrap_or(true))
}

/// Returns whether the connection to a daemon fails because the daemon is exiting.
fn is_ending(socket: &Path) -> bool {
    match Client::connect(socket) {
        Err(ControlError::Ending { .. }) => true,
        Err(ControlError::Io(error)) => matches!(
            error.kind(),
            ErrorKind::ConnectionRefused
                | ErrorKind::ConnectionReset
                | ErrorKind::BrokenPipe
                | ErrorKind::UnexpectedEof
        ),
        Ok(_) | Err(_) => false,
    }
}
