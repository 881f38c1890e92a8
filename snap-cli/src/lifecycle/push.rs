//! Writes a state to a registry.
//!
//! A layer is packed only if the registry may lack it: the blobs of earlier pushes are recorded. Each layer is sent while
//! the next one is packed, and then removed, so that few packed layers are on the disk at a time.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::archive::TransferReport;
use crate::archive::image_source::Digest;
use crate::archive::oci::{
    self, Documents, ImageDescription, ImageStep, KeptBlob, LayerCompression, MANIFEST, PackedLayer,
};
use crate::error::{Error, Result};
use crate::registry::{BlobFile, Client, Found, Overwrite, Push, PushReport, Queue, RegistryRef};
use crate::snapshot::ResolvedState;
use crate::snapshot::image_plan::ImagePlan;
use crate::store::lock::Lock;
use crate::store::manifest::LayerId;
use crate::store::packed::Difference;
use crate::store::{Store, disk, measure};
use crate::tree::error::{OnProgress, Progress};
use cowl_layers::shown::Show as _;

/// The result of [`push`].
#[derive(Clone, Debug)]
pub struct Pushed {
    /// The digest of the image's manifest.
    pub digest: Digest,
    /// The number of layers of the image.
    pub layers: usize,
    /// The number of layers that were read and compressed.
    pub packed: usize,
    /// The transfer.
    pub report: PushReport,
    /// Notes on properties that the image does not have.
    pub notes: Vec<String>,
}

/// A directory for packed layers until they are in the registry. It is removed on drop, or collected after a kill.
struct Staging {
    path: PathBuf,
    // Locked, so that it is not collected.
    _dir: File,
}

impl Staging {
    /// Creates the directory. The caller must hold a shared lock of the store, which excludes a collection until the
    /// directory is locked.
    fn create(store: &Store) -> Result<Self> {
        let transfers = store.paths().transfers();
        disk::ensure_private_dir(&transfers)?;
        let path = transfers.join(format!("push-{}", Uuid::new_v4()));
        disk::ensure_private_dir(&path)?;
        let at = |error| Error::at("lock", &path, error);
        let dir = File::open(&path).map_err(at)?;
        // Not without waiting: a command that searches for leftovers holds the lock for a moment.
        let locked = rustix::fs::flock(&dir, FlockOperation::LockExclusive);
        locked.map_err(|error| at(error.into()))?;
        Ok(Self { path, _dir: dir })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = disk::remove_tree(&self.path) {
            log::warn!("{error}; `cowl gc` will remove it");
        }
    }
}

/// The destination of a push, and its options.
#[derive(Debug)]
pub struct Destination<'d> {
    /// The client of the repository.
    pub client: &'d Client,
    /// The repository and the tag.
    pub reference: &'d RegistryRef,
    /// Another repository of the registry, whose layers are mounted.
    pub from: Option<&'d str>,
    /// The treatment of a tag with layers that the state lacks.
    pub overwrite: Overwrite,
    /// The compression of the layers.
    pub compression: LayerCompression,
}

/// Writes a state to a registry: a layer for each snapshot, and at last the tag.
///
/// `reading` is a shared lock of the store. It is released before the transfer, which may take hours, and acquired again
/// for each layer that is packed.
pub fn push(
    store: &Store,
    (state, reading): (&ResolvedState, Lock),
    destination: &Destination<'_>,
    (on_write, on_send): (OnProgress<'_>, OnProgress<'_>),
) -> Result<Pushed> {
    let ImagePlan { steps, description } = state.image_plan(store)?;
    let mut image = Packing {
        store,
        steps: &steps,
        description: &description,
        compression: destination.compression,
        staging: Staging::create(store)?,
        layers: Vec::new(),
        packed: 0,
        report: TransferReport::default(),
        total: None,
    };
    image.layers = image.find_known()?;
    drop(reading);
    let tag = destination.reference.tag().unwrap_or_default();
    let to = (tag, destination.from, destination.overwrite);
    let mut push = Push::begin(destination.client, to)?;
    let (documents, mut report) = match image.documents()? {
        Some(documents) if push.is_current(&documents.manifest) => {
            let present = image.digests().len() as u64 + 1;
            let report = PushReport {
                present,
                ..PushReport::default()
            };
            (documents, report)
        }
        Some(_) | None => {
            push.check_tag(steps.len())?;
            image.send(&push, on_write, on_send)?
        }
    };
    report.replaced = push.finish(MANIFEST, &documents.manifest)?;
    Ok(Pushed {
        digest: Digest::of(&documents.manifest),
        layers: steps.len(),
        packed: image.packed,
        report,
        notes: image.report.notes.lines(),
    })
}

/// An image whose layers are packed when they are needed.
struct Packing<'p> {
    store: &'p Store,
    steps: &'p [ImageStep<Vec<LayerId>>],
    description: &'p ImageDescription,
    compression: LayerCompression,
    staging: Staging,
    /// The layers, as far as they are known.
    layers: Vec<Option<PackedLayer>>,
    /// The number of layers that were packed.
    packed: usize,
    report: TransferReport,
    /// The size of the layers to be packed in bytes, if it is known.
    total: Option<u64>,
}

