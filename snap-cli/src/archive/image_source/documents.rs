//! The JSON documents of images: index, manifest, config, and the manifest of `docker save`.
//!
//! Only the fields that an import needs are declared: unknown ones are skipped, and a known field that occurs twice is an
//! error. serde_json limits the depth of nested values to 128.

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value};

use super::digest::Digest;
use super::platform::Platform;
use crate::archive::limits;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// A reference to a blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) annotations: Option<Names>,
    #[serde(default)]
    pub(super) platform: Option<Platform>,
}

/// The annotations that name an image. Others are dropped.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Names {
    /// The tag.
    #[serde(rename = "org.opencontainers.image.ref.name", default)]
    pub(super) tag: Option<String>,
    /// The complete name.
    #[serde(rename = "io.containerd.image.name", default)]
    pub(super) full: Option<String>,
}

impl Names {
    /// Adds the names of the index that contains the image, where it has none.
    pub(super) fn inherit(&mut self, index: Option<&Self>) {
        if let Some(index) = index {
            self.tag = self.tag.take().or_else(|| index.tag.clone());
            self.full = self.full.take().or_else(|| index.full.clone());
        }
    }

    /// Returns the names in this order, without those that are too long.
    pub(super) fn listed(&self) -> Vec<String> {
        let names = [&self.tag, &self.full].into_iter().flatten();
        let short = names.filter(|name| name.len() <= limits::IMAGE_NAME);
        short.cloned().collect()
    }
}

/// A list of manifests: `index.json`, or the index of an image for several platforms.
#[derive(Debug, Deserialize)]
pub(super) struct Index {
    pub(super) manifests: Vec<Descriptor>,
    // A document that is an index and a manifest has different meanings for different programs.
    #[serde(default)]
    config: Option<IgnoredAny>,
    #[serde(default)]
    layers: Option<IgnoredAny>,
}

/// The manifest of an image.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<LayerDescriptor>,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
}

/// A reference to the blob of a layer.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LayerDescriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: Digest,
    pub(super) size: u64,
    #[serde(default)]
    pub(super) annotations: Option<LayerNotes>,
}

/// The annotations of a layer that cowl writes. Others are dropped.
#[derive(Debug, Default, Deserialize)]
pub(super) struct LayerNotes {
    /// The snapshot.
    #[serde(rename = "io.cowl.snapshot", default)]
    pub(super) snapshot: Option<String>,
}

/// The config of an image.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    // Not a flattened platform: for that, serde would parse and retain all unknown fields.
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
    #[serde(default)]
    pub(super) created: Option<String>,
    #[serde(default)]
    pub(super) author: Option<String>,
    #[serde(default)]
    pub(super) config: Option<Map<String, Value>>,
    pub(super) rootfs: Rootfs,
    #[serde(default)]
    pub(super) history: Option<Vec<HistoryEntry>>,
}

impl Config {
    /// Returns the platform of the image.
    pub(super) fn platform(&self) -> Platform {
        Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        }
    }
}

/// The layers in the config of an image.
#[derive(Debug, Deserialize)]
pub(super) struct Rootfs {
    pub(super) diff_ids: Vec<Digest>,
}

/// A step of the creation of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
pub struct HistoryEntry {
    /// The time (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// The author.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_by: Option<String>,
    /// A comment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<String>,
    /// Whether the step has no layer.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub empty_layer: bool,
}

/// An image in the manifest of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub(super) config: String,
    #[serde(default)]
    pub(super) repo_tags: Option<Vec<String>>,
    pub(super) layers: Vec<String>,
}

/// Parses a document; `what` describes it in errors.
pub(super) fn parse<T: DeserializeOwned>(data: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(data).map_err(|error| {
        TreeError::new(
            ErrorKind::Damaged,
            format!("cannot read {what} of the image"),
        )
        .because(error)
    })
}

/// Parses an index.
pub(super) fn index(data: &[u8]) -> Result<Index> {
    let index: Index = parse(data, "the index")?;
    match (&index.config, &index.layers) {
        (None, None) => Ok(index),
        _ => Err(ambiguous()),
    }
}

/// Parses a manifest, and checks the number of its layers.
pub(super) fn manifest(data: &[u8]) -> Result<Manifest> {
    let manifest: Manifest = parse(data, "the manifest")?;
    if manifest.manifests.is_some() {
        return Err(ambiguous());
    }
    check_layers(manifest.layers.len())?;
    Ok(manifest)
}

fn ambiguous() -> TreeError {
    let what = "a document of the image is a manifest and an index at once";
    TreeError::new(ErrorKind::Refused, what)
}

/// Refuses an image with too many layers, or with none.
pub(super) fn check_layers(count: usize) -> Result<()> {
    match count {
        0 => Err(TreeError::new(
            ErrorKind::Refused,
            "the image has no layers, so it is not a root filesystem",
        )),
        _ if count > limits::IMAGE_LAYERS => Err(limits::exceeded(
            format!(
                "the image has {count} layers; the limit is {}",
                limits::IMAGE_LAYERS
            ),
            b"",
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> String {
        let digest = Digest::of(b"");
        format!(r#"{{"mediaType":"m","digest":"{digest}","size":0}}"#)
    }

    #[test]
    fn hostile_documents_are_refused() {
        let one = descriptor();
        let good = format!(r#"{{"config":{one},"layers":[{one}],"unknown":{{"a":[1]}}}}"#);
        assert_eq!(manifest(good.as_bytes()).unwrap().layers.len(), 1);
        let many = vec![one.as_str(); limits::IMAGE_LAYERS + 1].join(",");
        for bad in [
            format!(r#"{{"config":{one},"layers":[]}}"#),
            format!(r#"{{"config":{one},"layers":[{many}]}}"#),
            format!(r#"{{"config":{one},"layers":[{one}],"layers":[{one}]}}"#),
            format!(r#"{{"config":{one},"layers":[{one}],"manifests":[]}}"#),
            format!(r#"{{"config":{one},"layers":[{{"digest":"sha256:../x","size":1}}]}}"#),
            format!(
                r#"{{"config":{one},"layers":[{{"digest":"{}","size":-1}}]}}"#,
                Digest::of(b"")
            ),
            "[]".to_owned(),
            String::new(),
        ] {
            assert!(manifest(bad.as_bytes()).is_err(), "{:.200}", bad);
        }
        // Values that are retained are not nested deeply; others are skipped without recursion.
        let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000));
        let config = |settings: &str, other: &str| {
            let text = format!(
                r#"{{"os":"linux","architecture":"a","config":{{"x":{settings}}},"x":{other},"rootfs":{{"diff_ids":[]}}}}"#
            );
            parse::<Config>(text.as_bytes(), "it")
        };
        assert!(config("[]", "[]").is_ok());
        assert!(config("[]", &deep).is_ok());
        assert!(config(&deep, "[]").is_err());
        let both = format!(r#"{{"manifests":[{one}],"layers":[{one}]}}"#);
        assert!(index(both.as_bytes()).is_err());
    }
}
