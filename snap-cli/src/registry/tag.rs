//! The image that a tag refers to before a push, which may have snapshots that only the registry has.

use serde::Deserialize;

use super::client::Client;
use super::manifests::Document;
use crate::archive::image_source::{CONFIG_LIMIT, Digest};
use crate::error::{Error, Kind, Result};

/// The treatment of a tag with layers that the new image lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// It is not changed.
    Refuse,
    /// It is replaced.
    Permit,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: Digest,
}

#[derive(Deserialize)]
struct Config {
    rootfs: Layers,
}

#[derive(Deserialize)]
struct Layers {
    diff_ids: Vec<Digest>,
}

/// Returns the error for a tag that refers to an image with layers that the new one lacks.
pub(super) fn loss(tag: &str, current: &Digest) -> Error {
    Error::failed(format!(
        "cannot push: the tag {tag} refers to {current}, which has layers that the state lacks"
    ))
    .hint(
        "add them to the container: cowl pull --update REFERENCE NAME; push to another tag; or replace it: --force",
    )
}

/// Refuses a tag that another command has changed since `before` was read.
pub(super) fn refuse_change(client: &Client, tag: &str, before: Option<&Digest>) -> Result<()> {
    let current = client.tagged(tag)?;
    match current.as_ref().map(|current| &current.digest) == before {
        true => Ok(()),
        false => Err(Error::busy(format!(
            "another command has changed the tag {tag} during the push"
        ))
        .hint("try again: layers that were sent are not sent again")),
    }
}

/// Returns the digests of the uncompressed layers of an image; `None` if the document is not one image.
pub(super) fn diff_ids(client: &Client, document: &Document) -> Result<Option<Vec<Digest>>> {
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&document.data) else {
        return Ok(None);
    };
    let config = match client.small_blob(&manifest.config.digest, CONFIG_LIMIT) {
        Ok(config) => config,
        Err(error) if error.kind == Kind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let is_verified = config.digest == manifest.config.digest;
    let config = serde_json::from_slice::<Config>(&config.data).ok();
    Ok(config
        .filter(|_| is_verified)
        .map(|config| config.rootfs.diff_ids))
}
