//! Writes states as a container image in the OCI image layout.
//!
//! The first state becomes one layer, and the difference to each further state another one.
//!
//! The few JSON files of an image are written without a library, because the crates that implement the complete standard
//! are larger than this module's parent.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::view::View;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::changeset;
use super::checksum::hex;
use super::compress::{Compression, Encoder};
use super::image_source::{
    Digest, FULL_NAME, HistoryEntry, Platform, REF_NAME, SNAPSHOT, SnapshotNote, VerifiedBlob,
};
use super::report::TransferReport;
use super::writer::cannot_write;
use crate::tree::error::{ErrorKind, OnProgress, Progress, Result, TreeError};

/// A state that becomes a layer of the image: its difference to the state before.
#[derive(Debug)]
pub struct ImageStep<S> {
    /// The state, from which its merged tree can be opened.
    pub state: S,
    /// The blob that the state was unpacked from, if it was retained.
    pub kept: Option<KeptBlob>,
    /// The digest of the uncompressed layer that the state was unpacked from.
    pub unpacked_from: Option<Digest>,
    /// The snapshot with this state.
    pub snapshot: Option<SnapshotNote>,
}

/// An image in a directory.
#[derive(Clone, Debug)]
pub struct LayoutImage {
    /// The manifest.
    pub manifest: LayoutBlob,
    /// Its media type.
    pub media_type: &'static str,
    /// The layers, each once, and the config.
    pub blobs: Vec<LayoutBlob>,
    /// The digests of the uncompressed layers, from the bottom.
    pub diff_ids: Vec<Digest>,
    /// The digest of the uncompressed layer that each was unpacked from: another program writes the same changes in
    /// another way.
    pub origins: Vec<Option<Digest>>,
}

impl LayoutImage {
    /// Returns whether these are the digests of the lowest layers of the image.
    pub fn begins_with(&self, diff_ids: &[Digest]) -> bool {
        let own = || self.diff_ids.iter().zip(&self.origins);
        diff_ids.len() <= own().count()
            && own()
                .zip(diff_ids)
                .all(|((id, origin), wanted)| id == wanted || origin.as_ref() == Some(wanted))
    }
}

/// A blob in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutBlob {
    /// The digest.
    pub digest: Digest,
    /// The size in bytes.
    pub size: u64,
    /// The file.
    pub path: PathBuf,
}

