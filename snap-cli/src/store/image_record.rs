//! The records of container images: in a container's manifest that of its image, in a layer's manifest the layer of an
//! image that it was unpacked from.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::archive::image_source::{Digest, HistoryEntry, Platform};

/// The image that a container was created from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Its name, as far as the source had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The digest of its manifest, if it had one in the form of the image specification.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Its platform.
    pub platform: Platform,
    /// The time of its creation (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Its author.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The settings of its processes, such as Env and Cmd, as in the image's config.
    #[serde(default)]
    pub config: Map<String, Value>,
    /// The steps of its creation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<HistoryEntry>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The layer of an image that a layer was unpacked from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayerRecord {
    /// The digest of the uncompressed layer.
    pub diff_id: Digest,
    /// The digest of it together with all layers below it. Layers with the same chain id are interchangeable.
    pub chain_id: Digest,
    /// The blob, if it was retained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob: Option<BlobRecord>,
    /// Whether `--skip-unsupported` omitted a part of the layer or of one below it, or another program changed the
    /// layer. Such a layer is not shared.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// The blob of a layer of an image, which is next to the layer's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}
