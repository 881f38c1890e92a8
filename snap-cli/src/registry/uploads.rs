//! Uploads of images to a registry, layer by layer. What the registry has is not sent.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ureq::Body;
use ureq::http::{Method, Response, header};

use super::answer;
use super::client::{Call, Client, Content, encoded};
use super::downloads::USEFUL;
use super::manifests::Document;
use super::parallel::{Queue, Transfer, in_parallel, through_queue};
use super::patience::{self, Patience};
use super::tag::{self, Overwrite};
use crate::archive::image_source::Digest;
use crate::error::{Error, Kind, Result};
use crate::store::disk;
use crate::tree::error::OnProgress;

/// A blob of an image in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobFile {
    /// The digest.
    pub digest: Digest,
    /// The size in bytes.
    pub size: u64,
    /// The file. It is removed when the registry has the blob.
    pub path: PathBuf,
}

/// The result of a push.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PushReport {
    /// The number of blobs that were sent: layers, and the config.
    pub sent: u64,
    /// The number of bytes in them.
    pub bytes: u64,
    /// The number of blobs that the registry mounted from another repository.
    pub mounted: u64,
    /// The number of blobs that the repository had.
    pub present: u64,
    /// The digest of the manifest that the tag referred to before.
    pub replaced: Option<Digest>,
}

/// The result of the search for a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Neither the repository nor the other one has it.
    Missing,
    /// The repository had it.
    Present,
    /// The registry mounted it from the other repository.
    Mounted,
}

/// The way in which a blob came to the repository.
enum Done {
    Present,
    Mounted,
    Sent(u64),
}

/// The upload of an image, whose layers become known one after the other. The image gets the tag when it is complete.
#[derive(Debug)]
pub struct Push<'c> {
    client: &'c Client,
    tag: &'c str,
    /// Another repository of the registry, whose layers are mounted.
    from: Option<&'c str>,
    overwrite: Overwrite,
    /// The manifest that the tag refers to.
    before: Option<Document>,
    /// The digests of the uncompressed layers of that image, which the new one must have; from the bottom.
    expected: Vec<Digest>,
}

impl<'c> Push<'c> {
    /// Reads the manifest that the tag refers to.
    pub fn begin(
        client: &'c Client,
        (tag, from, overwrite): (&'c str, Option<&'c str>, Overwrite),
    ) -> Result<Self> {
        Ok(Self {
            client,
            tag,
            from,
            overwrite,
            before: client.tagged(tag)?,
            expected: Vec::new(),
        })
    }

    /// Returns whether the tag refers to this manifest already.
    pub fn is_current(&self, manifest: &[u8]) -> bool {
        let before = self.before.as_ref();
        before.is_some_and(|before| before.digest == Digest::of(manifest))
    }

    /// Refuses to replace an image with more layers than the new one, unless that is permitted. Afterwards,
    /// [`Self::check_layer`] compares its layers.
    pub fn check_tag(&mut self, layers: usize) -> Result<()> {
        if let (Overwrite::Refuse, Some(before)) = (self.overwrite, &self.before) {
            let found = tag::diff_ids(self.client, before)?;
            self.expected = found
                .filter(|found| found.len() <= layers)
                .ok_or_else(|| tag::loss(self.tag, &before.digest))?;
        }
        Ok(())
    }

    /// Refuses an image whose layer at this position is not that of the image to be replaced. `origin` is the layer that
    /// it was unpacked from: another program writes the same changes in another way.
    pub fn check_layer(&self, at: usize, diff_id: &Digest, origin: Option<&Digest>) -> Result<()> {
        match (self.expected.get(at), &self.before) {
            (Some(expected), Some(before)) if expected != diff_id && origin != Some(expected) => {
                Err(tag::loss(self.tag, &before.digest))
            }
            _ => Ok(()),
        }
    }

    /// Returns for each blob whether the repository has it, or can mount it.
    pub fn lookup(&self, blobs: &[(Digest, u64)], progress: OnProgress<'_>) -> Result<Vec<Found>> {
        in_parallel(blobs, 0, progress, |(digest, size), transfer| {
            if self.client.has_blob(digest, *size, transfer)? {
                return Ok(Found::Present);
            }
            match self.from {
                Some(from) => self.mount(digest, from, transfer),
                None => Ok(Found::Missing),
            }
        })
    }

    /// Mounts a blob of another repository, if that has it.
    fn mount(&self, digest: &Digest, from: &str, transfer: &Transfer) -> Result<Found> {
        match request_upload(self.client, digest, Some(from), transfer)? {
            Ok(Started::Mounted) => Ok(Found::Mounted),
            Ok(Started::Session(session)) => {
                let call = Call::new(Method::DELETE, session.location);
                // The registry removes an unused upload by itself, sooner or later.
                match self.client.send_once(&call) {
                    Ok(response) => log::debug!("the upload ended: {}", response.status()),
                    Err(error) => log::debug!("{error}"),
                }
                Ok(Found::Missing)
            }
            Err(response) => {
                log::debug!("cannot mount {digest}: {}", response.status());
                Ok(Found::Missing)
            }
        }
    }

