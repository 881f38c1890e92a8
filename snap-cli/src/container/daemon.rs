//! Talking to the daemon of a mounted container over its socket.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cowl_fs::control::{Client, ControlError, Stats, Status};

use super::state::{self, Mounted, RunState};
use crate::error::{Error, Result};
use crate::store::manifest::{ContainerId, LayerId};
use crate::store::{Store, disk};
use cowl_fs::shown::Show as _;

/// The socket's name in the run folder.
const SOCKET: &str = "sock";

/// How long a daemon that was killed may take to end.
pub const ENDING: Duration = Duration::from_secs(1);
/// How often that is looked at.
pub const PAUSE: Duration = Duration::from_millis(5);

/// The path of the socket. (The file system's side sees to its length.)
pub fn socket(store: &Store, id: ContainerId) -> PathBuf {
    store.run_dir(id).join(SOCKET)
}

/// Connects to the daemon.
pub fn connect(store: &Store, id: ContainerId) -> Result<Client> {
    let path = socket(store, id);
    Client::connect(&path).map_err(|error| {
        Error::at("reach the daemon at", &path, error).hint(format!(
            "its log is {}; the next command mounts anew what a dead daemon left",
            path.with_file_name("log").shown()
        ))
    })
}

/// What the daemon says of itself.
fn status(store: &Store, id: ContainerId) -> Result<Status> {
    connect(store, id)?.status().map_err(|error| told(&error))
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
        match status(store, id) {
            Ok(status) => return Ok(Some((state, status))),
            // Killed since we looked.
            Err(_) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
}

/// Whether a daemon that holds its lock is about to end: one that is killed closes its socket, and with
/// it the file system, before it lets go of its lock.
pub fn is_ending(store: &Store, id: ContainerId) -> bool {
    let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    Client::connect(&socket(store, id)).is_err_and(refused)
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

/// Makes the run folder.
pub fn ensure_run_dir(store: &Store, id: ContainerId) -> Result<()> {
    disk::ensure_dir(&store.run_dir(id))
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
