//! Creates containers from images. Each layer of an image becomes a layer of the store, which containers share.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write as _};

use serde_json::Map;

use super::create::{create_over_layers_with, with_option_as_hint};
use crate::archive::image_source::{
    Digest, Image, ImageLayer, ImageSource, LayerBlob, Platform, VerifiedBlob,
};
use crate::archive::{TransferReport, import};
use crate::error::{Error, Result};
use crate::store::creation::Creation;
use crate::store::image_layers::Blobs;
use crate::store::image_record::{BlobRecord, ImageLayerRecord, ImageRecord};
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, LayerKind, LayerManifest, SnapshotId, SnapshotKind,
    SnapshotManifest, SnapshotRef,
};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::record::Record;
use crate::store::{Store, disk, family, image_layers, measure};
use crate::tree::error::{ErrorKind, OnProgress, Progress, TreeError};
use crate::tree::omissions::Unsupported;

/// Whether the new container gets a snapshot for each layer of its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerSnapshots {
    /// The container gets the snapshots.
    Take,
    /// The container gets no snapshots.
    Omit,
}

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

/// Creates the container `name` from an image.
///
/// Returns notes on properties that were not preserved.
pub fn create(
    store: &Store,
    name: &ContainerName,
    source: &dyn ImageSource,
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    let image = source.image(&options.platform)?;
    let claim = family::claim(store, name)?;
    let made = create_claimed(store, name, (source, image), options, progress);
    claim.remove()?;
    made
}

fn create_claimed(
    store: &Store,
    name: &ContainerName,
    (source, image): (&dyn ImageSource, Image),
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<Vec<String>> {
    // From here on, layers that are found are not collected.
    let mut creation = Creation::begin(store)?;
    let chain_ids = chain_ids(&image.layers);
    let known = image_layers::find(store, &chain_ids, options.blobs)?;
    let mut report = TransferReport::default();
    // From the bottom.
    let (mut layers, mut new) = (Vec::new(), Vec::new());
    let mut is_incomplete = false;
    for (layer, chain_id) in image.layers.iter().zip(chain_ids) {
        let below: Vec<LayerId> = layers.iter().rev().copied().collect();
        let mut candidates = known.get(&chain_id).into_iter().flatten();
        if let Some((known, _)) = candidates.find(|(_, over)| *over == below) {
            layers.push(*known);
            continue;
        }
        let kind = match below.is_empty() {
            true => LayerKind::Base,
            false => LayerKind::Delta,
        };
        let blob = match options.blobs {
            Blobs::Keep => Some(blob_record(layer)?),
            Blobs::Discard => None,
        };
        let id = creation.create_layer_from(LayerManifest {
            image: Some(ImageLayerRecord {
                diff_id: layer.diff_id.clone(),
                chain_id,
                blob,
                incomplete: is_incomplete,
                extra: Map::new(),
            }),
            ..LayerManifest::new(kind, &below, &[])
        })?;
        let before = report.done;
        let mut progress = |done: Progress| progress(done.after(before));
        let target = (store, id, below.as_slice());
        let done = unpack((source, layer), target, options, &mut progress)?;
        report.done.entries += done.done.entries;
        report.done.bytes += done.done.bytes;
        report.notes.append(done.notes);
        if done.is_incomplete && !is_incomplete {
            is_incomplete = true;
            image_layers::mark_incomplete(store, id)?;
        }
        layers.push(id);
        new.push(id);
    }
    // The data must be durable before a container references it.
    creation.sync_content()?;
    for id in new {
        if let Err(error) = measure::measured(store, id) {
            log::debug!("cannot measure a layer: {error}");
        }
    }
    let below: Vec<LayerId> = layers.iter().rev().copied().collect();
    let body = (name, below.as_slice(), Map::new());
    create_over_layers_with(store, creation, body, |id, manifest| {
        if options.snapshots == LayerSnapshots::Take {
            add_snapshots(store, id, manifest, (&image, &layers))?;
        }
        manifest.image = Some(Box::new(ImageRecord {
            name: image.name,
            digest: image.digest,
            platform: image.platform,
            created: image.created,
            author: image.author,
            config: image.config,
            history: image.history,
            extra: Map::new(),
        }));
        Ok(())
    })?;
    Ok(report.notes.lines())
}

fn chain_ids(layers: &[ImageLayer]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::new();
    for layer in layers {
        chain.push(layer.diff_id.chain(chain.last()));
    }
    chain
}

/// Returns the record of a layer's blob that is to be retained.
fn blob_record(layer: &ImageLayer) -> Result<BlobRecord> {
    match &layer.blob {
        LayerBlob::Digest(digest, media_type) => Ok(BlobRecord {
            digest: digest.clone(),
            size: layer.size,
            media_type: media_type.clone(),
        }),
        LayerBlob::File(_) => Err(Error::usage(
            "the layers of a docker-archive have no digests that an export could preserve",
        )
        .hint("omit --keep-blobs, or convert the image: skopeo copy docker-archive:... oci:DIR")),
    }
}

/// Unpacks a layer of an image over the layers `below`, topmost first, and verifies its digests.
fn unpack(
    (source, layer): (&dyn ImageSource, &ImageLayer),
    (store, id, below): (&Store, LayerId, &[LayerId]),
    options: &ImageOptions,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let view = match below.is_empty() {
        true => None,
        false => Some(store.view(below)?),
    };
    let content = source.layer(layer)?;
    let content: Box<dyn Read + '_> = match options.blobs {
        Blobs::Discard => content,
        Blobs::Keep => {
            let path = store.paths().layer_blob(id);
            let copy = File::create_new(&path);
            let copy = copy.map_err(|error| Error::at("create", &path, error))?;
            Box::new(CopyingReader {
                input: content,
                copy,
            })
        }
    };
    let mut blob = VerifiedBlob::new(content, layer.size);
    let target = store.paths().layer_tree(id);
    let over = (view, store.space());
    let unpacked = import::image_layer(&mut blob, &target, over, options.unsupported, progress);
    let may_be_damaged = unpacked.as_ref().err().is_none_or(|error| {
        matches!(
            error.kind(),
            ErrorKind::Damaged | ErrorKind::Truncated | ErrorKind::NotAnArchive | ErrorKind::Empty
        )
    });
    // A wrong digest explains an error in the content.
    if let (LayerBlob::Digest(digest, _), true) = (&layer.blob, may_be_damaged) {
        blob.finish(digest)?;
    }
    let (report, found) = unpacked.map_err(with_option_as_hint)?;
    if found != layer.diff_id {
        let what = format!(
            "the layer {} of the image has another content: {found}",
            layer.diff_id
        );
        return Err(TreeError::new(ErrorKind::Damaged, what).into());
    }
    Ok(report)
}

