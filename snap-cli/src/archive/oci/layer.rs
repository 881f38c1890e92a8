//! The layers of an image as blobs.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use cowl_layers::view::View;
use sha2::{Digest as _, Sha256};

use crate::archive::changeset;
use crate::archive::compress::{Compression, Encoder};
use crate::archive::image_source::{Digest, VerifiedBlob};
use crate::archive::report::TransferReport;
use crate::archive::writer::cannot_write;
use crate::tree::error::{OnProgress, Result, TreeError};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// The compression of the layers of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LayerCompression {
    /// gzip, which every program reads.
    #[default]
    Gzip,
    /// Zstandard.
    Zstd,
}

impl LayerCompression {
    /// Returns the media type of a layer.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => TAR_GZIP,
            Self::Zstd => TAR_ZSTD,
        }
    }
}

/// A layer of an image: its blob, and the digest of its uncompressed content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedLayer {
    /// The media type of the blob.
    pub media_type: &'static str,
    /// The digest of the blob.
    pub digest: Digest,
    /// The size of the blob in bytes.
    pub size: u64,
    /// The digest of the uncompressed layer.
    pub diff_id: Digest,
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

impl KeptBlob {
    /// Returns the layer.
    pub fn layer(&self) -> PackedLayer {
        // The types of Docker have the same meaning.
        let media_type = match self.media_type.as_str() {
            zstd if zstd.ends_with("+zstd") => TAR_ZSTD,
            gzip if gzip.ends_with("gzip") => TAR_GZIP,
            _ => TAR,
        };
        PackedLayer {
            media_type,
            digest: self.digest.clone(),
            size: self.size,
            diff_id: self.diff_id.clone(),
        }
    }

    /// Copies the blob to `output`, and verifies it.
    pub fn copy(&self, mut output: impl Write) -> Result<()> {
        let at =
            |what: &str, error| TreeError::io(what, error).at(self.path.as_os_str().as_bytes());
        let source = File::open(&self.path);
        let source = source.map_err(|error| at("cannot read the retained layer", error))?;
        let mut source = VerifiedBlob::new(source, self.size);
        let copied = io::copy(&mut source, &mut output);
        copied.map_err(|error| at("cannot copy the retained layer", error))?;
        source.finish(&self.digest)
    }
}

/// Writes the difference of two states as the blob of a layer. Equal states result in equal blobs.
pub fn pack(
    (old, new): (Option<&View>, &View),
    compression: LayerCompression,
    output: impl Write,
    progress: OnProgress<'_>,
) -> Result<(PackedLayer, TransferReport)> {
    let encoding = match compression {
        LayerCompression::Gzip => Compression::Gzip,
        LayerCompression::Zstd => Compression::Zstd,
    };
    let packed = DigestWriter::new(output);
    let encoder = Encoder::new(packed, encoding).map_err(cannot_write)?;
    let mut plain = DigestWriter::new(encoder);
    let report = changeset::tar(old, new, &mut plain, Compression::None, progress)?;
    let diff_id = Digest::of_sum(plain.sum);
    let mut packed = plain.output.finish().map_err(cannot_write)?;
    packed.flush().map_err(cannot_write)?;
    let layer = PackedLayer {
        media_type: compression.media_type(),
        size: packed.bytes,
        digest: Digest::of_sum(packed.sum),
        diff_id,
    };
    Ok((layer, report))
}

/// Returns the digest of the uncompressed layer that [`pack`] writes for the difference of two states.
pub fn diff_id(old: Option<&View>, new: &View, progress: OnProgress<'_>) -> Result<Digest> {
    let mut plain = DigestWriter::new(io::sink());
    changeset::tar(old, new, &mut plain, Compression::None, progress)?;
    Ok(Digest::of_sum(plain.sum))
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
