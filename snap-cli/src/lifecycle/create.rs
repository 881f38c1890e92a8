//! Creates containers from a root filesystem, or on top of existing layers.

use std::path::Path;

use serde_json::Map;

use crate::archive::image::{self, Images};
use crate::archive::{import, input};
use crate::error::{Error, Result};
use crate::store::creation::Creation;
use crate::store::family;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, LayerKind};
use crate::store::measure;
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::error::{ErrorKind as TreeErrorKind, OnProgress, TreeError};
use crate::tree::omissions::Unsupported;

/// The source of a root filesystem.
#[derive(Debug)]
pub enum Source<'a> {
    /// A directory or a tar archive.
    Path(&'a Path),
    /// A tar archive on standard input.
    Stdin,
    /// An open tar archive.
    Tree(Box<input::TreeArchive<'a>>),
}

/// The treatment of sources that cannot be imported unchanged.
#[derive(Clone, Copy, Debug)]
pub struct ImportPolicy {
    /// The treatment of container images.
    pub images: Images,
    /// The treatment of what the store's file system, or the user, cannot store.
    pub unsupported: Unsupported,
}

/// Creates the container `name` from a root filesystem.
///
/// Returns notes on properties that were not preserved.
pub fn create(
    store: &Store,
    name: &ContainerName,
    source: Source<'_>,
    policy: ImportPolicy,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let claim = family::claim(store, name)?;
    let made = import_claimed(store, name, source, policy, progress);
    claim.remove()?;
    made
}

fn import_claimed(
    store: &Store,
    name: &ContainerName,
    source: Source<'_>,
    policy: ImportPolicy,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let ImportPolicy {
        images,
        unsupported,
    } = policy;
    // Check a directory before it is copied. The content of an archive is known only after unpacking.
    if let (Source::Path(path), Images::Refuse) = (&source, images)
        && path.is_dir()
    {
        image::refuse(path)?;
    }
    let mut creation = Creation::begin(store)?;
    let base = creation.create_layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(base);
    let space = store.space();
    let imported = match source {
        Source::Path(path) => import::from_path(path, &tree, space, unsupported, progress),
        Source::Tree(archive) => {
            import::from_archive(*archive, &tree, space, unsupported, progress)
        }
        Source::Stdin => {
            let input = std::io::stdin().lock();
            import::from_stream(input, &tree, space, unsupported, progress)
        }
    }
    .map_err(with_option_as_hint)?;
    if images == Images::Refuse {
        image::refuse(&tree)?;
    }
    // The data must be durable before a container references it: only this command copies data.
    creation.sync_content()?;
    // Measure the layer now, while its names are cached, to avoid a delay later. On failure, it is measured
    // later.
    if let Err(error) = measure::measured(store, base) {
        log::debug!("cannot measure a layer: {error}");
    }
    create_over_layers(store, creation, name, &[base], Map::new())?;
    Ok(imported.notes.lines())
}

/// Adds a hint to the error of an import that the option `--skip-unsupported` prevents.
pub(super) fn with_option_as_hint(error: TreeError) -> Error {
    let kind = error.kind();
    let error = Error::from(error);
    match (kind, error.hint.as_deref()) {
        (TreeErrorKind::Unsupported, Some(hint)) => {
            let hint = format!("{hint}, or skip what cannot be stored: --skip-unsupported");
            error.hint(hint)
        }
        (TreeErrorKind::Unsupported, None) => {
            error.hint("skip what cannot be stored: --skip-unsupported")
        }
        _ => error,
    }
}

/// Creates the container `name` with an empty head on the layers `below`.
///
/// The caller must have claimed the name.
pub fn create_over_layers(
    store: &Store,
    creation: Creation<'_>,
    name: &ContainerName,
    below: &[LayerId],
    settings: Map<String, serde_json::Value>,
) -> Result<ContainerId> {
    create_over_layers_with(store, creation, (name, below, settings), |_, _| Ok(()))
}

/// Creates a container as [`create_over_layers`] does; `edit` fills in more fields of its manifest.
pub fn create_over_layers_with(
    store: &Store,
    mut creation: Creation<'_>,
    (name, below, settings): (&ContainerName, &[LayerId], Map<String, serde_json::Value>),
    edit: impl FnOnce(ContainerId, &mut ContainerManifest) -> Result<()>,
) -> Result<ContainerId> {
    let Some(top) = below.first() else {
        return Err(Error::damaged("a state has no layer"));
    };
    let head = creation.create_head(below, &store.paths().layer_tree(*top))?;
    let manifest = ContainerManifest {
        settings,
        ..ContainerManifest::new(name.clone(), head, below)
    };
    commit_new(store, creation, manifest, edit)
}

/// Creates a container with a manifest whose layers exist; `edit` fills in more fields.
fn commit_new(
    store: &Store,
    mut creation: Creation<'_>,
    mut manifest: ContainerManifest,
    edit: impl FnOnce(ContainerId, &mut ContainerManifest) -> Result<()>,
) -> Result<ContainerId> {
    let id = creation.create_container()?;
    edit(id, &mut manifest)?;
    creation.sync()?;
    match disk::replace(&store.paths().container_file(id), &Record::first(manifest)) {
        Ok(()) => creation.finish()?,
        Err(error) => {
            // The file may already exist, with a name that is not durable.
            creation.abandon();
            return Err(error);
        }
    }
    Ok(id)
}
