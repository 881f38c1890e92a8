//! Talking to the daemon of a mounted container over its socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowlfs::control::{Client, ControlError};

use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::manifest::ContainerId;
use cowl_layers::shown::Show as _;

/// The socket's name in the run folder.
const SOCKET: &str = "sock";

/// How long a daemon that was killed may take to end: what it holds open is closed first.
pub const ENDING: Duration = Duration::from_secs(3);
/// How often that is checked.
pub const PAUSE: Duration = Duration::from_millis(5);

/// The path of the socket. (The file system's side sees to its length.)
pub fn socket(store: &Store, id: ContainerId) -> PathBuf {
    store.run().dir(id).join(SOCKET)
}

/// Connects to the daemon.
pub fn connect(store: &Store, id: ContainerId) -> Result<Client> {
    connect_at(&socket(store, id))
}

/// Connects to the daemon that listens at `path`.
pub(super) fn connect_at(path: &Path) -> Result<Client> {
    Client::connect(path).map_err(|error| match error {
        ControlError::Io(error) => Error::at("reach the daemon at", path, error).hint(format!(
            "its log is {}; the next command mounts anew what a dead daemon left",
            path.with_file_name("log").shown()
        )),
        other => told(&other),
    })
}

/// A daemon's refusal as an error of ours.
pub fn told(error: &ControlError) -> Error {
    let told = Error::failed("the daemon could not do it").because(error.to_string());
    match error {
        ControlError::Ending { .. } => Error::busy(error.to_string())
            .hint("try again when it has: it waits for a disk, or for another file system"),
        ControlError::Silent { pid, state } => Error::busy(error.to_string()).hint(match state {
            Some('T') => format!(
                "let it go on: kill -CONT {pid}; or end it, and with it what programs do in the mount: cowl umount --force NAME"
            ),
            _ => "try again later; or end it, and with it what programs do in the mount: cowl umount --force NAME".to_owned(),
        }),
        ControlError::NotUnderstood(_) => {
            told.hint("unmount it with `cowl umount`, and mount it again")
        }
        _ => told,
    }
}

/// Whether a daemon lives that holds the lock `lock` for life and listens at `socket`. One that was killed may
/// hold its lock for a while, and the kernel takes connections for it: that it answers is the proof. One that
/// lives and does not answer, because it was stopped, lives.
pub(super) fn lives(lock: &Path, socket: &Path) -> Result<bool> {
    let until = Instant::now() + ENDING;
    while Lock::is_held(lock)? {
        if !is_ending(socket) || Instant::now() >= until {
            return Ok(true);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(false)
}

/// Whether the connection to a daemon is closed by its end.
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
