//! The head of a container before and after kernel overlayfs mounts it.
//!
//! With `index=on`, the kernel copies up only one name of a file with several, and finds the copy for the others
//! through its index in the work directory. A layer that is frozen has no index, so the head is *settled* after each
//! mount: the copies are linked at all names, and the index is emptied. Commands do this when they unmount or open the
//! container, so also after a kill, umount(8) or a reboot.

use std::collections::HashSet;

use cowl_layers::layer::Upper;
use cowl_overlay::{Overlay, OverlayOptions};

use super::{Container, kernel_marks, state};
use crate::error::{Error, Result};
use crate::host::mountinfo;
use crate::shell::quoted;
use crate::store::kernel::{self, KernelPhase, KernelUse};
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// The maximum number of lower layers that the kernel mounts.
const MOST_LOWERS: usize = 500;

/// Settles the head if its mount has ended. Only logs a failure: the command may not need it, and [`ensure_settled`]
/// prevents changes of the stack.
pub(crate) fn settle_or_warn(container: &Container<'_>) {
    if let Err(error) = settle(container) {
        let name = container.name();
        log::warn!(
            "{error}; {name} was mounted with kernel overlayfs, and cannot be prepared for the next mount"
        );
    }
}

/// Settles the head if its mount has ended, and removes the state of the mount.
pub(super) fn settle(container: &Container<'_>) -> Result<()> {
    let (store, id, manifest) = (container.store(), container.id(), container.manifest());
    let head = manifest.head;
    if !kernel::is_unsettled(store, head)? || kernel::is_in_use(store, head)? {
        return Ok(());
    }
    adopt_index(store, manifest)?;
    let phase = KernelPhase::Settled;
    let record = match kernel::read(store, head)? {
        Some(record) => KernelUse { phase, ..record },
        None => KernelUse {
            phase,
            lowers: Vec::new(),
            release: String::new(),
        },
    };
    kernel::write(store, head, &record)?;
    let stale = state::read(store, id)?;
    if stale.is_some_and(|state| state.kernel.is_some() && !state.replacing) {
        state::remove(store, id)?;
    }
    Ok(())
}

/// Returns an error if the head is in use by the kernel, or cannot be settled.
pub(crate) fn ensure_settled(container: &Container<'_>) -> Result<()> {
    settle(container)?;
    refuse_in_use(container)
}

/// Returns an error if kernel overlayfs uses the head.
pub(super) fn refuse_in_use(container: &Container<'_>) -> Result<()> {
    if !kernel::is_in_use(container.store(), container.manifest().head)? {
        return Ok(());
    }
    let (name, head) = (container.name(), container.manifest().head);
    let tree = container.store().paths().layer_tree(head);
    let mounts = mountinfo::read()?;
    let here = mounts.iter().find(|mount| mount.layers().contains(&tree));
    let (at, path) = match here {
        Some(mount) => (format!("at {}", mount.at.shown()), quoted(&mount.at)),
        None => (
            format!("that is not visible here (layer {head})"),
            "PATH".to_owned(),
        ),
    };
    Err(Error::busy(format!(
        "{name} is in use by a mount of kernel overlayfs {at}, which has no record in the run directory"
    ))
    .hint(format!(
        "unmount it where it was mounted (umount {path}), then type: {}",
        container.store().session().command
    )))
}

/// Prepares the layers for a mount by the kernel, which must not use the head yet.
pub(super) fn prepare(store: &Store, manifest: &ContainerManifest) -> Result<()> {
    let (head, lowers) = (manifest.head, manifest.below_head());
    let name = &manifest.name;
    if lowers.is_empty() || lowers.len() > MOST_LOWERS {
        return Err(Error::failed(format!(
            "kernel overlayfs cannot mount {name}: it has {} lower layers, and the kernel mounts 1 to {MOST_LOWERS}",
            lowers.len()
        ))
        .hint(match lowers.is_empty() {
            true => format!("take a snapshot, which makes the layer a lower one: cowl snapshot {name}"),
            false => format!("merge layers: cowl flatten {name}"),
        }));
    }
    // The kernel would remove an unfinished journal.
    adopt_index(store, manifest)?;
    let known = known_layers(store, manifest)?;
    let unknown = manifest.stack.iter().copied();
    let unknown: Vec<_> = unknown.filter(|id| !known.contains(id)).collect();
    for tree in store.layer_trees(&unknown)? {
        kernel_marks::refuse_unreadable(&tree, store.space())?;
    }
    let before = kernel::read(store, head)?;
    if before.is_some_and(|record| record.lowers == lowers) {
        return Ok(());
    }
    forget_handles(store, head)
}

/// Removes the file handles that the kernel has recorded in a head. They do not fit other lower layers, nor a copy of the
/// store.
pub(super) fn forget_handles(store: &Store, head: LayerId) -> Result<()> {
    let tree = store.paths().layer_tree(head);
    kernel_marks::remove_origins(&tree, store.space())?;
    // The index directory has the handle of the upper layer.
    disk::remove_tree(&kernel::index(store, head))?;
    // The record of this mount is synced on its own, and must not be durable before.
    disk::sync_all(&tree)
}

/// Returns frozen layers that this kernel has mounted before, below this head or the previous one.
fn known_layers(store: &Store, manifest: &ContainerManifest) -> Result<HashSet<LayerId>> {
    let mut known = HashSet::new();
    for head in manifest.stack.iter().take(2) {
        let record = kernel::read(store, *head)?;
        let record = record.filter(|record| record.release == kernel::release());
        known.extend(record.into_iter().flat_map(|record| record.lowers));
    }
    Ok(known)
}

/// Completes the journal of the head, and replaces the entries of the kernel's index by hard links.
fn adopt_index(store: &Store, manifest: &ContainerManifest) -> Result<()> {
    let tree = store.paths().layer_tree(manifest.head);
    let work = store.paths().layer_work(manifest.head);
    let lowers = store.open_layers(manifest.below_head())?;
    let at = |error| Error::at("adopt the kernel's index of", &tree, error);
    let upper = Upper::open(&tree, &work, store.space())?;
    let overlay = Overlay::new(Some(upper), lowers, OverlayOptions::default()).map_err(at)?;
    if overlay.adopt_kernel_index().map_err(at)? {
        log::info!("linked the files in the kernel's index of {}", tree.shown());
    }
    let index = kernel::index(store, manifest.head);
    match disk::names(&index)?.is_empty() {
        true => Ok(()),
        // Entries that only NFS exports need.
        false => disk::remove_tree(&index),
    }
}