/// A reader that also writes the data that it reads to a file.
struct CopyingReader<R> {
    input: R,
    copy: File,
}

impl<R: Read> Read for CopyingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.input.read(buffer)?;
        let part = buffer.get(..got).unwrap_or_default();
        self.copy.write_all(part)?;
        Ok(got)
    }
}

/// Adds a snapshot for each layer, from the bottom, with the step of the image's creation as comment.
///
/// The files of the snapshots are durable afterwards.
fn add_snapshots(
    store: &Store,
    container: ContainerId,
    manifest: &mut ContainerManifest,
    (image, layers): (&Image, &[LayerId]),
) -> Result<()> {
    let mut parent = None;
    for (at, (layer, step)) in layers.iter().zip(image.steps()).enumerate() {
        let id = SnapshotId::fresh();
        let below = layers.get(..=at).unwrap_or_default();
        let path = store.paths().snapshot_file(container, id);
        let body = SnapshotManifest {
            stack: below.iter().rev().copied().collect(),
            settings: Map::new(),
            config: None,
            extra: Map::new(),
        };
        disk::write_new(&path, &Record::first(body))?;
        disk::sync_file(&path)?;
        let created = step.and_then(|step| step.created.as_deref()?.parse().ok());
        let created = created.map(|created: jiff::Timestamp| created.to_string());
        let comment = step.and_then(|step| step.created_by.as_ref().or(step.comment.as_ref()));
        manifest.snapshots.push(SnapshotRef {
            id,
            name: SnapshotName::parse(format!("layer{}", at + 1))?,
            kind: SnapshotKind::Manual,
            created: created.unwrap_or_else(crate::store::now),
            parent,
            layer: *layer,
            comment: comment.map_or_else(String::new, |text| shortened(text)),
            tags: BTreeMap::new(),
            protected: false,
            settling: None,
            extra: Map::new(),
        });
        parent = Some(id);
    }
    manifest.parent = parent;
    disk::sync_dir(&store.paths().snapshots_dir(container))
}

/// The maximum number of characters of a comment: a step of an image can be a script.
const COMMENT: usize = 200;

fn shortened(text: &str) -> String {
    let one_line: Vec<_> = text.split_whitespace().collect();
    let one_line = one_line.join(" ");
    match one_line.char_indices().nth(COMMENT) {
        Some((end, _)) => format!("{}...", one_line.get(..end).unwrap_or_default()),
        None => one_line,
    }
}

/// Returns the error for an image that cannot be read from its location.
pub fn unsupported_error(prefix: &str) -> Error {
    Error::usage(format!("images cannot be read from {prefix}:")).hint(format!(
        "copy the image to a file first: skopeo copy {prefix}:... oci-archive:image.tar; then use \
         --from oci-archive:image.tar"
    ))
}
