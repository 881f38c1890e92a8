//! Downloads of blobs to files: several at a time, and continued after an interruption, also of an earlier command.
//!
//! A file is named by the digest of its blob, and locked while it is used. It is verified in whole, also the part that an
//! earlier command has downloaded. Garbage collection removes files that no command has used for a day.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};
use ureq::Body;
use ureq::http::{Method, Response, header};

use super::answer;
use super::client::Client;
use super::pace::PacedReader;
use super::parallel::Transfer;
use super::patience::{self, Patience};
use crate::archive::image_source::Digest;
use crate::error::{Error, Kind, Result};
use crate::store::disk;
use crate::store::lock::Lock;

/// The number of bytes after which a connection counts as useful: an interruption after fewer bytes is a failed attempt.
pub(super) const USEFUL: u64 = 1 << 20;

/// A complete and verified blob in a file, which is locked.
#[derive(Debug)]
pub(super) struct Download {
    file: File,
    /// The path; `None` if another command downloads the same blob, so that this file has no name.
    path: Option<PathBuf>,
    /// The size in bytes.
    pub(super) size: u64,
    /// The number of bytes that this command has received.
    pub(super) received: u64,
}

impl Download {
    /// Reads a part of the blob.
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        std::os::unix::fs::FileExt::read_at(&self.file, buffer, offset)
    }

    /// Removes the file.
    pub(super) fn remove(&self) -> Result<()> {
        self.path.as_deref().map_or(Ok(()), disk::remove_if_exists)
    }
}

/// Downloads a blob to a file in `dir`, and verifies it.
pub(super) fn fetch(
    client: &Client,
    dir: &Path,
    (digest, size): (&Digest, u64),
    transfer: &Transfer,
) -> Result<Download> {
    let (file, path) = open(dir, digest)?;
    let mut download = Download {
        file,
        path,
        size,
        received: 0,
    };
    match fill(client, &download, (digest, size), transfer) {
        Ok(received) => {
            download.received = received;
            Ok(download)
        }
        Err(error) => {
            // A wrong part cannot be continued, and a full disk needs the space.
            if error.kind == Kind::Damaged || error.is_no_space() {
                download.remove()?;
            }
            let kind = match error.kind {
                Kind::Damaged => Kind::Failed,
                other => other,
            };
            Err(Error { kind, ..error })
        }
    }
}

/// Removes an interrupted download, unless another command uses it.
pub(super) fn remove_part(dir: &Path, digest: &Digest) -> Result<()> {
    let path = dir.join(digest.hex());
    match disk::exists(&path)? && !Lock::is_used(&path)? {
        true => disk::remove_if_exists(&path),
        false => Ok(()),
    }
}

/// Opens and locks the file of a blob. If another command has locked it, creates a file without a name.
fn open(dir: &Path, digest: &Digest) -> Result<(File, Option<PathBuf>)> {
    let path = dir.join(digest.hex());
    let at = |error| Error::at("write", &path, error);
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options
            .mode(0o600)
            .custom_flags(disk::NO_LINK)
            .open(&path)
            .map_err(at)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                log::info!("another command downloads {digest}, too");
                return Ok((tempfile::tempfile_in(dir).map_err(at)?, None));
            }
            Err(error) => return Err(at(error.into())),
        }
        // A race: the other command may have removed the file before this one locked it.
        let own = file.metadata().map_err(at)?;
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.ino() == own.ino() && found.dev() == own.dev() => {
                return Ok((file, Some(path)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(error)),
        }
    }
}

/// A blob that is being downloaded.
struct Partial<'f> {
    file: &'f File,
    sum: Sha256,
    have: u64,
    size: u64,
    received: u64,
}

/// The result of one connection.
enum Attempt {
    /// The blob is complete.
    Complete,
    /// The connection ended before, or the registry requests another attempt, after this time.
    Interrupted(Error, Option<Duration>),
}

fn fill(
    client: &Client,
    download: &Download,
    (digest, size): (&Digest, u64),
    transfer: &Transfer,
) -> Result<u64> {
    let failed = |error| Error::failed(format!("cannot store the blob {digest}")).because(error);
    let mut partial = Partial::resume(&download.file, size).map_err(failed)?;
    let inherited = partial.have;
    transfer.bytes.fetch_add(partial.have, Ordering::Relaxed);
    complete(&mut partial, client, digest, transfer)?;
    let mut found = Digest::of_sum(partial.sum.clone());
    if found != *digest && inherited > 0 {
        // Another registry, or a power cut, may have left a wrong part.
        log::warn!("an earlier download of the blob {digest} was wrong; downloading it again");
        transfer.bytes.fetch_sub(partial.have, Ordering::Relaxed);
        partial.restart().map_err(failed)?;
        complete(&mut partial, client, digest, transfer)?;
        found = Digest::of_sum(partial.sum.clone());
    }
    match found == *digest {
        true => Ok(partial.received),
        false => Err(Error::damaged(format!(
            "the blob {digest} from {} has another digest: {found}",
            client.registry()
        ))),
    }
}

