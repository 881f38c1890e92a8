//! The config and the manifest of an image.
//!
//! They are written without a library, because the crates that implement the complete standard are larger than this
//! module's parent (docs/decisions/0046).

use serde_json::{Map, Value, json};

use super::layer::PackedLayer;
use crate::archive::image_source::{Digest, HistoryEntry, Platform, SNAPSHOT, SnapshotNote};
use crate::tree::error::{ErrorKind, Result, TreeError};

/// The media type of a manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// An image without its layers.
#[derive(Clone, Debug)]
pub struct ImageDescription {
    /// The tag.
    pub tag: String,
    /// The complete name, with the tag.
    pub name: String,
    /// The platform.
    pub platform: Platform,
    /// The time of its creation (RFC 3339).
    pub created: Option<String>,
    /// Its author.
    pub author: Option<String>,
    /// The settings of its processes, such as Env and Cmd.
    pub config: Map<String, Value>,
    /// The steps of its creation.
    pub history: Vec<HistoryEntry>,
}

/// The documents of an image. The same layers and descriptions result in the same bytes.
#[derive(Clone, Debug)]
pub struct Documents {
    /// The config.
    pub config: Vec<u8>,
    /// The manifest, of the media type [`MANIFEST`].
    pub manifest: Vec<u8>,
}

impl Documents {
    /// Creates the documents of an image with these layers, from the bottom, and the snapshots of their states.
    pub fn new(
        description: &ImageDescription,
        layers: &[(PackedLayer, Option<&SnapshotNote>)],
    ) -> Result<Self> {
        let config = config(description, layers)?.to_string().into_bytes();
        let descriptor_of = |(layer, note): &(PackedLayer, Option<&SnapshotNote>)| {
            let mut value = descriptor(layer.media_type, &layer.digest, layer.size);
            let note = note.and_then(SnapshotNote::encode);
            if let (Some(value), Some(note)) = (value.as_object_mut(), note) {
                value.insert("annotations".to_owned(), json!({ SNAPSHOT: note }));
            }
            value
        };
        let layers: Vec<Value> = layers.iter().map(descriptor_of).collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(CONFIG, &Digest::of(&config), config.len() as u64),
            "layers": layers,
        });
        Ok(Self {
            config,
            manifest: manifest.to_string().into_bytes(),
        })
    }
}

fn config(
    description: &ImageDescription,
    layers: &[(PackedLayer, Option<&SnapshotNote>)],
) -> Result<Value> {
    let history = serde_json::to_value(&description.history).map_err(|error| {
        TreeError::new(ErrorKind::Io, "cannot write the history of the image").because(error)
    })?;
    let diff_ids: Vec<&Digest> = layers.iter().map(|(layer, _)| &layer.diff_id).collect();
    let mut config = json!({
        "architecture": description.platform.architecture,
        "os": description.platform.os,
        "config": description.config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": history,
    });
    let optional = [
        ("created", &description.created),
        ("author", &description.author),
        ("variant", &description.platform.variant),
    ];
    if let Some(config) = config.as_object_mut() {
        for (key, value) in optional {
            if let Some(value) = value {
                config.insert(key.to_owned(), value.as_str().into());
            }
        }
    }
    Ok(config)
}

/// Returns the descriptor of a blob.
pub(super) fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest, "size": size })
}
