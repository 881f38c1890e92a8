//! Releases an adopted container: restores a plain directory at the original path, and LXC's original config.
//!
//! The store then has no record of the container.

use std::os::unix::fs::MetadataExt;

use crate::archive::export_dir;
use crate::container::external::{self, Leftover};
use crate::container::mount::AfterUnmount;
use crate::container::{Container, Swap, dead, kernel_layers};
use crate::error::{Error, Result};
use crate::lxc as tools;
use crate::lxc::binding;
use crate::recover::moving;
use crate::store::creation::Creation;
use crate::store::layers;
use crate::store::manifest::{ContainerManifest, LayerId, LayerKind};
use crate::store::outside::Moving;
use crate::store::usage::{References, head_layers};
use crate::tree::error::OnProgress;

/// The method by which the root filesystem is returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseMethod {
    /// The adopted directory is unchanged, and is moved back.
    Move,
    /// The container's merged tree is copied into a plain directory.
    Copy,
}

/// The policy for snapshots of a released container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snapshots {
    /// Fail if the container has snapshots.
    Refuse,
    /// Delete them.
    Drop,
}

/// Returns the method that [`release`] would use.
///
/// Detects all errors that can be detected before the release.
pub fn plan(container: &Container<'_>, snapshots: Snapshots) -> Result<ReleaseMethod> {
    let manifest = container.manifest();
    let name = container.name();
    let Some(adopted) = &manifest.adopted else {
        return Err(Error::usage(format!(
            "cannot release {name}: it was created in the store, not adopted"
        ))
        .hint(format!(
            "write it to a tar archive or a directory instead: cowl export {name}"
        )));
    };
    if !manifest.snapshots.is_empty() && snapshots == Snapshots::Refuse {
        let lost = match manifest.snapshots.len() {
            1 => "snapshot".to_owned(),
            count => format!("{count} snapshots"),
        };
        return Err(Error::failed(format!(
            "cannot release {name}: its {lost} would be lost"
        ))
        .hint(format!(
            "write all of them to a file with cowl export {name} --with-snapshots, or delete them \
             with --yes"
        )));
    }
    if let Some(link) = &manifest.lxc {
        let lxc = binding::from_link(link);
        if let tools::LxcState::Running { word, .. } = lxc.state()? {
            return Err(Error::busy(format!("{name} is {word}")).hint(format!(
                "stop it: lxc-stop {}; then type: {}",
                lxc.options(),
                container.store().session().command
            )));
        }
    }
    if let Some(found) = external::find_foreign(&adopted.rootfs)? {
        return Err(Error::failed(format!(
            "cannot release {name}: its original directory contains {found}"
        ))
        .hint(format!(
            "it is not part of the container; move it away, then type: {}",
            container.store().session().command
        )));
    }
    Ok(match unchanged_base(container)? {
        Some(_) => ReleaseMethod::Move,
        None => ReleaseMethod::Copy,
    })
}

/// Returns the layer that was the adopted directory, if it is the only content of this container and of no
/// other.
fn unchanged_base(container: &Container<'_>) -> Result<Option<LayerId>> {
    let (store, manifest) = (container.store(), container.manifest());
    let (Some(adopted), [head, base]) = (&manifest.adopted, manifest.stack.as_slice()) else {
        return Ok(None);
    };
    let tree = store.paths().layer_tree(*base);
    let meta = std::fs::symlink_metadata(&tree).map_err(|e| Error::at("inspect", &tree, e))?;
    if meta.ino() != adopted.inode || !store.is_untouched(*head, *base)? {
        return Ok(None);
    }
    Ok((!is_used_by_others(container, *base)?).then_some(*base))
}

/// Returns whether another container uses the layer, including a destroyed one that can be restored.
fn is_used_by_others(container: &Container<'_>, layer: LayerId) -> Result<bool> {
    let (store, manifest) = (container.store(), container.manifest());
    let mut own = usize::from(head_layers(manifest).contains(&layer));
    for snapshot in &manifest.snapshots {
        let stack = store.snapshot(container.id(), snapshot.id)?.stack;
        own += usize::from(stack.contains(&layer));
    }
    Ok(References::from_store(store)?.count(layer) > own)
}

/// Releases the container from the store, and returns notes for the user.
pub fn release(
    mut container: Container<'_>,
    snapshots: Snapshots,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    plan(&container, snapshots)?;
    dead::refuse_stranded(&container)?;
    container.unmount(AfterUnmount::StayUnmounted)?;
    kernel_layers::ensure_settled(&container)?;
    let store = container.store();
    // The exclusive lock prevents other commands from reading the layer that is moved, and from using it as a
    // base.
    let lock = store.lock_exclusive()?;
    if let Some(base) = unchanged_base(&container)? {
        if layers::is_held(store, base)? {
            // A later write to the directory would be visible in that mount, and in what is sent.
            let name = container.name();
            return Err(
                Error::busy(format!("a snapshot of {name} is mounted for reading, or a transfer uses {name}")).hint(format!(
                    "unmount it first, or wait for the transfer; cowl status {name} shows the mount point"
                )),
            );
        }
        commit(&mut container, base, None)?;
        return moving::finish_release(container, Some(lock));
    }
    drop(lock);
    let mut creation = Creation::begin(store)?;
    let plain = creation.create_layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(plain);
    let view = store.view(&container.manifest().stack)?;
    export_dir::fill(&view, &tree, progress)?;
    creation.sync_content()?;
    creation.request_sweep();
    commit(&mut container, plain, Some(creation))?;
    moving::finish_release(container, None)
}

/// Commits the release: from here on the next command completes it after an interruption.
fn commit(
    container: &mut Container<'_>,
    plain: LayerId,
    creation: Option<Creation<'_>>,
) -> Result<()> {
    external::write_marker(container.store(), container.id(), &Leftover::default())?;
    let next = ContainerManifest {
        head: plain,
        stack: vec![plain],
        origin: vec![plain],
        parent: None,
        undo: None,
        snapshots: Vec::new(),
        moving: Some(Moving::Releasing),
        ..container.manifest().clone()
    };
    container.commit(next, creation, |_| Ok(Swap::Done))
}
