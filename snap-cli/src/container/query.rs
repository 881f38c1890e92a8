//! Queries to the daemon of a mounted container.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use cowlfs::control::{Client, ControlError, PassthroughStatus, Stats, Status};

use super::daemon::{ENDING, PAUSE, connect, socket, to_error};
use super::state::{self, Mounted, RunState};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::kernel::Driver;
use crate::store::manifest::{ContainerId, LayerId};
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// Returns the daemon's counters and resource usage; `None` if there is no daemon.
pub fn stats(store: &Store, id: ContainerId) -> Result<Option<Stats>> {
    if query_status(store, id)?.is_none() {
        return Ok(None);
    }
    let stats = connect(store, id)?.stats();
    stats.map(Some).map_err(|error| to_error(&error))
}

/// Returns the state of the mount and the status that its daemon reports; `None` if there is no daemon, or if it is
/// exiting.
pub fn query_status(store: &Store, id: ContainerId) -> Result<Option<(RunState, Status)>> {
    let mut failed = None;
    let answer = poll_until(Instant::now() + ENDING, PAUSE, || {
        let Mounted::Alive(state) = state::probe(store, id)? else {
            return Ok(Some(None));
        };
        if state.driver() == Driver::Kernel {
            return Ok(Some(None));
        }
        match Client::connect(&socket(store, id)).and_then(|mut client| client.status()) {
            Ok(status) => Ok(Some(Some((state, status)))),
            Err(error @ ControlError::Silent { .. }) => Err(to_error(&error)),
            // A race: the daemon may have been killed, or may have begun to exit, since the state was read.
            Err(error) => {
                failed = Some(to_error(&error));
                Ok(None)
            }
        }
    })?;
    match (answer, failed) {
        (None, Some(error)) => Err(error),
        (answer, _) => Ok(answer.flatten()),
    }
}

/// Returns the passthrough of a mount; `None` if its daemon has ended or does not report it.
pub fn query_passthrough(store: &Store, id: ContainerId) -> Result<Option<PassthroughStatus>> {
    match Client::connect(&socket(store, id)).and_then(|mut client| client.passthrough()) {
        Ok(status) => Ok(status),
        Err(error @ ControlError::Silent { .. }) => Err(to_error(&error)),
        Err(error) => {
            // It has ended since it answered the status.
            log::info!("{error}");
            Ok(None)
        }
    }
}

/// Returns the layer that a living daemon writes to.
///
/// `None` if there is no daemon, or if it was unmounted and is only dropping its caches.
pub fn written_layer(store: &Store, id: ContainerId) -> Result<Option<LayerId>> {
    let Some(upper) = query_status(store, id)?.and_then(|(_, status)| status.upper) else {
        return Ok(None);
    };
    let tree = PathBuf::from(OsString::from_vec(upper));
    match layer_from_tree(&tree) {
        Some(layer) => Ok(Some(layer)),
        None => Err(Error::failed(format!(
            "the daemon writes to {}, which is not a layer of this store",
            tree.shown()
        ))),
    }
}

/// Returns the layer whose tree has the path `tree`.
fn layer_from_tree(tree: &Path) -> Option<LayerId> {
    LayerId::parse(tree.parent()?.file_name()?.to_str()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_tree_contains_the_layers_id() {
        let id = LayerId::fresh();
        let tree = PathBuf::from(format!("/store/layers/{id}/tree"));
        assert_eq!(layer_from_tree(&tree), Some(id));
        assert_eq!(layer_from_tree(Path::new("/tree")), None);
        assert_eq!(layer_from_tree(Path::new("/x/y/tree")), None);
    }
}
