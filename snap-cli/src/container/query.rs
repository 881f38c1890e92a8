//! Queries to the daemon of a mounted container.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cowlfs::control::{Client, ControlError, Stats, Status};

use super::daemon::{ENDING, PAUSE, connect, socket, told};
use super::state::{self, Mounted, RunState};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::manifest::{ContainerId, LayerId};
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// What the daemon has done and what it takes; `None` when there is no daemon.
pub fn stats(store: &Store, id: ContainerId) -> Result<Option<Stats>> {
    if ask(store, id)?.is_none() {
        return Ok(None);
    }
    let stats = connect(store, id)?.stats();
    stats.map(Some).map_err(|error| told(&error))
}

/// The mount and what its daemon says of itself; `None` when there is no daemon, or one that is ending.
pub fn ask(store: &Store, id: ContainerId) -> Result<Option<(RunState, Status)>> {
    let mut failed = None;
    let answer = poll_until(Instant::now() + ENDING, PAUSE, || {
        let Mounted::Alive(state) = state::look(store, id)? else {
            return Ok(Some(None));
        };
        match Client::connect(&socket(store, id)).and_then(|mut client| client.status()) {
            Ok(status) => Ok(Some(Some((state, status)))),
            Err(error @ ControlError::Silent { .. }) => Err(told(&error)),
            // It may have been killed, or begun to end, since the state was read.
            Err(error) => {
                failed = Some(told(&error));
                Ok(None)
            }
        }
    })?;
    match (answer, failed) {
        (None, Some(error)) => Err(error),
        (answer, _) => Ok(answer.flatten()),
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
