//! Talking to the daemon of a mounted container over its socket.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowlfs::control::{Client, ControlError, Stats, Status};

use super::state::{self, Mounted, RunState};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, LayerId};
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

/// What the daemon has done and what it takes; `None` when there is no daemon.
pub fn stats(store: &Store, id: ContainerId) -> Result<Option<Stats>> {
    if ask(store, id)?.is_none() {
        return Ok(None);
    }
    let stats = connect(store, id)?.stats();
    stats.map(Some).map_err(|error| told(&error))
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

/// The mount and what its daemon says of itself; `None` when there is no daemon, or one that is ending.
pub fn ask(store: &Store, id: ContainerId) -> Result<Option<(RunState, Status)>> {
    let until = Instant::now() + ENDING;
    loop {
        let Mounted::Alive(state) = state::look(store, id)? else {
            return Ok(None);
        };
        match Client::connect(&socket(store, id)).and_then(|mut client| client.status()) {
            Ok(status) => return Ok(Some((state, status))),
            Err(error @ (ControlError::Silent { .. } | ControlError::Ending { .. })) => {
                return Err(told(&error));
            }
            // Killed since the state was read.
            Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(error) => return Err(told(&error)),
        }
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

/// The layer that a living daemon writes to; `None` when there is none, or it was unmounted and only
/// drops its caches.
pub fn written_layer(store: &Store, id: ContainerId) -> Result<Option<LayerId>> {
    let Some(upper) = ask(store, id)?.and_then(|(_, status)| status.upper) else {
        return Ok(None);
    };
    let tree = PathBuf::from(OsString::from_vec(upper));
    match layer_of(&tree) {
        Some(layer) => Ok(Some(layer)),
        None => Err(Error::failed(format!(
            "the daemon writes to {}, which is no layer of this store",
            tree.shown()
        ))),
    }
}

/// The layer whose tree lies at `tree`.
fn layer_of(tree: &Path) -> Option<LayerId> {
    LayerId::parse(tree.parent()?.file_name()?.to_str()?)
}

/// Makes the directory for the run-time files of a container that the caller has locked.
pub fn ensure_run_dir(store: &Store, id: ContainerId) -> Result<PathBuf> {
    let dir = store.run().make(id)?;
    state::remove_unfinished(&dir)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_told_by_its_path() {
        let id = LayerId::fresh();
        let tree = PathBuf::from(format!("/store/layers/{id}/tree"));
        assert_eq!(layer_of(&tree), Some(id));
        assert_eq!(layer_of(Path::new("/tree")), None);
        assert_eq!(layer_of(Path::new("/x/y/tree")), None);
    }
}
