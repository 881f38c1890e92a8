//! Replacing the daemon of a mount by one of another version, while the mount is in use.

use std::path::{Path, PathBuf};

use cowlfs::control::{Client, Upgraded};

use super::state::{self, Mounted};
use super::{Container, browse, daemon};
use crate::error::Result;
use crate::store::kernel::Driver;
use crate::store::manifest::SnapshotId;

/// A mount whose daemon was replaced, or could not be.
#[derive(Debug)]
pub struct Replaced {
    /// The snapshot that is mounted; `None` for the container itself.
    pub snapshot: Option<SnapshotId>,
    /// The mount point.
    pub mountpoint: PathBuf,
    /// The process id of the previous daemon.
    pub pid: u32,
    /// The new daemon, or the reason why the previous one continues.
    pub outcome: Result<Upgraded>,
}

/// Replaces the daemons of a container and of its mounted snapshots by processes of `program`.
pub fn upgrade(container: &Container<'_>, program: &Path) -> Result<Vec<Replaced>> {
    let (store, id) = (container.store, container.id());
    let mut replaced = Vec::new();
    if let Mounted::Alive(state) = state::probe(store, id)?
        && state.driver() == Driver::Fuse
    {
        replaced.push(Replaced {
            snapshot: None,
            mountpoint: state.mountpoint,
            pid: state.pid,
            outcome: daemon::connect(store, id).and_then(|client| replace(client, program)),
        });
    }
    for browsed in browse::mounts(store, id)? {
        let client = daemon::connect_at(&browse::socket(store, id, browsed.mount));
        replaced.push(Replaced {
            snapshot: Some(browsed.snapshot),
            mountpoint: browsed.mountpoint,
            pid: browsed.pid,
            outcome: client.and_then(|client| replace(client, program)),
        });
    }
    Ok(replaced)
}

fn replace(mut client: Client, program: &Path) -> Result<Upgraded> {
    client
        .upgrade(program)
        .map_err(|error| daemon::to_error(&error))
}
