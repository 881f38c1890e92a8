//! Writes states as a container image in the OCI image layout.
//!
//! The first state becomes one layer, and the difference to each further state another one.

mod documents;
mod layer;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::view::View;
use serde_json::json;

pub use self::documents::{Documents, ImageDescription, MANIFEST};
pub use self::layer::{KeptBlob, LayerCompression, PackedLayer, diff_id, pack as pack_layer};
use super::image_source::{Digest, FULL_NAME, REF_NAME, SnapshotNote};
use super::report::TransferReport;
use crate::tree::error::{OnProgress, Progress, Result, TreeError};

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
) -> std::result::Result<TransferReport, E> {
    let blobs = target.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(|error| write_error(error, &blobs))?;
    let mut all = TransferReport::default();
    let mut layers = Vec::new();
    let mut old: Option<&S> = None;
    for step in steps {
        let before = all.done;
        let mut progress = |done: Progress| progress(done.after(before));
        let unfinished = blobs.join("unfinished");
        let file = File::create_new(&unfinished);
        let file = file.map_err(|error| write_error(error, &unfinished))?;
        let (layer, done) = match &step.kept {
            Some(kept) => {
                kept.copy(file)?;
                let mut report = TransferReport::default();
                report.done.bytes = kept.size;
                progress(report.done);
                (kept.layer(), report)
            }
            None => {
                let old = old.map(&open).transpose()?;
                let new = open(&step.state)?;
                pack_layer((old.as_ref(), &new), compression, file, &mut progress)?
            }
        };
        let path = blobs.join(layer.digest.hex());
        std::fs::rename(&unfinished, &path).map_err(|error| write_error(error, &path))?;
        layers.push((layer, step.snapshot.as_ref()));
        all.done.entries += done.done.entries;
        all.done.bytes += done.done.bytes;
        all.notes.append(done.notes);
        old = Some(&step.state);
    }
    let documents = Documents::new(description, &layers)?;
    for data in [&documents.config, &documents.manifest] {
        write_file(&blobs.join(Digest::of(data).hex()), data)?;
    }
    let manifest = &documents.manifest;
    let size = manifest.len() as u64;
    let mut descriptor = documents::descriptor(MANIFEST, &Digest::of(manifest), size);
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
    Ok(all)
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
