//! Giving back what was taken over: a plain folder where the root file system was, and LXC's config as it
//! was. The store lets go of the container.

use std::os::unix::fs::MetadataExt;

use crate::archive::export_dir;
use crate::container::external::{self, Leftover};
use crate::container::mount::AfterUnmount;
use crate::container::{Container, Swap, dead};
use crate::error::{Error, Result};
use crate::lxc as tools;
use crate::lxc::binding;
use crate::recover::moving;
use crate::store::layers;
use crate::store::making::Making;
use crate::store::manifest::{ContainerManifest, LayerId, LayerKind};
use crate::store::outside::Moving;
use crate::store::usage::{References, head_layers};
use crate::tree::error::OnProgress;

/// How the root file system is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The folder that was taken over, which nothing was written to, moves back.
    Back,
    /// What the container shows is copied into a plain folder.
    Copy,
}

/// What becomes of the snapshots of a container that is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snapshots {
    /// A container that has some is refused.
    Refuse,
    /// They are given up.
    Drop,
}

/// What [`release`] would do. Refuses all that can be refused.
pub fn plan(container: &Container<'_>, snapshots: Snapshots) -> Result<How> {
    let manifest = container.manifest();
    let name = container.name();
    let Some(adopted) = &manifest.adopted else {
        return Err(Error::usage(format!(
            "{name} was made in the store, not taken over: there is nothing to give back"
        ))
        .hint(format!(
            "cowl export {name} writes what it shows as a tar archive or a folder"
        )));
    };
    if !manifest.snapshots.is_empty() && snapshots == Snapshots::Refuse {
        return Err(Error::failed(format!(
            "{name} has {} snapshots, which a plain folder can't have",
            manifest.snapshots.len()
        ))
        .hint(format!(
            "cowl export {name} --with-snapshots keeps all in a file; --yes gives them up"
        )));
    }
    if let Some(link) = &manifest.lxc {
        let lxc = binding::of(link);
        if let tools::State::Running { word, .. } = lxc.state()? {
            return Err(Error::busy(format!("{name} is {word}")).hint(format!(
                "stop it: lxc-stop {}; then type: {}",
                lxc.options(),
                container.store().session().command
            )));
        }
    }
    if let Some(found) = external::find_foreign(&adopted.rootfs)? {
        return Err(Error::failed(format!(
            "where the root file system is to go, there is something: {found}"
        ))
        .hint(format!(
            "it is no part of the container; move it away, then type: {}",
            container.store().session().command
        )));
    }
    Ok(match untouched(container)? {
        Some(_) => How::Back,
        None => How::Copy,
    })
}

/// The layer that was the root file system, if it is still all that the container is, and only its own.
fn untouched(container: &Container<'_>) -> Result<Option<LayerId>> {
    let (store, manifest) = (container.store(), container.manifest());
    let (Some(adopted), [head, base]) = (&manifest.adopted, manifest.stack.as_slice()) else {
        return Ok(None);
    };
    let tree = store.paths().layer_tree(*base);
    let meta = std::fs::symlink_metadata(&tree).map_err(|e| Error::at("look at", &tree, e))?;
    if meta.ino() != adopted.inode || !store.is_untouched(*head, *base)? {
        return Ok(None);
    }
    Ok((!used_by_others(container, *base)?).then_some(*base))
}

/// Whether another container stands on the layer, or a destroyed one that may still come back.
fn used_by_others(container: &Container<'_>, layer: LayerId) -> Result<bool> {
    let (store, manifest) = (container.store(), container.manifest());
    let mut own = usize::from(head_layers(manifest).contains(&layer));
    for snapshot in &manifest.snapshots {
        let stack = store.snapshot(container.id(), snapshot.id)?.stack;
        own += usize::from(stack.contains(&layer));
    }
    Ok(References::from_store(store)?.count(layer) > own)
}

/// Gives the root file system back, and tells what people should know. The container is gone from the store.
pub fn release(
    mut container: Container<'_>,
    snapshots: Snapshots,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    plan(&container, snapshots)?;
    dead::refuse_stranded(&container)?;
    container.unmount(AfterUnmount::StayUnmounted)?;
    let store = container.store();
    // Alone: nobody reads the layer that moves, or begins to stand on it.
    let alone = store.lock_exclusive()?;
    if let Some(base) = untouched(&container)? {
        if layers::is_held(store, base)? {
            // What is written to the folder afterwards would show there.
            let name = container.name();
            return Err(
                Error::busy(format!("a snapshot of {name} is mounted to be read"))
                    .hint(format!("cowl status {name} tells where; unmount it first")),
            );
        }
        commit(&mut container, base, None)?;
        return moving::finish_release(container, Some(alone));
    }
    drop(alone);
    let mut making = Making::begin(store)?;
    let plain = making.create_layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(plain);
    let view = store.view(&container.manifest().stack)?;
    export_dir::fill(&view, &tree, progress)?;
    making.sync_content()?;
    making.request_sweep();
    commit(&mut container, plain, Some(making))?;
    moving::finish_release(container, None)
}

/// From here on the release is finished, whatever happens.
fn commit(container: &mut Container<'_>, plain: LayerId, making: Option<Making<'_>>) -> Result<()> {
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
    container.commit(next, making, |_| Ok(Swap::Done))
}
