//! Manifests and other small documents in a registry.

use ureq::http::{Method, header};

use super::answer;
use super::client::{Call, Client, Content};
use super::parallel::Transfer;
use super::patience::{self, Patience};
use crate::archive::image_source::{Digest, MANIFEST_LIMIT, MANIFEST_MEDIA_TYPES};
use crate::error::{Error, Kind, Result};

/// A document of a registry.
#[derive(Clone, Debug)]
pub(super) struct Document {
    /// The content.
    pub(super) data: Vec<u8>,
    /// The media type that the registry reports.
    pub(super) media_type: String,
    /// The digest of the content.
    pub(super) digest: Digest,
}

impl Client {
    /// Reads the manifest or the index with a tag or a digest.
    pub(super) fn manifest(&self, name: &str) -> Result<Document> {
        let accept = MANIFEST_MEDIA_TYPES.join(", ");
        let mut call = self.call(Method::GET, &format!("manifests/{name}"));
        call.headers = vec![(header::ACCEPT, accept)];
        let what = format!("the manifest {name}");
        self.document(&call, MANIFEST_LIMIT, &what)
    }

    /// Reads a blob of at most `limit` bytes.
    pub(super) fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Document> {
        let call = self.call(Method::GET, &format!("blobs/{digest}"));
        self.document(&call, limit, &format!("the blob {digest}"))
    }

    /// Reads a document. Its content is not verified.
    fn document(&self, call: &Call<'_>, limit: u64, what: &str) -> Result<Document> {
        let mut patience = Patience::new();
        loop {
            let response = self.send_patiently(call, None, &mut patience)?;
            if response.status().as_u16() != 200 {
                return Err(self.refusal(&format!("cannot read {what}"), response));
            }
            let media_type = answer::text(response.headers(), header::CONTENT_TYPE.as_str());
            let media_type = media_type.unwrap_or_default().split(';').next();
            let media_type = media_type.unwrap_or_default().trim().to_owned();
            match answer::read(response, limit, what) {
                Ok(data) => {
                    let digest = Digest::of(&data);
                    return Ok(Document {
                        data,
                        media_type,
                        digest,
                    });
                }
                // The connection was cut.
                Err(error) if error.source.is_some() => match patience.next_wait(None) {
                    Some(wait) => {
                        patience::report(&error, wait);
                        std::thread::sleep(wait);
                    }
                    None => return Err(error),
                },
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads the manifest or the index with a tag, if the registry has one.
    pub(super) fn tagged(&self, tag: &str) -> Result<Option<Document>> {
        match self.manifest(tag) {
            Ok(document) => Ok(Some(document)),
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a manifest under a tag.
    pub(super) fn put_manifest(&self, tag: &str, media_type: &str, data: &[u8]) -> Result<()> {
        let call = Call {
            headers: vec![(header::CONTENT_TYPE, media_type.to_owned())],
            content: Content::Bytes(data),
            ..self.call(Method::PUT, &format!("manifests/{tag}"))
        };
        let response = self.send(&call)?;
        match response.status().as_u16() {
            200..=299 => Ok(()),
            _ => Err(self.refusal("cannot write the manifest", response)),
        }
    }

    /// Returns whether the registry has a blob of this size. The request is a part of `transfer`.
    pub(super) fn has_blob(&self, digest: &Digest, size: u64, transfer: &Transfer) -> Result<bool> {
        let call = self.call(Method::HEAD, &format!("blobs/{digest}"));
        let response = self.send_for(&call, Some(transfer))?;
        match response.status().as_u16() {
            200 => {
                let found = answer::content_length(response.headers());
                match found {
                    Some(found) if found != size => Err(Error::new(
                        Kind::Failed,
                        format!(
                            "{} has the blob {digest} with {found} instead of {size} bytes",
                            self.registry()
                        ),
                    )),
                    _ => Ok(true),
                }
            }
            404 => Ok(false),
            _ => Err(self.refusal("cannot look up a layer", response)),
        }
    }
}
