//! Obtains the layers of an image: those that the store has are shared, the others are downloaded and unpacked.

use std::fs::File;
use std::io::{Read, Write as _};

use serde_json::Map;

use super::create::with_option_as_hint;
use crate::archive::image_source::{
    Digest, Image, ImageLayer, ImageSource, LayerBlob, VerifiedBlob,
};
use crate::archive::{TransferReport, import};
use crate::error::{Error, Result};
use crate::store::creation::Creation;
use crate::store::image_layers::{Blobs, Candidates};
use crate::store::image_record::{BlobRecord, ImageLayerRecord};
use crate::store::manifest::{LayerId, LayerKind, LayerManifest};
use crate::store::{Store, image_layers, measure};
use crate::tree::error::{ErrorKind, OnProgress, Progress, TreeError};
use crate::tree::omissions::Unsupported;

/// The options for unpacking layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unpacking {
    /// The treatment of what the store's file system, or the user, cannot store.
    pub(super) unsupported: Unsupported,
    /// The blobs of the layers.
    pub(super) blobs: Blobs,
}

/// The layers of an image from one of them to the top.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'i> {
    /// The image.
    pub(super) image: &'i Image,
    /// The source of the image.
    pub(super) source: &'i dyn ImageSource,
    /// The number of layers at the bottom that exist.
    pub(super) first: usize,
    /// These layers, topmost first.
    pub(super) below: &'i [LayerId],
    /// The options.
    pub(super) options: Unpacking,
}

/// The layers that [`Wanted::obtain`] has found or created.
#[derive(Debug, Default)]
pub(super) struct Obtained {
    /// The layers, from the bottom, without those that existed below.
    pub(super) layers: Vec<LayerId>,
    /// The number of layers that were unpacked.
    pub(super) unpacked: usize,
    /// Notes on properties that were not preserved.
    pub(super) notes: Vec<String>,
}

impl<'i> Wanted<'i> {
    /// Returns the layers with their chain ids.
    fn layers(&self) -> Vec<(&'i ImageLayer, Digest)> {
        let mut chain: Option<Digest> = None;
        let mut found = Vec::new();
        for layer in &self.image.layers {
            let own = layer.diff_id.chain(chain.as_ref());
            found.push((layer, own.clone()));
            chain = Some(own);
        }
        found.split_off(self.first.min(found.len()))
    }

    /// Returns the layers that the store has, from the bottom, topmost first in each stack.
    fn shared(&self, known: &Candidates) -> Vec<LayerId> {
        let mut below = self.below.to_vec();
        let mut found = Vec::new();
        for (_, chain_id) in self.layers() {
            let mut candidates = known.get(&chain_id).into_iter().flatten();
            let Some((layer, _)) = candidates.find(|(_, over)| *over == below) else {
                break;
            };
            found.push(*layer);
            below.insert(0, *layer);
        }
        found
    }

    fn find_shared(&self, store: &Store) -> Result<Vec<LayerId>> {
        let chain_ids: Vec<_> = self.layers().into_iter().map(|(_, id)| id).collect();
        let known = image_layers::find(store, &chain_ids, self.options.blobs)?;
        Ok(self.shared(&known))
    }

    /// Downloads the layers that the store lacks, without a lock of the store: this may take hours.
    pub(super) fn prepare(&self, store: &Store, progress: OnProgress<'_>) -> Result<()> {
        let shared = {
            let _reading = store.lock_shared()?;
            self.find_shared(store)?
        };
        self.download(shared.len(), progress)
    }

    fn download(&self, shared: usize, progress: OnProgress<'_>) -> Result<()> {
        let missing = self.image.layers.get(self.first + shared..);
        let missing: Vec<_> = missing.unwrap_or_default().iter().collect();
        Ok(self.source.prepare(&missing, progress)?)
    }

    /// Finds or creates the layers. `creation` excludes a collection of those that are found.
    pub(super) fn obtain(
        &self,
        store: &Store,
        creation: &mut Creation<'_>,
        progress: OnProgress<'_>,
    ) -> Result<Obtained> {
        let shared = self.find_shared(store)?;
        // A collection may have removed some since [`Self::prepare`].
        self.download(shared.len(), progress)?;
        let mut below = self.below.to_vec();
        for layer in &shared {
            below.insert(0, *layer);
        }
        let mut obtained = Obtained {
            layers: shared,
            ..Obtained::default()
        };
        let mut report = TransferReport::default();
        let mut is_incomplete = false;
        let mut new = Vec::new();
        for (layer, chain_id) in self.layers().into_iter().skip(obtained.layers.len()) {
            let kind = match below.is_empty() {
                true => LayerKind::Base,
                false => LayerKind::Delta,
            };
            let blob = match self.options.blobs {
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
            let done = unpack((self.source, layer), target, self.options, &mut progress)?;
            report.done.entries += done.done.entries;
            report.done.bytes += done.done.bytes;
            report.notes.append(done.notes);
            if done.is_incomplete && !is_incomplete {
                is_incomplete = true;
                image_layers::mark_incomplete(store, id)?;
            }
            below.insert(0, id);
            new.push(id);
        }
        // The data must be durable before a container references it.
        creation.sync_content()?;
        for id in &new {
            if let Err(error) = measure::measured(store, *id) {
                log::debug!("cannot measure a layer: {error}");
            }
        }
        obtained.unpacked = new.len();
        obtained.layers.extend(new);
        obtained.notes = report.notes.lines();
        Ok(obtained)
    }
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
    options: Unpacking,
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
    if unpacked
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::NoSpace)
    {
        // The disk needs the space more than the next attempt needs the downloads.
        source.release();
    }
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
