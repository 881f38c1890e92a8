//! Writes states as a container image in the OCI image layout.
//!
//! The first state becomes one layer, and the difference to each further state another one.
//!
//! The few JSON files of an image are written without a library, because the crates that implement the complete standard
//! are larger than this module's parent.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::view::View;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::changeset;
use super::checksum::hex;
use super::compress::{Compression, Encoder};
use super::report::TransferReport;
use super::writer::cannot_write;
use crate::tree::error::{OnProgress, Progress, Result, TreeError};

/// A state that becomes a layer of the image.
#[derive(Debug)]
pub struct ImageState {
    /// The merged tree of the state.
    pub view: View,
    /// The creation time (RFC 3339, UTC).
    pub created: String,
    /// The comment that the user attached.
    pub comment: String,
}

/// Fills the empty directory `target` with an image of the last state.
///
/// `name` becomes the reference name of the image. The caller must sync the directory.
pub fn fill(
    states: &[ImageState],
    name: &str,
    target: &Path,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    let blobs = target.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(|error| write_error(error, &blobs))?;
    let mut all = TransferReport::default();
    let (mut layers, mut sums, mut history) = (Vec::new(), Vec::new(), Vec::new());
    let mut old = None;
    for state in states {
        let before = all.done;
        let mut progress = |done: Progress| {
            progress(Progress {
                entries: before.entries + done.entries,
                bytes: before.bytes + done.bytes,
                total: None,
            });
        };
        let (layer, sum, done) = write_layer(old, &state.view, &blobs, &mut progress)?;
        layers.push(layer);
        sums.push(sum);
        history.push(json!({
            "created": state.created,
            "created_by": "cowl",
            "comment": state.comment,
        }));
        all.done.entries += done.done.entries;
        all.done.bytes += done.done.bytes;
        all.notes.append(done.notes);
        old = Some(&state.view);
    }
    let created = states.last().map(|state| state.created.as_str());
    let config = json!({
        "created": created,
        "architecture": architecture(),
        "os": "linux",
        "config": {},
        "rootfs": { "type": "layers", "diff_ids": sums },
        "history": history,
    });
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": write_blob(&blobs, "application/vnd.oci.image.config.v1+json", &config)?,
        "layers": layers,
    });
    let mut descriptor = write_blob(
        &blobs,
        "application/vnd.oci.image.manifest.v1+json",
        &manifest,
    )?;
    if let Some(descriptor) = descriptor.as_object_mut() {
        let annotations = json!({ "org.opencontainers.image.ref.name": name });
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
    Ok(all)
}

/// Writes a layer as a blob. Returns its descriptor, the digest of its uncompressed content, and the report.
fn write_layer(
    old: Option<&View>,
    new: &View,
    blobs: &Path,
    progress: OnProgress<'_>,
) -> Result<(Value, String, TransferReport)> {
    let temporary = blobs.join("unfinished");
    let file = File::create_new(&temporary).map_err(|error| write_error(error, &temporary))?;
    let packed = DigestWriter::new(file);
    let encoder = Encoder::new(packed, Compression::Gzip).map_err(cannot_write)?;
    let mut plain = DigestWriter::new(encoder);
    let done = changeset::tar(old, new, &mut plain, Compression::None, progress)?;
    let sum = format!("sha256:{}", hex(plain.sum));
    let packed = plain.output.finish().map_err(cannot_write)?;
    let (size, digest) = (packed.bytes, hex(packed.sum));
    let path = blobs.join(&digest);
    std::fs::rename(&temporary, &path).map_err(|error| write_error(error, &path))?;
    let descriptor = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": format!("sha256:{digest}"),
        "size": size,
    });
    Ok((descriptor, sum, done))
}

/// Writes a JSON file as a blob, and returns its descriptor.
fn write_blob(blobs: &Path, media_type: &str, value: &Value) -> Result<Value> {
    let data = value.to_string();
    let digest = hex(Sha256::new_with_prefix(data.as_bytes()));
    write_file(&blobs.join(&digest), data.as_bytes())?;
    Ok(json!({
        "mediaType": media_type,
        "digest": format!("sha256:{digest}"),
        "size": data.len(),
    }))
}

fn write_file(path: &Path, data: &[u8]) -> Result<()> {
    std::fs::write(path, data).map_err(|error| write_error(error, path))
}

fn write_error(error: io::Error, path: &Path) -> TreeError {
    TreeError::io("cannot write", error).at(path.as_os_str().as_bytes())
}

/// Returns the architecture of this machine in the terms of the image specification.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
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