    /// Sends the blobs that `produce` adds to the queue, except those that the repository has or can mount.
    pub fn send<P>(
        &self,
        produce: impl FnOnce(&Queue<BlobFile>) -> Result<P>,
        progress: OnProgress<'_>,
    ) -> Result<(P, PushReport)> {
        let transfer = |blob: &BlobFile, transfer: &Transfer| {
            let upload = Upload {
                client: self.client,
                blob,
                transfer,
            };
            let done = upload.run(self.from)?;
            disk::remove_if_exists(&blob.path)?;
            Ok(done)
        };
        let (produced, done) = through_queue(transfer, produce, progress)?;
        let mut report = PushReport::default();
        for done in done {
            match done {
                Done::Present => report.present += 1,
                Done::Mounted => report.mounted += 1,
                Done::Sent(size) => {
                    report.sent += 1;
                    report.bytes += size;
                }
            }
        }
        Ok((produced, report))
    }

    /// Gives the image the tag. Returns the digest that the tag referred to before. The registry must have all blobs.
    pub fn finish(self, media_type: &str, manifest: &[u8]) -> Result<Option<Digest>> {
        if self.is_current(manifest) {
            return Ok(None);
        }
        let before = self.before.map(|before| before.digest);
        if self.overwrite == Overwrite::Refuse {
            tag::refuse_change(self.client, self.tag, before.as_ref())?;
        }
        self.client.put_manifest(self.tag, media_type, manifest)?;
        Ok(before)
    }
}

struct Upload<'u> {
    client: &'u Client,
    blob: &'u BlobFile,
    transfer: &'u Transfer,
}

/// An upload in the registry: its URL, and the number of bytes that the registry has.
struct Session {
    location: String,
    offset: u64,
}

/// The answer to the request for a new upload.
enum Started {
    /// The blob was mounted from another repository.
    Mounted,
    Session(Session),
}

/// A failed attempt.
struct Failure {
    error: Error,
    /// The time that the registry requests until the next attempt.
    requested: Option<Duration>,
    /// Whether the next attempt must begin with a new upload.
    is_lost: bool,
}

impl Failure {
    fn temporary(error: Error, requested: Option<Duration>, is_lost: bool) -> Self {
        Self {
            error: Error {
                kind: Kind::Busy,
                ..error
            },
            requested,
            is_lost,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            error,
            requested: None,
            is_lost: false,
        }
    }
}