impl<'p> Packing<'p> {
    fn difference(&self, at: usize) -> Difference<'p> {
        let state = |at: usize| {
            let step = self.steps.get(at);
            step.map_or(&[][..], |step| step.state.as_slice())
        };
        Difference {
            old: at.checked_sub(1).map_or(&[], state),
            new: state(at),
            compression: self.compression,
        }
    }

    /// Returns the layers whose blobs were retained or are recorded. The caller must hold a shared lock of the store.
    fn find_known(&self) -> Result<Vec<Option<PackedLayer>>> {
        let known = |(at, step): (usize, &ImageStep<_>)| match &step.kept {
            Some(kept) => Ok(Some(kept.layer())),
            None => self.difference(at).find(self.store),
        };
        self.steps.iter().enumerate().map(known).collect()
    }

    /// Returns the documents of the image, if all layers are known.
    fn documents(&self) -> Result<Option<Documents>> {
        let notes = self.steps.iter().map(|step| step.snapshot.as_ref());
        let layers = self.layers.iter().cloned().zip(notes);
        let layers: Option<Vec<_>> = layers.map(|(layer, note)| Some((layer?, note))).collect();
        let documents = layers.map(|layers| Documents::new(self.description, &layers));
        Ok(documents.transpose()?)
    }

    /// Returns the blobs of the layers that are known, each once.
    fn digests(&self) -> Vec<(Digest, u64)> {
        let mut found: Vec<(Digest, u64)> = Vec::new();
        for layer in self.layers.iter().flatten() {
            let blob = (layer.digest.clone(), layer.size);
            if !found.contains(&blob) {
                found.push(blob);
            }
        }
        found
    }

    /// Sends the layers that the registry lacks, and the config. Returns the documents.
    fn send(
        &mut self,
        push: &Push<'_>,
        on_write: OnProgress<'_>,
        on_send: OnProgress<'_>,
    ) -> Result<(Documents, PushReport)> {
        for (at, layer) in self.layers.iter().enumerate() {
            if let Some(layer) = layer {
                push.check_layer(at, &layer.diff_id, self.origin(at))?;
            }
        }
        let known = self.digests();
        let found = push.lookup(&known, &mut |_| {})?;
        let count = |wanted| found.iter().filter(|found| **found == wanted).count() as u64;
        let (present, mounted) = (count(Found::Present), count(Found::Mounted));
        let known = known.into_iter().zip(&found);
        let known = known.filter(|(_, found)| **found != Found::Missing);
        let mut done: HashSet<Digest> = known.map(|((digest, _), _)| digest).collect();
        self.total = self.unpacked_size(&done);
        let (documents, mut report) = push.send(
            |queue| {
                for at in 0..self.steps.len() {
                    self.send_layer(at, (push, queue), &mut done, on_write)?;
                }
                let documents = self.documents()?;
                let documents = documents
                    .ok_or_else(|| Error::failed("a layer of the image was not packed"))?;
                self.send_config(&documents.config, queue)?;
                Ok(documents)
            },
            on_send,
        )?;
        report.present += present;
        report.mounted += mounted;
        Ok((documents, report))
    }

    fn origin(&self, at: usize) -> Option<&'p Digest> {
        self.steps.get(at)?.unpacked_from.as_ref()
    }

    /// Returns the size of the layers that are to be packed, apart from those with these blobs.
    fn unpacked_size(&self, present: &HashSet<Digest>) -> Option<u64> {
        let mut total = 0;
        for (at, layer) in self.layers.iter().enumerate() {
            let is_present = layer
                .as_ref()
                .is_some_and(|layer| present.contains(&layer.digest));
            let Difference { old, new, .. } = self.difference(at);
            let own = new.get(..new.len().saturating_sub(old.len()));
            if !is_present && let Some(own) = own {
                let size = measure::known_size(self.store, own).unwrap_or_else(|error| {
                    log::debug!("{error}");
                    None
                });
                total += size?;
            }
        }
        Some(total)
    }

    /// Sends a layer, unless its blob is in `done`.
    fn send_layer(
        &mut self,
        at: usize,
        (push, queue): (&Push<'_>, &Queue<BlobFile>),
        done: &mut HashSet<Digest>,
        on_write: OnProgress<'_>,
    ) -> Result<()> {
        let known = self.layers.get(at).cloned().flatten();
        if known.is_some_and(|layer| done.contains(&layer.digest)) {
            return Ok(());
        }
        let Some(step) = self.steps.get(at) else {
            return Ok(());
        };
        let path = self.staging.path.join(format!("layer-{at}"));
        let layer = match &step.kept {
            Some(kept) => {
                self.with_space(&path, queue, |own| own.link(kept, &path))?;
                kept.layer()
            }
            None => self.pack_layer(at, &path, queue, on_write)?,
        };
        push.check_layer(at, &layer.diff_id, self.origin(at))?;
        let blob = BlobFile {
            digest: layer.digest.clone(),
            size: layer.size,
            path,
        };
        if let Some(known) = self.layers.get_mut(at) {
            *known = Some(layer);
        }
        match done.insert(blob.digest.clone()) {
            true => queue.push(blob.clone(), blob.size),
            false => disk::remove_if_exists(&blob.path),
        }
    }

    fn send_config(&mut self, config: &[u8], queue: &Queue<BlobFile>) -> Result<()> {
        let path = self.staging.path.join("config");
        self.with_space(&path, queue, |_| {
            std::fs::write(&path, config).map_err(|error| Error::at("write", &path, error))
        })?;
        let size = config.len() as u64;
        let digest = Digest::of(config);
        queue.push(BlobFile { digest, size, path }, size)
    }

    /// Locks the store, and verifies that it has the layers of a state.
    fn lock(&self, stack: &[LayerId]) -> Result<Lock> {
        let reading = self.store.lock_shared()?;
        for id in stack {
            if !disk::exists(&self.store.paths().layer_dir(*id))? {
                return Err(Error::failed(
                    "layers of the state were removed or merged during the push",
                )
                .hint("try again: layers that were sent are not sent again"));
            }
        }
        Ok(reading)
    }

    /// Gives the retained blob of a layer another name, under which it is not collected, and verifies it.
    fn link(&self, kept: &KeptBlob, path: &Path) -> Result<()> {
        let _reading = self.lock(&[])?;
        let create = || File::create_new(path).map_err(|error| Error::at("create", path, error));
        match std::fs::hard_link(&kept.path, path) {
            Ok(()) => kept.copy(std::io::sink())?,
            // Not every file system has links.
            Err(error) => {
                log::debug!("cannot link {}: {error}", kept.path.shown());
                kept.copy(create()?)?;
            }
        }
        Ok(())
    }

    /// Writes a file. On a full disk, waits for the transfers of other layers, whose files are then removed.
    fn with_space<T>(
        &mut self,
        path: &Path,
        queue: &Queue<BlobFile>,
        mut write: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<T> {
        loop {
            let error = match write(self) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            disk::remove_if_exists(path)?;
            queue.check()?;
            if !error.is_no_space() || !queue.drain()? {
                return Err(full_disk(error));
            }
            log::info!("{error}; trying again after the other layers were sent");
        }
    }

    /// Packs a layer to a file, and records its blob.
    fn pack_layer(
        &mut self,
        at: usize,
        path: &Path,
        queue: &Queue<BlobFile>,
        on_write: OnProgress<'_>,
    ) -> Result<PackedLayer> {
        let claimed = self.layers.get(at).cloned().flatten();
        let layer = self.with_space(path, queue, |own| own.try_pack(at, path, queue, on_write))?;
        if let Some(claimed) = claimed.filter(|claimed| claimed.diff_id != layer.diff_id) {
            log::warn!(
                "the layer {} has another content than when it was pushed: {}; to verify the store: \
                 cowl check --deep",
                claimed.diff_id,
                layer.diff_id
            );
        }
        Ok(layer)
    }

    fn try_pack(
        &mut self,
        at: usize,
        path: &Path,
        queue: &Queue<BlobFile>,
        on_write: OnProgress<'_>,
    ) -> Result<PackedLayer> {
        let difference = self.difference(at);
        let _reading = self.lock(difference.new)?;
        let old = match difference.old {
            [] => None,
            old => Some(self.store.view(old)?),
        };
        let new = self.store.view(difference.new)?;
        let file = File::create_new(path).map_err(|error| Error::at("create", path, error))?;
        let output = StoppableFile { file, queue };
        let (before, total) = (self.report.done, self.total);
        let states = (old.as_ref(), &new);
        let mut progress = |done: Progress| {
            on_write(Progress {
                total,
                ..done.after(before)
            });
        };
        let packed = oci::pack_layer(states, self.compression, output, &mut progress);
        let (layer, done) = packed?;
        self.report.done.entries += done.done.entries;
        self.report.done.bytes += done.done.bytes;
        self.report.notes.append(done.notes);
        self.packed += 1;
        difference.record(self.store, &layer);
        Ok(layer)
    }
}

/// A file that is not written any further once a transfer has failed.
struct StoppableFile<'q> {
    file: File,
    queue: &'q Queue<BlobFile>,
}

impl Write for StoppableFile<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.queue.check().map_err(std::io::Error::other)?;
        self.file.write(data)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Adds a hint to the error of a full disk.
fn full_disk(error: Error) -> Error {
    match error.is_no_space() {
        true => Error::failed(
            "cannot push: the disk of the store is too small for the compressed layer",
        )
        .hint("free space: cowl du; cowl prune NAME; cowl gc")
        .because(error),
        false => error,
    }
}
