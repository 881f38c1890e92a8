//! Writing states as a container image: an OCI image layout, one layer for the first state and one for
//! what leads to each further one.
//!
//! The few JSON files that an image wants are written by hand here: the crates that know all of the
//! standard bring more code than this whole program's archives have.

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
use super::report::Report;
use super::writer::cannot_write;
use crate::tree::error::{OnProgress, Progress, Result, TreeError};

/// One state on the way to the last one.
#[derive(Debug)]
pub struct Step {
    /// What it shows.
    pub view: View,
    /// When it was taken (RFC 3339, UTC).
    pub created: String,
    /// What somebody said about it.
    pub comment: String,
}

/// Fills the empty folder `target` with an image of the last state; `name` is what it is called.
/// Making it durable is the caller's.
pub fn fill(steps: &[Step], name: &str, target: &Path, progress: OnProgress<'_>) -> Result<Report> {
    let blobs = target.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(|error| lost(error, &blobs))?;
    let mut all = Report::default();
    let (mut layers, mut sums, mut history) = (Vec::new(), Vec::new(), Vec::new());
    let mut old = None;
    for step in steps {
        let before = all.done;
        let mut progress = |done: Progress| {
            progress(Progress {
                entries: before.entries + done.entries,
                bytes: before.bytes + done.bytes,
                total: None,
            });
        };
        let (layer, sum, done) = layer(old, &step.view, &blobs, &mut progress)?;
        layers.push(layer);
        sums.push(sum);
        history.push(json!({
            "created": step.created,
            "created_by": "cowl",
            "comment": step.comment,
        }));
        all.done.entries += done.done.entries;
        all.done.bytes += done.done.bytes;
        all.notes.extend(done.notes);
        old = Some(&step.view);
    }
    let created = steps.last().map(|step| step.created.as_str());
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
        "config": blob(&blobs, "application/vnd.oci.image.config.v1+json", &config)?,
        "layers": layers,
    });
    let mut described = blob(
        &blobs,
        "application/vnd.oci.image.manifest.v1+json",
        &manifest,
    )?;
    if let Some(described) = described.as_object_mut() {
        let annotations = json!({ "org.opencontainers.image.ref.name": name });
        described.insert("annotations".to_owned(), annotations);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [described],
    });
    put(&target.join("index.json"), index.to_string().as_bytes())?;
    let version = json!({ "imageLayoutVersion": "1.0.0" });
    put(&target.join("oci-layout"), version.to_string().as_bytes())?;
    Ok(all)
}

/// Writes one layer under the name of its sum: its description, the sum of what is in it uncompressed,
/// and what was written.
fn layer(
    old: Option<&View>,
    new: &View,
    blobs: &Path,
    progress: OnProgress<'_>,
) -> Result<(Value, String, Report)> {
    let temporary = blobs.join("unfinished");
    let file = File::create_new(&temporary).map_err(|error| lost(error, &temporary))?;
    let packed = Summed::new(file);
    let encoder = Encoder::new(packed, Compression::Gzip).map_err(cannot_write)?;
    let mut plain = Summed::new(encoder);
    let done = changeset::tar(old, new, &mut plain, Compression::None, progress)?;
    let sum = format!("sha256:{}", hex(plain.sum));
    let packed = plain.output.finish().map_err(cannot_write)?;
    let (size, digest) = (packed.bytes, hex(packed.sum));
    let path = blobs.join(&digest);
    std::fs::rename(&temporary, &path).map_err(|error| lost(error, &path))?;
    let described = json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": format!("sha256:{digest}"),
        "size": size,
    });
    Ok((described, sum, done))
}

/// Writes a JSON file under the name of its sum, and describes it.
fn blob(blobs: &Path, media_type: &str, value: &Value) -> Result<Value> {
    let data = value.to_string();
    let digest = hex(Sha256::new_with_prefix(data.as_bytes()));
    put(&blobs.join(&digest), data.as_bytes())?;
    Ok(json!({
        "mediaType": media_type,
        "digest": format!("sha256:{digest}"),
        "size": data.len(),
    }))
}

fn put(path: &Path, data: &[u8]) -> Result<()> {
    std::fs::write(path, data).map_err(|error| lost(error, path))
}

fn lost(error: io::Error, path: &Path) -> TreeError {
    TreeError::io("can't write", error).at(path.as_os_str().as_bytes())
}

/// This machine's kind, in the words of images.
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

/// A writer that sums and counts what goes through it.
struct Summed<W> {
    output: W,
    sum: Sha256,
    bytes: u64,
}

impl<W> Summed<W> {
    fn new(output: W) -> Self {
        Self {
            output,
            sum: Sha256::new(),
            bytes: 0,
        }
    }
}

impl<W: Write> Write for Summed<W> {
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