impl Upload<'_> {
    fn run(&self, from: Option<&str>) -> Result<Done> {
        let BlobFile { digest, size, .. } = self.blob;
        let bytes = &self.transfer.bytes;
        if self.client.has_blob(digest, *size, self.transfer)? {
            bytes.fetch_add(*size, Ordering::Relaxed);
            return Ok(Done::Present);
        }
        let mut session = match self.start(from)? {
            Started::Mounted => {
                bytes.fetch_add(*size, Ordering::Relaxed);
                return Ok(Done::Mounted);
            }
            Started::Session(session) => session,
        };
        let (mut patience, mut best) = (Patience::new(), 0u64);
        loop {
            let before = session.offset;
            let failed = match self.send(&mut session) {
                Ok(()) => return Ok(Done::Sent(*size)),
                Err(failure) if failure.error.kind == Kind::Busy => failure,
                Err(failure) => return Err(failure.error),
            };
            self.transfer.check()?;
            // The connection can fail after the registry has received everything.
            if self.client.has_blob(digest, *size, self.transfer)? {
                bytes.fetch_add(size - before, Ordering::Relaxed);
                return Ok(Done::Sent(*size));
            }
            let Some(wait) = patience.next_wait(failed.requested) else {
                let what = format!("cannot upload the blob {digest}: {}", failed.error);
                return Err(
                    Error::failed(what).hint("try again: complete blobs are not sent again")
                );
            };
            patience::report(&failed.error, wait);
            self.transfer.wait(wait)?;
            let continued = match failed.is_lost {
                true => None,
                false => self.status(&session)?,
            };
            // The registry counts again what it has.
            bytes.fetch_sub(before, Ordering::Relaxed);
            session = match continued {
                Some(session) => session,
                None => match self.start(None)? {
                    Started::Mounted => {
                        bytes.fetch_add(*size, Ordering::Relaxed);
                        return Ok(Done::Mounted);
                    }
                    Started::Session(session) => session,
                },
            };
            bytes.fetch_add(session.offset, Ordering::Relaxed);
            // Compared with the longest part so far: a registry may lose each upload.
            if session.offset >= best.saturating_add(USEFUL) {
                best = session.offset;
                patience.renew();
            }
        }
    }

    /// Requests a new upload, or that the registry mounts the blob of another repository.
    fn start(&self, from: Option<&str>) -> Result<Started> {
        match request_upload(self.client, &self.blob.digest, from, self.transfer)? {
            Ok(started) => Ok(started),
            // The other repository may not be readable.
            Err(_) if from.is_some() => self.start(None),
            Err(response) => Err(self.client.refusal("cannot upload", response)),
        }
    }

    /// Sends the rest of the blob, and completes it. An error that may pass has the kind [`Kind::Busy`].
    fn send(&self, session: &mut Session) -> std::result::Result<(), Failure> {
        let BlobFile { digest, size, path } = self.blob;
        let is_resumed = session.offset > 0;
        if session.offset < *size {
            let mut headers = vec![(header::CONTENT_TYPE, "application/octet-stream".to_owned())];
            if is_resumed {
                // Not for a whole blob: with a range, it is a chunk, and some registries limit the size of these.
                let range = format!("{}-{}", session.offset, size - 1);
                headers.push((header::CONTENT_RANGE, range));
            }
            let call = Call {
                headers,
                content: Content::File(path, session.offset, self.transfer),
                ..Call::new(Method::PATCH, session.location.clone())
            };
            let response = self.checked("cannot upload a layer", &call, is_resumed)?;
            session.location = location(self.client, &call.url, &response)?;
        }
        let separator = if session.location.contains('?') {
            '&'
        } else {
            '?'
        };
        let query = encoded(&[("digest", digest.as_str())]);
        let call = Call {
            headers: vec![(header::CONTENT_TYPE, "application/octet-stream".to_owned())],
            content: Content::Bytes(&[]),
            ..Call::new(
                Method::PUT,
                format!("{}{separator}{query}", session.location),
            )
        };
        let done = self.checked("cannot complete an upload", &call, is_resumed);
        if done.is_err() {
            let sent = size - session.offset;
            self.transfer.bytes.fetch_sub(sent, Ordering::Relaxed);
        }
        done.map(drop)
    }

    /// Sends a request once, which must succeed. If the registry refuses the content of a resumed upload, it must begin
    /// again: the registry may have counted the bytes wrongly.
    fn checked(
        &self,
        what: &str,
        call: &Call<'_>,
        is_resumed: bool,
    ) -> std::result::Result<Response<Body>, Failure> {
        let response = self.client.send_once(call)?;
        let status = response.status().as_u16();
        let requested = answer::retry_after(response.headers());
        let is_lost = status == 416 || (status == 400 && is_resumed);
        match status {
            200..=299 => Ok(response),
            // The registry lost the upload, or the last part of it; or it may succeed later.
            _ if status == 404 || answer::is_temporary(response.status()) => {
                let error = self.client.refusal(what, response);
                Err(Failure::temporary(error, requested, false))
            }
            _ if is_lost => {
                let error = self.client.refusal(what, response);
                Err(Failure::temporary(error, requested, true))
            }
            _ => Err(self.client.refusal(what, response).into()),
        }
    }

    /// Asks for the number of bytes that the registry has received; `None` if the upload must begin again.
    fn status(&self, session: &Session) -> Result<Option<Session>> {
        let call = Call::new(Method::GET, session.location.clone());
        let response = self.client.send_for(&call, Some(self.transfer))?;
        if response.status().as_u16() != 204 {
            return Ok(None);
        }
        let range = answer::text(response.headers(), header::RANGE.as_str());
        let last = range.and_then(|range| range.rsplit('-').next()?.parse::<u64>().ok());
        Ok(match last {
            // The end is included, so that 0 means one byte or none.
            Some(last) if last > 0 && last < self.blob.size => Some(Session {
                location: location(self.client, &call.url, &response)?,
                offset: last + 1,
            }),
            Some(_) | None => None,
        })
    }
}

/// Requests a new upload, or that the registry mounts the blob of another repository. Returns any other answer as it is.
fn request_upload(
    client: &Client,
    digest: &Digest,
    from: Option<&str>,
    transfer: &Transfer,
) -> Result<std::result::Result<Started, Response<Body>>> {
    let path = match from {
        None => "blobs/uploads/".to_owned(),
        Some(from) => {
            let fields = [("mount", digest.as_str()), ("from", from)];
            format!("blobs/uploads/?{}", encoded(&fields))
        }
    };
    let call = Call {
        content: Content::Bytes(&[]),
        ..client.call(Method::POST, &path)
    };
    let response = client.send_for(&call, Some(transfer))?;
    match response.status().as_u16() {
        201 => Ok(Ok(Started::Mounted)),
        202 => Ok(Ok(Started::Session(Session {
            location: location(client, &call.url, &response)?,
            offset: 0,
        }))),
        _ => Ok(Err(response)),
    }
}

/// Returns the URL of the upload in an answer to a request for `url`.
fn location(client: &Client, url: &str, response: &Response<Body>) -> Result<String> {
    let location = answer::text(response.headers(), header::LOCATION.as_str());
    match location {
        Some(location) => client.connection().resolve(url, location),
        None => {
            let what = format!(
                "{} did not send the location of an upload",
                client.registry()
            );
            Err(Error::failed(what))
        }
    }
}