/// The blob of a layer that was imported from an image.
#[derive(Clone, Debug)]
pub struct KeptBlob {
    /// The file.
    pub path: PathBuf,
    /// The digest of the uncompressed layer.
    pub diff_id: Digest,
    /// The digest of the blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

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

/// The compression of the layers of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayerCompression {
    /// gzip, which every program reads.
    #[default]
    Gzip,
    /// Zstandard.
    Zstd,
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Fills the empty directory `target` with an image of the last state. The same states result in the same image.
///
/// Opens the merged trees of at most two states at a time with `open`: each has a descriptor for every layer. The caller
/// must sync the directory.
pub fn fill<S, E: From<TreeError>>(
    (steps, open): (&[ImageStep<S>], impl Fn(&S) -> std::result::Result<View, E>),
    description: &ImageDescription,
    compression: LayerCompression,
    target: &Path,
    progress: OnProgress<'_>,
) -> std::result::Result<(TransferReport, LayoutImage), E> {
    let blobs = target.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(|error| write_error(error, &blobs))?;
    let mut all = TransferReport::default();
    let (mut layers, mut sums) = (Vec::new(), Vec::new());
    let mut old: Option<&S> = None;
    for step in steps {
        let before = all.done;
        let mut progress = |done: Progress| progress(done.after(before));
        let (mut layer, sum, done) = match &step.kept {
            Some(kept) => copy_layer(kept, &blobs, &mut progress)?,
            None => {
                let old = old.map(&open).transpose()?;
                let new = open(&step.state)?;
                write_layer(old.as_ref(), &new, compression, &blobs, &mut progress)?
            }
        };
        let note = step.snapshot.as_ref().and_then(SnapshotNote::encode);
        if let (Some(layer), Some(note)) = (layer.as_object_mut(), note) {
            layer.insert("annotations".to_owned(), json!({ SNAPSHOT: note }));
        }
        layers.push(layer);
        sums.push(sum);
        all.done.entries += done.done.entries;
        all.done.bytes += done.done.bytes;
        all.notes.append(done.notes);
        old = Some(&step.state);
    }
    let config = config_json(description, &sums)?;
    let config = write_blob(&blobs, "application/vnd.oci.image.config.v1+json", &config)?;
    let mut parts: Vec<LayoutBlob> = Vec::new();
    for value in layers.iter().chain([&config]) {
        let blob = blob_of(value, &blobs)?;
        if !parts.contains(&blob) {
            parts.push(blob);
        }
    }
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config,
        "layers": layers,
    });
    let mut descriptor = write_blob(&blobs, MANIFEST, &manifest)?;
    let image = LayoutImage {
        manifest: blob_of(&descriptor, &blobs)?,
        media_type: MANIFEST,
        blobs: parts,
        diff_ids: sums,
        origins: steps
            .iter()
            .map(|step| step.unpacked_from.clone())
            .collect(),
    };
    if let Some(descriptor) = descriptor.as_object_mut() {
        let annotations = json!({ REF_NAME: description.tag, FULL_NAME: description.name });
        descriptor.insert("annotations".to_owned(), annotations);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [descriptor],
    });
    write_file(&target.join("index.json"), index.to_string().as_bytes())?;
    let version = json!({ "imageLayoutVersion": "1.0.0" });
    write_file(&target.join("oci-layout"), version.to_string().as_bytes())?;
    Ok((all, image))
}

/// Returns the blob that a descriptor refers to.
fn blob_of(descriptor: &Value, blobs: &Path) -> Result<LayoutBlob> {
    let digest = descriptor.get("digest").and_then(Value::as_str);
    let digest = Digest::try_from(digest.unwrap_or_default().to_owned());
    let size = descriptor.get("size").and_then(Value::as_u64);
    match (digest, size) {
        (Ok(digest), Some(size)) => Ok(LayoutBlob {
            path: blobs.join(digest.hex()),
            digest,
            size,
        }),
        _ => Err(TreeError::new(
            ErrorKind::Io,
            "cannot describe a blob of the image",
        )),
    }
}

/// Returns the digest of the uncompressed layer that [`fill`] writes for the difference of two states.
pub fn diff_id(old: Option<&View>, new: &View, progress: OnProgress<'_>) -> Result<Digest> {
    let mut plain = DigestWriter::new(io::sink());
    changeset::tar(old, new, &mut plain, Compression::None, progress)?;
    Ok(Digest::from_hex(&hex(plain.sum)))
}

