//! The operations of containerd's snapshots API on a store (docs/decisions/0049).
//!
//! Each snapshot is a container. Preparing one creates a container, committing one replaces its manifest, and removing
//! one removes it, so that each operation takes effect by one rename. The caller assigns keys and parents, and must
//! not operate on a snapshot and its parent at the same time.

mod abandoned;
mod commit;
mod read;
mod running;
mod uncommit;
mod unmounted;

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use cowl_layers::points::point;
use jiff::Timestamp;
use serde_json::Map;

use super::create::create_over_layers_with;
use crate::container::mount::MountRequest;
use crate::container::state::{Lifetime, Mounted};
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::recover;
use crate::store::Store;
use crate::store::containerd::{ContainerdKind, ContainerdRecord};
use crate::store::creation::Creation;
use crate::store::kernel::Driver;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, LayerKind};
use crate::store::name::ContainerName;

pub use abandoned::{Abandoned, lock_without_containerd, select_abandoned};
pub use commit::{CommitRequest, commit, commit_again, drop_snapshots, remove};
pub use read::{Loaded, LoadedSnapshot, load, reload, usage};
pub use uncommit::uncommit;

/// The mode of the root directory of a snapshot without a parent, as containerd's snapshotters create it.
const ROOT_MODE: u32 = 0o755;

/// A snapshot that is to be created.
#[derive(Debug)]
pub struct PrepareRequest {
    /// The name of the container. It must be unused.
    pub name: ContainerName,
    /// The key.
    pub key: String,
    /// The kind: active or a view.
    pub kind: ContainerdKind,
    /// The committed snapshot below it, with its key.
    pub parent: Option<(ContainerId, String)>,
    /// The labels.
    pub labels: BTreeMap<String, String>,
}

/// A bind mount that shows a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotBind {
    /// The directory to mount.
    pub source: PathBuf,
    /// Whether the mount must be read-only.
    pub read_only: bool,
}

/// Creates an active snapshot or a view. Returns its container and its record.
pub fn prepare(store: &Store, request: PrepareRequest) -> Result<(ContainerId, ContainerdRecord)> {
    // From here on, the layers of the parent are not collected.
    let mut creation = Creation::begin(store)?;
    let below = match &request.parent {
        Some((id, _)) => committed(store, *id)?.stack,
        None => vec![create_bottom(store, &mut creation)?],
    };
    let now = Timestamp::now().to_string();
    let record = ContainerdRecord {
        key: request.key,
        kind: request.kind,
        parent: request.parent.map(|(_, key)| key),
        labels: request.labels,
        created: now.clone(),
        updated: now,
        committed_from: None,
        labels_before: None,
        snapshots_before: 0,
        undone: 0,
        frozen: false,
        extra: Map::new(),
    };
    let boxed = Some(Box::new(record.clone()));
    let edit = |_: ContainerId, manifest: &mut ContainerManifest| {
        manifest.containerd = boxed;
        Ok(())
    };
    let body = (&request.name, below.as_slice(), Map::new());
    point("preparation begun");
    let id = create_over_layers_with(store, creation, body, edit)?;
    point("preparation in effect");
    Ok((id, record))
}

/// Creates the empty layer below a snapshot without a parent.
///
/// containerd unpacks the first layer of an image into such a snapshot. In a mount, names and files that have a meaning
/// in a layer have none, and a layer that is still written to is recognized. A tree that is written to directly would
/// have neither property.
fn create_bottom(store: &Store, creation: &mut Creation<'_>) -> Result<LayerId> {
    let bottom = creation.create_layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(bottom);
    std::fs::set_permissions(&tree, Permissions::from_mode(ROOT_MODE))
        .map_err(|error| Error::at("set the mode of", &tree, error))?;
    Ok(bottom)
}

/// Returns the manifest of a committed snapshot. The caller must prevent the collection of its layers.
fn committed(store: &Store, id: ContainerId) -> Result<ContainerManifest> {
    let manifest = match store.container(id)? {
        Some(record) => record.body,
        None => {
            return Err(Error::not_found(format!(
                "the snapshot {id} does not exist any more"
            )));
        }
    };
    match manifest.containerd.as_deref().map(|record| record.kind) {
        Some(ContainerdKind::Committed) => Ok(manifest),
        _ => Err(Error::damaged(format!(
            "{} is not a committed snapshot",
            manifest.name
        ))),
    }
}

/// Mounts an active snapshot or a view unless it is mounted. Returns the bind mount that shows it.
pub fn mounts(store: &Store, id: ContainerId) -> Result<SnapshotBind> {
    let mut container = recover::open_for_containerd(store, id)?;
    let manifest = container.manifest();
    let kind = record(&container)?.kind;
    let read_only = kind != ContainerdKind::Active;
    if manifest.written_head().is_none() {
        return Err(Error::failed(format!("{} is committed", manifest.name)));
    }
    let source = match mount_for_unpacking(&mut container)? {
        Some(source) => source,
        None => container.mount(MountRequest::of(Lifetime::UntilUnmounted))?,
    };
    point("preparation mounted");
    Ok(SnapshotBind { source, read_only })
}

/// Mounts a layer that is being unpacked with kernel overlayfs, which is faster than a daemon: no command takes a
/// snapshot of it. Returns `None` for other snapshots, and if the kernel cannot mount it.
fn mount_for_unpacking(container: &mut Container<'_>) -> Result<Option<PathBuf>> {
    if !record(container)?.is_unpacked() || container.mounted()? != Mounted::No {
        return Ok(None);
    }
    let request = MountRequest {
        driver: Some(Driver::Kernel),
        ..MountRequest::of(Lifetime::UntilUnmounted)
    };
    match container.mount(request) {
        Ok(source) => Ok(Some(source)),
        Err(error) => {
            log::info!("{error}; unpacking with a daemon");
            Ok(None)
        }
    }
}

/// Replaces the labels of a snapshot. Returns its new record.
pub fn update(
    store: &Store,
    id: ContainerId,
    labels: BTreeMap<String, String>,
) -> Result<ContainerdRecord> {
    let mut container = recover::open_for_containerd(store, id)?;
    let next = ContainerdRecord {
        labels,
        updated: Timestamp::now().to_string(),
        ..record(&container)?.clone()
    };
    let manifest = ContainerManifest {
        containerd: Some(Box::new(next.clone())),
        ..container.manifest().clone()
    };
    container.commit(manifest, None, |_| Ok(Swap::Done))?;
    Ok(next)
}

fn record<'c>(container: &'c Container<'_>) -> Result<&'c ContainerdRecord> {
    container.manifest().containerd.as_deref().ok_or_else(|| {
        Error::damaged(format!(
            "{} is not a snapshot of containerd",
            container.name()
        ))
    })
}
