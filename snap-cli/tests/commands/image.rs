//! Images for tests, written without other programs.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Returns the digest of some bytes.
pub(crate) fn digest(data: &[u8]) -> String {
    let sum = Sha256::digest(data);
    let hex: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Returns a layer with these files and their content. A path with a slash at its end is a directory.
pub(crate) fn layer(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        let content = content.as_bytes();
        builder.append_data(&mut header, path, content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Returns a layer with an empty file that has an xattr.
pub(crate) fn layer_with_xattr(path: &str, name: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let key = format!("SCHILY.xattr.{name}");
    builder
        .append_pax_extensions([(key.as_str(), &b"1"[..])])
        .unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o644);
    header.set_size(0);
    builder.append_data(&mut header, path, &b""[..]).unwrap();
    builder.into_inner().unwrap()
}

/// Compresses a layer.
pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    // Another level than that of exports.
    let level = flate2::Compression::best();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// An OCI image layout.
pub(crate) struct Layout(pub(crate) PathBuf);

impl Layout {
    /// Creates a layout without images.
    pub(crate) fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let layout = Self(dir.to_owned());
        layout.write_index(&[]);
        layout
    }

    /// Returns the path of a blob.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.0.join("blobs/sha256").join(hex)
    }

    /// Adds a blob, and returns its descriptor.
    pub(crate) fn add(&self, media_type: &str, data: &[u8]) -> Value {
        let digest = digest(data);
        std::fs::write(self.blob(&digest), data).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": data.len() })
    }

    /// Adds an image with these layers, each compressed, and returns the descriptor of its manifest.
    pub(crate) fn image(&self, layers: &[Vec<u8>], config: &Value, architecture: &str) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| digest(layer)).collect();
        let history = (0..layers.len()).map(|at| {
            json!({ "created": format!("2020-01-0{}T00:00:00Z", at + 1), "created_by": format!("step {at}") })
        });
        let config = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "created": "2020-02-01T00:00:00Z",
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history.collect::<Vec<_>>(),
        });
        let config = config.to_string();
        let config = self.add(
            "application/vnd.oci.image.config.v1+json",
            config.as_bytes(),
        );
        let gzip_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        let layers = layers.iter().map(|layer| self.add(gzip_type, &gzip(layer)));
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config,
            "layers": layers.collect::<Vec<_>>(),
        });
        self.add(MANIFEST, manifest.to_string().as_bytes())
    }

    /// Writes the index with these descriptors.
    pub(crate) fn write_index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        std::fs::write(self.0.join("index.json"), index.to_string()).unwrap();
    }

    /// Creates a layout with one image for this machine.
    pub(crate) fn with(dir: &Path, layers: &[Vec<u8>], config: &Value) -> Self {
        let layout = Self::new(dir);
        let image = layout.image(layers, config, machine());
        layout.write_index(&[tagged(image, "1.0")]);
        layout
    }
}

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Adds a tag to a descriptor.
pub(crate) fn tagged(mut descriptor: Value, tag: &str) -> Value {
    descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    descriptor
}

pub(crate) use cowl_tests::rootfs::image_architecture as machine;
