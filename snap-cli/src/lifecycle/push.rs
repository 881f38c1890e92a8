//! Writes a state to a registry.

use std::fs::File;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::archive::image_source::Digest;
use crate::archive::oci::{self, LayerCompression};
use crate::error::{Error, Result};
use crate::registry::{self, Client, Overwrite, PushReport, RegistryRef};
use crate::snapshot::ResolvedState;
use crate::snapshot::image_plan::ImagePlan;
use crate::store::lock::Lock;
use crate::store::manifest::LayerId;
use crate::store::{Store, disk, measure};
use crate::tree::error::{OnProgress, Progress};

/// The result of [`push`].
#[derive(Clone, Debug)]
pub struct Pushed {
    /// The digest of the image's manifest.
    pub digest: Digest,
    /// The number of layers of the image.
    pub layers: usize,
    /// The transfer.
    pub report: PushReport,
    /// Notes on properties that the image does not have.
    pub notes: Vec<String>,
}

/// A directory for an image until it is in the registry. It is removed on drop, or collected after a kill.
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
        let locked = rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive);
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
/// `reading` is a shared lock of the store. It is released before the transfer, which may take hours.
pub fn push(
    store: &Store,
    (state, reading): (&ResolvedState, Lock),
    destination: &Destination<'_>,
    (on_write, on_send): (OnProgress<'_>, OnProgress<'_>),
) -> Result<Pushed> {
    let ImagePlan { steps, description } = state.image_plan(store)?;
    let staging = Staging::create(store)?;
    let total = measure::known_size(store, &state.stack)?;
    let open = |stack: &Vec<LayerId>| store.view(stack);
    let (report, image) = oci::fill(
        (&steps, open),
        &description,
        destination.compression,
        &staging.path,
        &mut |done| on_write(Progress { total, ..done }),
    )?;
    drop(reading);
    let tag = destination.reference.tag().unwrap_or_default();
    let to = (tag, destination.from, destination.overwrite);
    let sent = registry::push(destination.client, &image, to, on_send)?;
    Ok(Pushed {
        digest: image.manifest.digest.clone(),
        layers: steps.len(),
        report: sent,
        notes: report.notes.lines(),
    })
}
