//! Sources of container images: an OCI image layout or an archive of `docker save`, in a directory or in a file.
//!
//! A source selects an image, reads its documents, and opens its layers. It does not interpret the layers. A registry is
//! another source of blobs ([`layout::Blobs`], `crate::registry`).

mod digest;
mod docker;
mod documents;
mod files;
pub mod layout;
mod open;
mod platform;
mod reference;
pub mod snapshot_note;
mod verified;

use std::io::Read;

use serde_json::{Map, Value};

pub use digest::Digest;
pub use documents::HistoryEntry;
pub(crate) use layout::{FULL_NAME, INDEX_TYPE, MANIFEST_MEDIA_TYPES, MANIFEST_TYPE, REF_NAME};
pub use open::{open, recognize};
pub use platform::Platform;
pub use reference::{Reference, Transport};
pub(in crate::archive) use snapshot_note::SNAPSHOT;
pub use snapshot_note::SnapshotNote;
pub use verified::VerifiedBlob;

use crate::archive::limits;
use crate::tree::error::{ErrorKind, OnProgress, Result, TreeError};
use documents::Config;

/// The maximum size of a manifest or an index, in bytes.
pub(crate) const MANIFEST_LIMIT: u64 = limits::IMAGE_MANIFEST;

/// The maximum size of a config, in bytes.
pub(crate) const CONFIG_LIMIT: u64 = limits::IMAGE_CONFIG;

/// A source of images.
pub trait ImageSource: std::fmt::Debug {
    /// Selects the image for a platform, and reads and verifies its documents.
    fn image(&self, platform: &Platform) -> Result<Image>;

    /// Obtains layers that are about to be opened; a registry downloads them, several at a time.
    fn prepare(&self, _layers: &[&ImageLayer], _progress: OnProgress<'_>) -> Result<()> {
        Ok(())
    }

    /// Removes what [`Self::prepare`] has stored: the layers were unpacked, or the disk is full.
    fn release(&self) {}

    /// Opens a layer of an image of this source. The content is not verified.
    fn layer<'s>(&'s self, layer: &ImageLayer) -> Result<Box<dyn Read + 's>>;
}

/// An image without the content of its layers.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name, as far as the source has one.
    pub name: Option<String>,
    /// The digest of its manifest, if it has one in the form of the image specification.
    pub digest: Option<Digest>,
    /// Its platform.
    pub platform: Platform,
    /// The time of its creation (RFC 3339).
    pub created: Option<String>,
    /// Its author.
    pub author: Option<String>,
    /// The settings of its processes, such as Env and Cmd.
    pub config: Map<String, Value>,
    /// The steps of its creation.
    pub history: Vec<HistoryEntry>,
    /// Its layers, from the bottom.
    pub layers: Vec<ImageLayer>,
}

/// A layer of an image.
#[derive(Clone, Debug)]
pub struct ImageLayer {
    /// The digest of the uncompressed layer.
    pub diff_id: Digest,
    /// The blob.
    pub blob: LayerBlob,
    /// The size of the blob.
    pub size: u64,
    /// The snapshot whose state the layer completes, if cowl wrote the image.
    pub snapshot: Option<SnapshotNote>,
}

/// The location of a layer in its source.
#[derive(Clone, Debug)]
pub enum LayerBlob {
    /// The blob with this digest, and its media type.
    Digest(Digest, String),
    /// The file with this name, uncompressed or not.
    File(String),
}

impl Image {
    /// Returns the step of the creation that resulted in each layer, from the bottom; `None` for a layer without one.
    pub fn steps(&self) -> Vec<Option<&HistoryEntry>> {
        let mut with_layer = self.history.iter().filter(|entry| !entry.empty_layer);
        self.layers.iter().map(|_| with_layer.next()).collect()
    }
}

/// The location of a layer, its size, and the snapshot that it completes.
type LocatedLayer = (LayerBlob, u64, Option<SnapshotNote>);

/// Creates an image from its config and the locations of its layers.
fn assemble(
    config: Config,
    blobs: Vec<LocatedLayer>,
    (name, digest): (Option<String>, Option<Digest>),
    wanted: &Platform,
) -> Result<Image> {
    let count = config.rootfs.diff_ids.len();
    if count != blobs.len() {
        let what = format!(
            "the image has {} layers, but its config has {count}",
            blobs.len()
        );
        return Err(TreeError::new(ErrorKind::Damaged, what));
    }
    let platform = config.platform();
    if !platform.is_selected_by(wanted) {
        let what = format!("the image is for {platform}, not for {wanted}");
        return Err(TreeError::new(ErrorKind::Refused, what)
            .hint("select another image, or the platform of this one: --platform"));
    }
    let history = config.history.unwrap_or_default();
    if history.len() > limits::IMAGE_HISTORY {
        return Err(limits::exceeded(
            "the history of the image is too long",
            b"",
        ));
    }
    let settings = config.config.unwrap_or_default();
    check_settings(&settings)?;
    let layers = config.rootfs.diff_ids.into_iter().zip(blobs);
    Ok(Image {
        name: name.filter(|name| name.len() <= limits::IMAGE_NAME),
        digest,
        platform,
        created: config.created,
        author: config.author,
        config: settings,
        history,
        layers: layers
            .map(|(diff_id, (blob, size, snapshot))| ImageLayer {
                diff_id,
                blob,
                size,
                snapshot,
            })
            .collect(),
    })
}

/// Refuses settings that are too deep or too many to be stored in a manifest.
fn check_settings(settings: &Map<String, Value>) -> Result<()> {
    let mut todo: Vec<(&Value, usize)> = settings.values().map(|value| (value, 1)).collect();
    let mut count = todo.len();
    while let Some((value, depth)) = todo.pop() {
        if depth > limits::IMAGE_DEPTH {
            let what = "the config of the image is nested too deeply";
            return Err(limits::exceeded(what, b""));
        }
        let before = todo.len();
        match value {
            Value::Array(all) => todo.extend(all.iter().map(|value| (value, depth + 1))),
            Value::Object(all) => todo.extend(all.values().map(|value| (value, depth + 1))),
            _ => {}
        }
        count += todo.len() - before;
    }
    match count > limits::IMAGE_VALUES {
        true => Err(limits::exceeded(
            "the config of the image has too many values",
            b"",
        )),
        false => Ok(()),
    }
}

/// Returns the error for a part of an image that is missing.
fn missing(name: &str) -> TreeError {
    let what = format!("the image is incomplete: {name} is missing");
    TreeError::new(ErrorKind::Damaged, what)
}
