//! Creates a container from a state of another container.

use std::path::PathBuf;

use cowl_layers::view::View;

use super::create::create_over_layers_with;
use crate::container::durability;
use crate::container::lxc::{CopyTarget, LxcCopy};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::restore::inherit_settling;
use crate::snapshot::{freeze, resolve};
use crate::store::Store;
use crate::store::creation::Creation;
use crate::store::family;
use crate::store::manifest::{Ephemeral, LayerId, LayerKind, SnapshotManifest};
use crate::store::measure;
use crate::store::name::{Address, ContainerName};
use crate::tree::error::{OnProgress, Progress};

/// Creates the container `new` on the layers of a state, and returns notes for the user.
///
/// If the source is the current state, it is frozen first. The clone of an LXC container is another LXC
/// container, with a name and addresses of its own.
pub fn clone(store: &Store, source: &Address, new: &ContainerName) -> Result<Vec<String>> {
    clone_or_copy(store, source, (new, None), CloneKind::Clone)
}

/// Like [`clone`], for a container that lxc-create has created in the directory `lxcpath`. A clone of a container that is
/// not one of LXC gets the config that lxc-create wrote.
pub fn clone_into_created(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    lxcpath: PathBuf,
) -> Result<Vec<String>> {
    let target = CopyTarget::Created(lxcpath);
    clone_or_copy(store, source, (new, Some(&target)), CloneKind::Clone)
}

/// Creates a clone for a single mount: when that ends, the new container is destroyed without a way back.
pub fn clone_for_one_mount(store: &Store, source: &Address, new: &ContainerName) -> Result<()> {
    let state = resolve(store, source)?;
    if state.manifest.lxc.is_some() {
        return Err(Error::failed(format!(
            "cannot create an ephemeral clone of {}: an LXC container is unmounted at every stop \
             and reboot",
            state.manifest.name
        ))
        .hint("clone it without --ephemeral, and destroy it later: cowl destroy NEW --now"));
    }
    clone_or_copy(store, source, (new, None), CloneKind::Ephemeral).map(drop)
}

/// The way in which a state becomes a container.
enum CloneKind<'p> {
    /// On the state's layers.
    Clone,
    /// On the state's layers, for a single mount.
    Ephemeral,
    /// On a base of its own.
    Copy(OnProgress<'p>),
}

/// Creates a container with a copy of the state's content as its base: source and copy share no layer.
///
/// Returns notes for the user.
pub fn copy(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    clone_or_copy(store, source, (new, None), CloneKind::Copy(progress))
}

fn clone_or_copy(
    store: &Store,
    source: &Address,
    (new, target): (&ContainerName, Option<&CopyTarget>),
    kind: CloneKind<'_>,
) -> Result<Vec<String>> {
    // Report errors of the source before errors of the new name.
    resolve(store, source)?;
    let claim = family::claim(store, new)?;
    let made = clone_claimed(store, source, (new, target), kind);
    claim.remove()?;
    made
}

fn clone_claimed(
    store: &Store,
    source: &Address,
    (new, target): (&ContainerName, Option<&CopyTarget>),
    kind: CloneKind<'_>,
) -> Result<Vec<String>> {
    let (mut stack, mut creation, manifest, mut lxc, mut settling, _lock);
    if source.snapshot.is_some() {
        creation = Creation::begin(store)?;
        // Resolve it again: `creation` prevents the collection of its layers from here on.
        let state = resolve(store, source)?;
        store.open_layers(&state.stack)?;
        let config = state.snapshot.as_ref().and_then(|(_, s)| s.config.as_ref());
        lxc = LxcCopy::for_container(&state.manifest, config, (new, target))?;
        let has_received = |(_, s): &(_, SnapshotManifest)| s.received_config.is_some();
        if let (Some(lxc), None) = (&mut lxc, config)
            && state.snapshot.as_ref().is_some_and(has_received)
        {
            lxc.notes.push(format!(
                "{new} has the current LXC config of {}: that of the snapshot was sent by another host",
                source.container
            ));
        }
        settling = inherit_settling(
            state.settling(),
            &source.container,
            source.snapshot.as_ref(),
        );
        (stack, manifest, _lock) = (state.stack, state.manifest, None);
    } else {
        let mut container = recover::open(store, &source.container)?;
        lxc = LxcCopy::for_container(container.manifest(), None, (new, target))?;
        stack = freeze::freeze(&mut container)?;
        creation = Creation::begin(store)?;
        manifest = container.manifest().clone();
        let marker = match durability::find_loss(&container)? {
            Some(loss) => Some(loss.clone()),
            None => durability::settling_for(&container, &stack)?,
        };
        settling = inherit_settling(marker.as_ref(), &source.container, None);
        _lock = Some(container);
    }
    if let (None, Some(created @ CopyTarget::Created(lxcpath))) = (&lxc, target) {
        let config = lxcpath.join(new.as_str()).join("config");
        lxc = Some(LxcCopy::from_config(&config, created, new)?);
    }
    let ephemeral = matches!(kind, CloneKind::Ephemeral).then_some(Ephemeral::Waiting);
    if let CloneKind::Copy(progress) = kind {
        stack = vec![copy_to_base(store, &mut creation, &stack, progress)?];
        // The copy is durable, with everything that could be read.
        let epoch = durability::epoch(store)?;
        settling = settling.filter(|marker| !marker.is_pending(&epoch));
    }
    let (id_map, image) = (manifest.id_map, manifest.image);
    let body = (new, stack.as_slice(), manifest.settings);
    create_over_layers_with(store, creation, body, |id, manifest| {
        manifest.ephemeral = ephemeral;
        manifest.settling = settling;
        manifest.id_map = id_map;
        manifest.image = image;
        match &mut lxc {
            Some(lxc) => lxc.fill_manifest(store, id, manifest),
            None => Ok(()),
        }
    })?;
    let Some(lxc) = lxc else {
        return Ok(Vec::new());
    };
    // Opening the container creates its files outside the store.
    drop(recover::open(store, new)?);
    Ok(lxc.notes)
}

/// Copies all layers of a state into one base.
///
/// The caller must prevent the collection of the layers.
fn copy_to_base(
    store: &Store,
    creation: &mut Creation<'_>,
    stack: &[LayerId],
    progress: OnProgress<'_>,
) -> Result<LayerId> {
    let view = View::new(store.open_layers(stack)?);
    let base = creation.create_layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(base);
    let total = measure::known_size(store, stack)?;
    let mut progress = |done| progress(Progress { total, ..done });
    crate::delta::flatten(&view, None, &tree, &mut progress)?;
    // The data must be durable before a container references it.
    creation.sync_content()?;
    Ok(base)
}
