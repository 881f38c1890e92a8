//! Uploads of an image in a directory to a registry. What the registry has is not sent.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ureq::Body;
use ureq::http::{Method, Response, header};

use super::answer;
use super::client::{ATTEMPTS, Call, Client, Content, delay, encoded};
use super::downloads::USEFUL;
use super::parallel::{Transfer, in_parallel};
use super::tag::{self, Overwrite};
use crate::archive::image_source::Digest;
use crate::archive::oci::{LayoutBlob, LayoutImage};
use crate::error::{Error, Kind, Result};
use crate::tree::error::OnProgress;

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

/// The way in which a blob came to the repository.
enum Done {
    Present,
    Mounted,
    Sent,
}

/// Uploads an image, and gives it a tag when it is complete.
///
/// Layers that the repository `from` of the same registry has are mounted from there.
pub fn push(
    client: &Client,
    image: &LayoutImage,
    (tag, from, overwrite): (&str, Option<&str>, Overwrite),
    progress: OnProgress<'_>,
) -> Result<PushReport> {
    let mut report = PushReport::default();
    let current = client.tagged(tag)?;
    if let Some(current) = &current {
        if current.digest == image.manifest.digest {
            report.present = image.blobs.len() as u64;
            return Ok(report);
        }
        if overwrite == Overwrite::Refuse {
            tag::refuse_loss(client, (tag, current), image)?;
        }
    }
    report.replaced = current.map(|current| current.digest);
    let total = image.blobs.iter().map(|blob| blob.size).sum();
    let done = in_parallel(&image.blobs, total, progress, |blob, transfer| {
        let upload = Upload {
            client,
            blob,
            transfer,
        };
        upload.run(from)
    })?;
    for (blob, done) in image.blobs.iter().zip(done) {
        match done {
            Done::Present => report.present += 1,
            Done::Mounted => report.mounted += 1,
            Done::Sent => {
                report.sent += 1;
                report.bytes += blob.size;
            }
        }
    }
    let manifest = answer::read_file(&image.manifest.path, u64::MAX - 1)?;
    if overwrite == Overwrite::Refuse {
        tag::refuse_change(client, tag, report.replaced.as_ref())?;
    }
    client.put_manifest(tag, image.media_type, &manifest)?;
    Ok(report)
}

struct Upload<'u> {
    client: &'u Client,
    blob: &'u LayoutBlob,
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
        let LayoutBlob { digest, size, .. } = self.blob;
        let bytes = &self.transfer.bytes;
        if self.client.has_blob(digest, *size)? {
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
        let (mut attempt, mut best) = (0, 0u64);
        loop {
            let before = session.offset;
            let failed = match self.send(&mut session) {
                Ok(()) => return Ok(Done::Sent),
                Err(failure) if failure.error.kind == Kind::Busy => failure,
                Err(failure) => return Err(failure.error),
            };
            self.transfer.check()?;
            // The connection can fail after the registry has received everything.
            if self.client.has_blob(digest, *size)? {
                bytes.fetch_add(size - before, Ordering::Relaxed);
                return Ok(Done::Sent);
            }
            attempt += 1;
            if attempt >= ATTEMPTS {
                let what = format!("cannot upload the blob {digest}: {}", failed.error);
                return Err(
                    Error::failed(what).hint("try again: complete blobs are not sent again")
                );
            }
            log::info!("{}", failed.error);
            let wait = failed.requested.unwrap_or_else(|| delay(attempt));
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
                attempt = 0;
            }
        }
    }

    /// Requests a new upload, or that the registry mounts the blob of another repository.
    fn start(&self, from: Option<&str>) -> Result<Started> {
        let path = match from {
            None => "blobs/uploads/".to_owned(),
            Some(from) => {
                let fields = [("mount", self.blob.digest.as_str()), ("from", from)];
                format!("blobs/uploads/?{}", encoded(&fields))
            }
        };
        let call = Call {
            content: Content::Bytes(&[]),
            ..self.client.call(Method::POST, &path)
        };
        let url = call.url.clone();
        let response = self.client.send(&call)?;
        match response.status().as_u16() {
            201 => Ok(Started::Mounted),
            202 => Ok(Started::Session(Session {
                location: self.location(&url, &response)?,
                offset: 0,
            })),
            // The other repository may not be readable.
            _ if from.is_some() => self.start(None),
            _ => Err(self.client.refusal("cannot upload", response)),
        }
    }

    /// Sends the rest of the blob, and completes it. An error that may pass has the kind [`Kind::Busy`].
    fn send(&self, session: &mut Session) -> std::result::Result<(), Failure> {
        let LayoutBlob { digest, size, path } = self.blob;
        let is_resumed = session.offset > 0;
        if session.offset < *size {
            let mut headers = vec![(header::CONTENT_TYPE, "application/octet-stream".to_owned())];
            if is_resumed {
                // Not for a whole blob: with a range, it is a chunk, and some registries limit the size of these.
                let range = format!("{}-{}", session.offset, size - 1);
                headers.push((header::CONTENT_RANGE, range));
            }
            let call = Call {
                method: Method::PATCH,
                url: session.location.clone(),
                headers,
                content: Content::File(path, session.offset, self.transfer),
            };
            let response = self.checked("cannot upload a layer", &call, is_resumed)?;
            session.location = self.location(&call.url, &response)?;
        }
        let separator = if session.location.contains('?') {
            '&'
        } else {
            '?'
        };
        let query = encoded(&[("digest", digest.as_str())]);
        let call = Call {
            method: Method::PUT,
            url: format!("{}{separator}{query}", session.location),
            headers: vec![(header::CONTENT_TYPE, "application/octet-stream".to_owned())],
            content: Content::Bytes(&[]),
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
            404 | 408 | 429 | 500..=599 => {
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
        let call = Call {
            method: Method::GET,
            url: session.location.clone(),
            headers: Vec::new(),
            content: Content::None,
        };
        let response = self.client.send(&call)?;
        if response.status().as_u16() != 204 {
            return Ok(None);
        }
        let range = answer::text(response.headers(), header::RANGE.as_str());
        let last = range.and_then(|range| range.rsplit('-').next()?.parse::<u64>().ok());
        Ok(match last {
            // The end is included, so that 0 means one byte or none.
            Some(last) if last > 0 && last < self.blob.size => Some(Session {
                location: self.location(&call.url, &response)?,
                offset: last + 1,
            }),
            Some(_) | None => None,
        })
    }

    /// Returns the URL of the upload in an answer.
    fn location(&self, url: &str, response: &Response<Body>) -> Result<String> {
        let location = answer::text(response.headers(), header::LOCATION.as_str());
        match location {
            Some(location) => self.client.connection().resolve(url, location),
            None => {
                let registry = self.client.registry();
                let what = format!("{registry} did not send the location of an upload");
                Err(Error::failed(what))
            }
        }
    }
}