/// Receives the rest of a blob, with several connections if necessary.
fn complete(
    partial: &mut Partial<'_>,
    client: &Client,
    digest: &Digest,
    transfer: &Transfer,
) -> Result<()> {
    let size = partial.size;
    let (mut patience, mut best) = (Patience::new(), partial.have);
    while partial.have < size {
        match partial.receive(client, digest, transfer)? {
            Attempt::Complete => break,
            Attempt::Interrupted(error, requested) => {
                // Compared with the longest part so far: a registry may make the download begin again.
                if partial.have >= best.saturating_add(USEFUL) {
                    best = partial.have;
                    patience.renew();
                }
                let Some(wait) = patience.next_wait(requested) else {
                    let what = format!("cannot download the blob {digest}: {error}");
                    return Err(Error::failed(what)
                        .hint("try again: the download continues where it was interrupted"));
                };
                patience::report(&error, wait);
                transfer.wait(wait)?;
            }
        }
    }
    Ok(())
}

impl<'f> Partial<'f> {
    /// Reads the part that exists, as it is a part of the digest.
    fn resume(mut file: &'f File, size: u64) -> std::io::Result<Self> {
        let mut partial = Self {
            file,
            sum: Sha256::new(),
            have: 0,
            size,
            received: 0,
        };
        if file.metadata()?.len() > size {
            partial.restart()?;
        }
        file.seek(SeekFrom::Start(0))?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let got = file.read(&mut buffer)?;
            let part = buffer.get(..got).unwrap_or_default();
            if part.is_empty() {
                return Ok(partial);
            }
            partial.sum.update(part);
            partial.have += got as u64;
        }
    }

    fn restart(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.sum = Sha256::new();
        self.have = 0;
        Ok(())
    }

    /// Requests the rest, and appends it.
    fn receive(
        &mut self,
        client: &Client,
        digest: &Digest,
        transfer: &Transfer,
    ) -> Result<Attempt> {
        let failed =
            |error| Error::failed(format!("cannot store the blob {digest}")).because(error);
        let mut call = client.call(Method::GET, &format!("blobs/{digest}"));
        call.blob_size = self.size;
        if self.have > 0 {
            call.headers = vec![(header::RANGE, format!("bytes={}-", self.have))];
        }
        let response = match client.send_once(&call) {
            Ok(response) => response,
            Err(error) if error.kind == Kind::Busy => return Ok(Attempt::Interrupted(error, None)),
            Err(error) => return Err(error),
        };
        match response.status().as_u16() {
            206 if self.have > 0 && starts_at(&response, self.have) => {}
            // The registry ignores the range.
            200 => {
                transfer.bytes.fetch_sub(self.have, Ordering::Relaxed);
                self.restart().map_err(failed)?;
            }
            206 | 416 if self.have > 0 => {
                transfer.bytes.fetch_sub(self.have, Ordering::Relaxed);
                self.restart().map_err(failed)?;
                let what = format!("{} does not continue downloads", client.registry());
                return Ok(Attempt::Interrupted(Error::failed(what), None));
            }
            _ if answer::is_temporary(response.status()) => {
                let requested = answer::retry_after(response.headers());
                let error = client.refusal(&format!("cannot read the blob {digest}"), response);
                return Ok(Attempt::Interrupted(error, requested));
            }
            _ => return Err(client.refusal(&format!("cannot read the blob {digest}"), response)),
        }
        let left = self.size - self.have;
        if let Some(length) = answer::content_length(response.headers())
            && length != left
        {
            let found = self.have.saturating_add(length);
            return Err(wrong_size(client, digest, found, self.size));
        }
        self.append(client, digest, response, transfer)
    }

    fn append(
        &mut self,
        client: &Client,
        digest: &Digest,
        response: Response<Body>,
        transfer: &Transfer,
    ) -> Result<Attempt> {
        // In chunks, the end of the body can be late, or never arrive.
        let ends_itself = answer::content_length(response.headers()).is_some()
            && !response.headers().contains_key(header::TRANSFER_ENCODING);
        let mut reader = PacedReader::new(response.into_body().into_reader());
        let mut buffer = vec![0; 1 << 16];
        loop {
            transfer.check()?;
            let got = match reader.read(&mut buffer) {
                Ok(0) if self.have == self.size => return Ok(Attempt::Complete),
                Ok(0) => {
                    let what = format!("{} has cut the connection", client.registry());
                    return Ok(Attempt::Interrupted(Error::failed(what), None));
                }
                Ok(got) => got,
                Err(error) => {
                    let what = format!("the connection to {} was interrupted", client.registry());
                    let error = Error::failed(what).because(error);
                    return Ok(Attempt::Interrupted(error, None));
                }
            };
            let have = self.have + got as u64;
            if have > self.size {
                return Err(wrong_size(client, digest, have, self.size));
            }
            let part = buffer.get(..got).unwrap_or_default();
            let written = self.file.write_all(part);
            written.map_err(|error| {
                Error::failed(format!("cannot store the blob {digest}")).because(error)
            })?;
            self.sum.update(part);
            self.have = have;
            self.received += got as u64;
            transfer.bytes.fetch_add(got as u64, Ordering::Relaxed);
            if self.have == self.size && !ends_itself {
                return Ok(Attempt::Complete);
            }
        }
    }
}

fn wrong_size(client: &Client, digest: &Digest, found: u64, size: u64) -> Error {
    Error::damaged(format!(
        "{} sends {found} or more bytes for the blob {digest}, which has {size} bytes in the manifest",
        client.registry()
    ))
}

/// Returns whether an answer begins at this offset.
fn starts_at(response: &Response<Body>, offset: u64) -> bool {
    let range = answer::text(response.headers(), header::CONTENT_RANGE.as_str());
    let first = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next());
    first.is_some_and(|first| first.parse() == Ok(offset))
}
