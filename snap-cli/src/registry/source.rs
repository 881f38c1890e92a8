//! An image in a registry as a source of images.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;

use super::client::{Client, transfer_dir};
use super::downloads::{self, Download};
use super::manifests::Document;
use super::parallel;
use super::reference::RegistryRef;
use crate::archive::image_source::layout::{Blobs, OciImage};
use crate::archive::image_source::{
    CONFIG_LIMIT, Digest, FULL_NAME, INDEX_TYPE, Image, ImageLayer, ImageSource, LayerBlob,
    MANIFEST_MEDIA_TYPES, MANIFEST_TYPE, Platform, REF_NAME,
};
use crate::error::{Error, Result};
use crate::tree::error::{OnProgress, Result as TreeResult, TreeError};

/// The image that a reference selects.
#[derive(Debug)]
pub struct RegistryImage {
    image: OciImage<RegistryBlobs>,
}

/// The amount of data that was downloaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downloaded {
    /// The number of layers.
    pub layers: u64,
    /// The number of bytes in them.
    pub bytes: u64,
}

impl RegistryImage {
    /// Reads the manifest of an image. Layers will be downloaded to the directory `dir`, which is created when necessary.
    pub fn open(client: Client, reference: &RegistryRef, dir: &Path) -> Result<Self> {
        let named = reference
            .digest
            .as_ref()
            .map(Digest::as_str)
            .or(reference.tag());
        let top = client.manifest(named.unwrap_or_default())?;
        if let Some(digest) = &reference.digest
            && *digest != top.digest
        {
            return Err(Error::failed(format!(
                "the manifest {digest} from {} has another digest: {}",
                client.registry(),
                top.digest
            )));
        }
        let blobs = RegistryBlobs {
            client,
            name: reference.to_string(),
            tag: reference.tag().map(str::to_owned),
            top,
            dir: dir.to_owned(),
            files: Mutex::default(),
            layers: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        Ok(Self {
            image: OciImage::new(blobs, None),
        })
    }

    /// Returns the amount of data that was downloaded.
    pub fn downloaded(&self) -> Downloaded {
        let blobs = self.image.blobs();
        Downloaded {
            layers: blobs.layers.load(Ordering::Relaxed),
            bytes: blobs.bytes.load(Ordering::Relaxed),
        }
    }
}

impl ImageSource for RegistryImage {
    fn image(&self, platform: &Platform) -> TreeResult<Image> {
        self.image.image(platform)
    }

    fn layer<'s>(&'s self, layer: &ImageLayer) -> TreeResult<Box<dyn Read + 's>> {
        self.image.layer(layer)
    }

    fn prepare(&self, layers: &[&ImageLayer], progress: OnProgress<'_>) -> TreeResult<()> {
        let done = self.image.blobs().download(layers, progress);
        done.map_err(TreeError::from_error)
    }

    fn release(&self) {
        self.image.blobs().remove_files();
    }
}

/// The blobs of a repository.
#[derive(Debug)]
struct RegistryBlobs {
    client: Client,
    name: String,
    tag: Option<String>,
    /// The manifest or the index that the reference selects.
    top: Document,
    dir: PathBuf,
    files: Mutex<HashMap<Digest, Arc<Download>>>,
    layers: AtomicU64,
    bytes: AtomicU64,
}

impl RegistryBlobs {
    fn file(&self, digest: &Digest) -> Option<Arc<Download>> {
        let files = self.files.lock();
        files
            .unwrap_or_else(PoisonError::into_inner)
            .get(digest)
            .cloned()
    }

