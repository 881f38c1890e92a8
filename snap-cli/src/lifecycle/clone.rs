//! Making a container from the state of another one.

use cowl_layers::view::View;

use super::create::over_layers_and;
use crate::container::{durability, lxc};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::restore::inherited;
use crate::snapshot::{freeze, resolve};
use crate::store::Store;
use crate::store::family;
use crate::store::making::Making;
use crate::store::manifest::{Ephemeral, LayerId, LayerKind};
use crate::store::measure;
use crate::store::name::{Address, ContainerName};
use crate::tree::error::{OnProgress, Progress};

/// Makes the container `new` over the layers of a state. What the source is now is frozen first. The copy of
/// an LXC container is one too, with a name and addresses of its own. Tells what people should know.
pub fn clone(store: &Store, source: &Address, new: &ContainerName) -> Result<Vec<String>> {
    clone_or_copy(store, source, new, Made::Clone)
}

/// The same for one mount only: when that ends, the new container goes, for good.
pub fn clone_for_one_mount(store: &Store, source: &Address, new: &ContainerName) -> Result<()> {
    let state = resolve(store, source)?;
    if state.manifest.lxc.is_some() {
        return Err(Error::failed(format!(
            "{} is an LXC container, which is unmounted at every stop and reboot",
            state.manifest.name
        ))
        .hint("clone it without --ephemeral, and when it is not needed any more: cowl destroy NEW --now"));
    }
    clone_or_copy(store, source, new, Made::Ephemeral).map(drop)
}

/// How a state becomes a container.
enum Made<'p> {
    /// Over the state's layers.
    Clone,
    /// The same, for one mount.
    Ephemeral,
    /// Over a base of its own.
    Copy(OnProgress<'p>),
}

/// The same with all content copied into a base of its own: the two share no layer.
pub fn copy(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    clone_or_copy(store, source, new, Made::Copy(progress))
}

fn clone_or_copy(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    made: Made<'_>,
) -> Result<Vec<String>> {
    // Whatever is wrong with the source is told before anything about the new name.
    resolve(store, source)?;
    let claim = family::claim(store, new)?;
    let made = clone_claimed(store, source, new, made);
    claim.remove()?;
    made
}

fn clone_claimed(
    store: &Store,
    source: &Address,
    new: &ContainerName,
    made: Made<'_>,
) -> Result<Vec<String>> {
    let (mut stack, mut making, manifest, mut lxc, mut settling, _lock);
    if source.snapshot.is_some() {
        making = Making::begin(store)?;
        // Found anew: from here on nothing that it names is collected.
        let state = resolve(store, source)?;
        store.open_layers(&state.stack)?;
        let kept = state.snapshot.as_ref().and_then(|(_, s)| s.config.as_ref());
        lxc = lxc::LxcCopy::for_container((state.container, &state.manifest), kept, new)?;
        settling = inherited(
            state.settling(),
            &source.container,
            source.snapshot.as_ref(),
        );
        (stack, manifest, _lock) = (state.stack, state.manifest, None);
    } else {
        let mut container = recover::open(store, &source.container)?;
        lxc = lxc::LxcCopy::for_container((container.id(), container.manifest()), None, new)?;
        stack = freeze::freeze(&mut container)?;
        making = Making::begin(store)?;
        manifest = container.manifest().clone();
        let mark = match durability::find_loss(&container)? {
            Some(lost) => Some(lost.clone()),
            None => durability::settling_for(&container, &stack)?,
        };
        settling = inherited(mark.as_ref(), &source.container, None);
        _lock = Some(container);
    }
    let ephemeral = matches!(made, Made::Ephemeral).then_some(Ephemeral::Waiting);
    if let Made::Copy(progress) = made {
        stack = vec![copied_base(store, &mut making, &stack, progress)?];
        // The copy is durable with all that could be read.
        let epoch = durability::epoch(store)?;
        settling = settling.filter(|mark| !mark.is_pending(&epoch));
    }
    let body = (new, stack.as_slice(), manifest.settings);
    over_layers_and(store, making, body, |id, manifest| {
        manifest.ephemeral = ephemeral;
        manifest.settling = settling;
        match &mut lxc {
            Some(lxc) => lxc.fill_manifest(store, id, manifest),
            None => Ok(()),
        }
    })?;
    let Some(lxc) = lxc else {
        return Ok(Vec::new());
    };
    // Who opens it first makes what is outside the store.
    drop(recover::open(store, new)?);
    Ok(lxc.notes)
}

/// Makes one base of all layers of a state. The caller keeps those from collection.
fn copied_base(
    store: &Store,
    making: &mut Making<'_>,
    stack: &[LayerId],
    progress: OnProgress<'_>,
) -> Result<LayerId> {
    let view = View::new(store.open_layers(stack)?);
    let base = making.create_layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(base);
    let total = measure::known_size(store, stack)?;
    let mut progress = |done| progress(Progress { total, ..done });
    crate::delta::flatten(&view, None, &tree, &mut progress)?;
    // A container must not be there before its data is.
    making.sync_content()?;
    Ok(base)
}
