//! Creates containers from images. Each layer of an image becomes a layer of the store, which containers share.

use serde_json::Map;

use super::create::create_over_layers_with;
use super::foreign::Names;
use super::image_layers::{Unpacking, Wanted};
use super::image_snapshots;
pub use super::image_snapshots::LayerSnapshots;
use crate::archive::image_source::{Digest, Image, ImageSource, Platform};
use crate::error::{Error, Result};
use crate::store::creation::Creation;
use crate::store::image_layers::Blobs;
use crate::store::image_record::ImageRecord;
use crate::store::manifest::LayerId;
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::{Store, disk, family};
use crate::tree::error::OnProgress;
use crate::tree::omissions::Unsupported;

/// The options of [`create`].
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The platform of the image.
    pub platform: Platform,
    /// The treatment of what the store's file system, or the user, cannot store.
    pub unsupported: Unsupported,
    /// The snapshots of the new container.
    pub snapshots: LayerSnapshots,
    /// The blobs of its layers.
    pub blobs: Blobs,
}

impl ImageOptions {
    /// Returns the options for layers.
    pub(super) fn unpacking(&self) -> Unpacking {
        Unpacking {
            unsupported: self.unsupported,
            blobs: self.blobs,
        }
    }
}

/// The result of [`create`] and of an update.
#[derive(Clone, Debug, Default)]
pub struct Imported {
    /// The digest of the image's manifest, if it has one.
    pub digest: Option<Digest>,
    /// The number of layers of the image.
    pub layers: usize,
    /// The number of layers that the store did not have.
    pub unpacked: usize,
    /// The new snapshots, oldest first.
    pub snapshots: Vec<SnapshotName>,
    /// Notes on properties that were not preserved.
    pub notes: Vec<String>,
}

impl Imported {
    /// Returns the outcome of an import that has obtained nothing yet.
    pub(super) fn of(image: &Image) -> Self {
        Self {
            digest: image.digest.clone(),
            layers: image.layers.len(),
            ..Self::default()
        }
    }
}

/// Creates the container `name` from an image.
pub fn create(
    store: &Store,
    name: &ContainerName,
    source: &dyn ImageSource,
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<Imported> {
    // Before anything is read: a name that exists is refused at once.
    let claim = family::claim(store, name)?;
    let made = source
        .image(&options.platform)
        .map_err(Error::from)
        .and_then(|image| create_claimed(store, name, (source, image), options, progress));
    claim.remove()?;
    if made.as_ref().map_or_else(Error::is_no_space, |_| true) {
        source.release();
    }
    made
}

fn create_claimed(
    store: &Store,
    name: &ContainerName,
    (source, image): (&dyn ImageSource, Image),
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<Imported> {
    let wanted = Wanted {
        image: &image,
        source,
        first: 0,
        below: &[],
        options: options.unpacking(),
    };
    wanted.prepare(store, progress)?;
    // From here on, layers that are found are not collected.
    let mut creation = Creation::begin(store)?;
    let obtained = wanted.obtain(store, &mut creation, progress)?;
    let below: Vec<LayerId> = obtained.layers.iter().rev().copied().collect();
    let body = (name, below.as_slice(), Map::new());
    let mut imported = Imported::of(&image);
    imported.unpacked = obtained.unpacked;
    imported.notes = obtained.notes;
    create_over_layers_with(store, creation, body, |id, manifest| {
        let mut names = Names::of(manifest);
        let added = image_snapshots::plan((&image, 0), options.snapshots, &mut names);
        let stacks = image_snapshots::stacks(&[], &obtained.layers);
        for planned in &added {
            let stack = stacks.get(planned.layer).map_or(&[][..], Vec::as_slice);
            let snapshot = planned.write((store, id), manifest, stack, None)?;
            manifest.parent = Some(snapshot.id);
            imported.snapshots.push(snapshot.name.clone());
            manifest.snapshots.push(snapshot);
        }
        if !added.is_empty() {
            disk::sync_dir(&store.paths().snapshots_dir(id))?;
        }
        // The snapshots since belong to the container, as in the original one.
        if options.snapshots == LayerSnapshots::Recorded
            && let Some(first) = added.first()
            && let Some(origin) = stacks.get(first.layer.saturating_sub(1))
        {
            manifest.origin.clone_from(origin);
        }
        (manifest.next_snap, manifest.next_auto) = names.counters();
        manifest.image = Some(Box::new(record_of(image)));
        Ok(())
    })?;
    Ok(imported)
}

/// Returns the record of an image for a container's manifest.
pub(super) fn record_of(image: Image) -> ImageRecord {
    ImageRecord {
        name: image.name,
        digest: image.digest,
        platform: image.platform,
        created: image.created,
        author: image.author,
        config: image.config,
        history: image.history,
        extra: Map::new(),
    }
}

/// Returns the error for an image that cannot be read from its location.
pub fn unsupported_error(prefix: &str) -> Error {
    Error::usage(format!("images cannot be read from {prefix}:")).hint(format!(
        "copy the image to a file first: skopeo copy {prefix}:... oci-archive:image.tar; then use \
         --from oci-archive:image.tar"
    ))
}