fn config_json(description: &ImageDescription, diff_ids: &[Digest]) -> Result<Value> {
    let history = serde_json::to_value(&description.history).map_err(|error| {
        TreeError::new(ErrorKind::Io, "cannot write the history of the image").because(error)
    })?;
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

/// Writes a layer as a blob. Returns its descriptor, the digest of its uncompressed content, and the report.
fn write_layer(
    old: Option<&View>,
    new: &View,
    compression: LayerCompression,
    blobs: &Path,
    progress: OnProgress<'_>,
) -> Result<(Value, Digest, TransferReport)> {
    let (media_type, compression) = match compression {
        LayerCompression::Gzip => (TAR_GZIP, Compression::Gzip),
        LayerCompression::Zstd => (TAR_ZSTD, Compression::Zstd),
    };
    let temporary = blobs.join("unfinished");
    let file = File::create_new(&temporary).map_err(|error| write_error(error, &temporary))?;
    let packed = DigestWriter::new(file);
    let encoder = Encoder::new(packed, compression).map_err(cannot_write)?;
    let mut plain = DigestWriter::new(encoder);
    let done = changeset::tar(old, new, &mut plain, Compression::None, progress)?;
    let sum = Digest::from_hex(&hex(plain.sum));
    let packed = plain.output.finish().map_err(cannot_write)?;
    let (size, digest) = (packed.bytes, Digest::from_hex(&hex(packed.sum)));
    let path = blobs.join(digest.hex());
    std::fs::rename(&temporary, &path).map_err(|error| write_error(error, &path))?;
    Ok((descriptor(media_type, &digest, size), sum, done))
}

/// Copies the retained blob of a layer, and verifies it. Returns the same as [`write_layer`].
fn copy_layer(
    kept: &KeptBlob,
    blobs: &Path,
    progress: OnProgress<'_>,
) -> Result<(Value, Digest, TransferReport)> {
    let read_error = |error| {
        TreeError::io("cannot read the retained layer", error).at(kept.path.as_os_str().as_bytes())
    };
    let path = blobs.join(kept.digest.hex());
    let source = File::open(&kept.path).map_err(read_error)?;
    let mut source = VerifiedBlob::new(source, kept.size);
    let mut file = File::create(&path).map_err(|error| write_error(error, &path))?;
    io::copy(&mut source, &mut file).map_err(|error| write_error(error, &path))?;
    source.finish(&kept.digest)?;
    let mut report = TransferReport::default();
    report.done.bytes = kept.size;
    progress(report.done);
    // The types of Docker have the same meaning.
    let media_type = match kept.media_type.as_str() {
        zstd if zstd.ends_with("+zstd") => TAR_ZSTD,
        gzip if gzip.ends_with("gzip") => TAR_GZIP,
        _ => TAR,
    };
    let descriptor = descriptor(media_type, &kept.digest, kept.size);
    Ok((descriptor, kept.diff_id.clone(), report))
}

fn descriptor(media_type: &str, digest: &Digest, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": digest, "size": size })
}

/// Writes a JSON file as a blob, and returns its descriptor.
fn write_blob(blobs: &Path, media_type: &str, value: &Value) -> Result<Value> {
    let data = value.to_string();
    let digest = Digest::of(data.as_bytes());
    write_file(&blobs.join(digest.hex()), data.as_bytes())?;
    Ok(descriptor(media_type, &digest, data.len() as u64))
}

fn write_file(path: &Path, data: &[u8]) -> Result<()> {
    std::fs::write(path, data).map_err(|error| write_error(error, path))
}

fn write_error(error: io::Error, path: &Path) -> TreeError {
    TreeError::io("cannot write", error).at(path.as_os_str().as_bytes())
}

/// Writes an image in a directory as an uncompressed tar archive. Equal images result in equal archives.
pub fn pack(layout: &Path, output: &File) -> Result<()> {
    let failed = |error| TreeError::io("cannot pack the image", error);
    let blobs = "blobs/sha256";
    let listed = std::fs::read_dir(layout.join(blobs)).and_then(|entries| {
        let names = entries.map(|entry| Ok(entry?.file_name()));
        names.collect::<io::Result<Vec<_>>>()
    });
    let mut names = listed.map_err(failed)?;
    names.sort_unstable();
    let names = names.iter().map(|name| Path::new(blobs).join(name));
    let own = ["oci-layout", "index.json"].map(PathBuf::from);
    let mut archive = tar::Builder::new(io::BufWriter::new(output));
    for name in own.into_iter().chain(names) {
        let path = layout.join(&name);
        let mut append = || {
            let file = File::open(&path)?;
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            header.set_size(file.metadata()?.len());
            archive.append_data(&mut header, &name, file)
        };
        append().map_err(failed)?;
    }
    let written = archive.into_inner().and_then(|mut output| output.flush());
    written.map_err(failed)
}

/// A writer that counts the bytes that pass through it, and computes their digest.
struct DigestWriter<W> {
    output: W,
    sum: Sha256,
    bytes: u64,
}

impl<W> DigestWriter<W> {
    fn new(output: W) -> Self {
        Self {
            output,
            sum: Sha256::new(),
            bytes: 0,
        }
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.output.write(data)?;
        self.sum.update(data.get(..written).unwrap_or_default());
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}