    /// Downloads layers, each once.
    fn download(&self, layers: &[&ImageLayer], progress: OnProgress<'_>) -> Result<()> {
        let mut missing: Vec<(&Digest, u64)> = Vec::new();
        for layer in layers {
            if let LayerBlob::Digest(digest, _) = &layer.blob
                && self.file(digest).is_none()
                && !missing.iter().any(|(known, _)| *known == digest)
            {
                missing.push((digest, layer.size));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let dir = transfer_dir(&self.dir)?;
        let total = missing
            .iter()
            .fold(0u64, |sum, (_, size)| sum.saturating_add(*size));
        refuse_full(&dir, &missing)?;
        let result =
            parallel::in_parallel(&missing, total, progress, |(digest, size), transfer| {
                let done = downloads::fetch(&self.client, &dir, (digest, *size), transfer)?;
                let files = self.files.lock();
                let mut files = files.unwrap_or_else(PoisonError::into_inner);
                self.layers
                    .fetch_add(u64::from(done.received > 0), Ordering::Relaxed);
                self.bytes.fetch_add(done.received, Ordering::Relaxed);
                files.insert((*digest).clone(), Arc::new(done));
                Ok(())
            });
        if result.as_ref().is_err_and(Error::is_no_space) {
            // The disk needs the space more than the next attempt needs the downloads.
            self.remove_files();
            for (digest, _) in &missing {
                downloads::remove_part(&dir, digest)?;
            }
        }
        result.map(drop)
    }

    fn remove_files(&self) {
        let files = self.files.lock();
        let mut files = files.unwrap_or_else(PoisonError::into_inner);
        for (_, download) in files.drain() {
            // A later collection removes it.
            if let Err(error) = download.remove() {
                log::warn!("{error}");
            }
        }
    }
}

/// Refuses a download that does not fit on the disk, before it fills the disk.
fn refuse_full(dir: &Path, missing: &[(&Digest, u64)]) -> Result<()> {
    let mut needed = 0u64;
    for (digest, size) in missing {
        let part = std::fs::symlink_metadata(dir.join(digest.hex()));
        // A file that is not there has no part.
        let part = part.map_or(0, |meta| meta.len());
        needed = needed.saturating_add(size.saturating_sub(part));
    }
    let space = rustix::fs::statvfs(dir)
        .map_err(|error| Error::at("query the free space of", dir, error))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    match needed <= free {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "cannot download the layers of the image: {needed} bytes are needed, and {free} are free"
        ))
        .hint("free space: cowl du; cowl prune NAME; cowl gc")
        .because(std::io::Error::from(rustix::io::Errno::NOSPC))),
    }
}

impl Blobs for RegistryBlobs {
    fn index(&self) -> TreeResult<Vec<u8>> {
        let Document { data, digest, .. } = &self.top;
        let media_type = media_type(&self.top);
        let mut names = json!({ FULL_NAME: self.name });
        if let (Some(names), Some(tag)) = (names.as_object_mut(), &self.tag) {
            names.insert(REF_NAME.to_owned(), tag.as_str().into());
        }
        let index = json!({ "manifests": [
            { "mediaType": media_type, "digest": digest, "size": data.len(), "annotations": names },
        ]});
        Ok(index.to_string().into_bytes())
    }

    fn manifest<'s>(&'s self, digest: &Digest) -> TreeResult<(u64, Box<dyn Read + 's>)> {
        if *digest == self.top.digest {
            let data = self.top.data.as_slice();
            return Ok((data.len() as u64, Box::new(data)));
        }
        let found = self.client.manifest(digest.as_str());
        let data = found.map_err(TreeError::from_error)?.data;
        Ok((data.len() as u64, Box::new(std::io::Cursor::new(data))))
    }

    fn blob<'s>(&'s self, digest: &Digest) -> TreeResult<(u64, Box<dyn Read + 's>)> {
        if let Some(download) = self.file(digest) {
            return Ok((
                download.size,
                Box::new(DownloadReader {
                    download,
                    offset: 0,
                }),
            ));
        }
        let found = self.client.small_blob(digest, CONFIG_LIMIT);
        let data = found.map_err(TreeError::from_error)?.data;
        Ok((data.len() as u64, Box::new(std::io::Cursor::new(data))))
    }
}

/// The fields of a document by which its media type is recognized.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
    #[serde(default)]
    layers: Option<IgnoredAny>,
}

/// Returns the media type of a document. If the registry reports a generic one, as file servers do, the one in the
/// document is used. In OCI documents it is optional, and the fields distinguish them.
fn media_type(document: &Document) -> String {
    let reported = document.media_type.to_ascii_lowercase();
    if MANIFEST_MEDIA_TYPES.contains(&reported.as_str()) {
        return reported;
    }
    let typed = match serde_json::from_slice::<Typed>(&document.data) {
        Ok(typed) => typed,
        Err(error) => {
            log::debug!("a document of the type {reported:?} has no media type: {error}");
            return reported;
        }
    };
    match typed {
        Typed {
            media_type: Some(own),
            ..
        } => own,
        // A document that is both is refused later.
        Typed {
            manifests: Some(_), ..
        } => INDEX_TYPE.to_owned(),
        Typed {
            layers: Some(_), ..
        } => MANIFEST_TYPE.to_owned(),
        Typed { .. } => reported,
    }
}

/// A reader that owns its blob.
struct DownloadReader {
    download: Arc<Download>,
    offset: u64,
}

impl Read for DownloadReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.download.read_at(buffer, self.offset)?;
        self.offset += got as u64;
        Ok(got)
    }
}
