//! Making containers: from a root file system, or over layers that are there already.

use std::path::Path;

use serde_json::Map;

use crate::archive::image::{self, Images};
use crate::archive::{import, input};
use crate::error::{Error, Result};
use crate::store::family;
use crate::store::making::Making;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId, LayerKind};
use crate::store::measure;
use crate::store::name::ContainerName;
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::error::OnProgress;

/// Where a root file system comes from.
#[derive(Debug)]
pub enum Source<'a> {
    /// A folder or a tar archive.
    Path(&'a Path),
    /// A tar archive on standard input.
    Stdin,
    /// A tar archive that was opened already.
    Tree(Box<input::TreeArchive<'a>>),
}

/// Makes the container `name` from a root file system. Answers with what could not be taken over as it
/// was, for people to read.
pub fn create(
    store: &Store,
    name: &ContainerName,
    source: Source<'_>,
    images: Images,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let claim = family::claim(store, name)?;
    let made = import_into(store, name, source, images, progress);
    claim.remove()?;
    made
}

fn import_into(
    store: &Store,
    name: &ContainerName,
    source: Source<'_>,
    images: Images,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    // A directory is copied only then; what an archive holds is known when it is unpacked.
    if let (Source::Path(path), Images::Refuse) = (&source, images)
        && path.is_dir()
    {
        image::refuse(path)?;
    }
    let mut making = Making::begin(store)?;
    let base = making.layer(LayerKind::Base, &[], &[])?;
    let tree = store.paths().layer_tree(base);
    let imported = match source {
        Source::Path(path) => import::from_path(path, &tree, store.space(), progress),
        Source::Tree(archive) => import::from_archive(*archive, &tree, store.space(), progress),
        Source::Stdin => {
            import::from_stream(std::io::stdin().lock(), &tree, store.space(), progress)
        }
    }?;
    if images == Images::Refuse {
        image::refuse(&tree)?;
    }
    // A container must not be there before its data is: this is the one command that copies data.
    making.sync_content()?;
    // Now its names are at hand; later somebody would wait for it. It can be counted then all the same.
    if let Err(error) = measure::measured(store, base) {
        log::debug!("cannot measure a layer: {error}");
    }
    over_layers(store, making, name, &[base], Map::new())?;
    Ok(imported
        .notes
        .iter()
        .map(|(path, why)| format!("{}: {why}", path.escape_ascii()))
        .collect())
}

/// Makes the container `name` with an empty head over `below`. The name is claimed by the caller.
pub fn over_layers(
    store: &Store,
    making: Making<'_>,
    name: &ContainerName,
    below: &[LayerId],
    settings: Map<String, serde_json::Value>,
) -> Result<ContainerId> {
    over_layers_and(store, making, (name, below, settings), |_, _| Ok(()))
}

/// The same; `more` fills in what else its manifest is to say.
pub fn over_layers_and(
    store: &Store,
    mut making: Making<'_>,
    (name, below, settings): (&ContainerName, &[LayerId], Map<String, serde_json::Value>),
    more: impl FnOnce(ContainerId, &mut ContainerManifest) -> Result<()>,
) -> Result<ContainerId> {
    let Some(top) = below.first() else {
        return Err(Error::damaged("a state without any layer"));
    };
    let head = making.head(below, &store.paths().layer_tree(*top))?;
    let id = making.container()?;
    let mut manifest = ContainerManifest {
        settings,
        ..ContainerManifest::new(name.clone(), head, below)
    };
    more(id, &mut manifest)?;
    making.sync()?;
    match disk::replace(&store.paths().container_file(id), &Record::first(manifest)) {
        Ok(()) => making.done()?,
        Err(error) => {
            // It may be there already: only its name was not put on the disk for sure.
            making.leave();
            return Err(error);
        }
    }
    Ok(id)
}
