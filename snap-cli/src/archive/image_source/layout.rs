//! Images that consist of blobs with digests: the OCI image layout.

use std::collections::HashSet;
use std::io::Read;
use std::rc::Rc;

use super::digest::Digest;
use super::documents::{self, Descriptor, Index, Names};
use super::files::ImageFiles;
use super::platform::Platform;
use super::verified::VerifiedBlob;
use super::{Image, ImageLayer, ImageSource, LayerBlob, SnapshotNote, assemble, missing};
use crate::archive::limits;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// The annotation with the tag of an image.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The annotation with the complete name of an image.
pub(crate) const FULL_NAME: &str = "io.containerd.image.name";

/// A store of blobs: a directory, an archive or a registry.
pub trait Blobs: std::fmt::Debug {
    /// Returns the index that lists the images.
    fn index(&self) -> Result<Vec<u8>>;

    /// Opens the manifest or the index with this digest. A registry has them apart from other blobs.
    fn manifest<'s>(&'s self, digest: &Digest) -> Result<(u64, Box<dyn Read + 's>)> {
        self.blob(digest)
    }

    /// Opens the blob with this digest, which is not verified, and returns its size.
    fn blob<'s>(&'s self, digest: &Digest) -> Result<(u64, Box<dyn Read + 's>)>;
}

/// An OCI image layout in files.
#[derive(Debug)]
pub(super) struct LayoutFiles(pub(super) ImageFiles);

impl Blobs for LayoutFiles {
    fn index(&self) -> Result<Vec<u8>> {
        // The version of the layout has been 1.0.0 since the first release of the specification.
        let found = self.0.read("index.json", limits::IMAGE_MANIFEST)?;
        found.ok_or_else(|| missing("index.json"))
    }

    fn blob<'s>(&'s self, digest: &Digest) -> Result<(u64, Box<dyn Read + 's>)> {
        let name = format!("blobs/sha256/{}", digest.hex());
        self.0.open(&name)?.ok_or_else(|| missing(&name))
    }
}

/// An image of an OCI image layout.
#[derive(Debug)]
pub struct OciImage<B> {
    blobs: B,
    /// The tag or the name of the image; `None` if there is only one.
    tag: Option<String>,
}

impl<B> OciImage<B> {
    /// Creates an image in a store of blobs: the one with a tag or a name, or the only one.
    pub fn new(blobs: B, tag: Option<String>) -> Self {
        Self { blobs, tag }
    }

    /// Returns the store of blobs.
    pub fn blobs(&self) -> &B {
        &self.blobs
    }
}

/// The media type of an index.
pub(crate) const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// The media type of a manifest.
pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

const INDEX_TYPES: [&str; 2] = [
    INDEX_TYPE,
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

const MANIFEST_TYPES: [&str; 2] = [
    MANIFEST_TYPE,
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// The media types of documents that select or describe an image.
pub(crate) const MANIFEST_MEDIA_TYPES: [&str; 4] = [
    MANIFEST_TYPES[0],
    MANIFEST_TYPES[1],
    INDEX_TYPES[0],
    INDEX_TYPES[1],
];

/// The media types of layers. The compression is recognized by the content.
const LAYER_TYPES: [&str; 8] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

impl<B: Blobs> OciImage<B> {
    /// Reads and verifies a manifest or an index.
    fn manifest_document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let open = |digest: &Digest| self.blobs.manifest(digest);
        Self::document(descriptor, limits::IMAGE_MANIFEST, open)
    }

    /// Reads and verifies a blob that is a document.
    fn document<'b>(
        descriptor: &Descriptor,
        limit: u64,
        open: impl FnOnce(&Digest) -> Result<(u64, Box<dyn Read + 'b>)>,
    ) -> Result<Vec<u8>> {
        let digest = &descriptor.digest;
        let what = "a document of the image";
        limits::check_size(descriptor.size, limit, what, digest.as_str().as_bytes())?;
        let (_, content) = open(digest)?;
        let mut verified = VerifiedBlob::new(content, descriptor.size);
        let mut data = Vec::new();
        let read = verified.read_to_end(&mut data);
        read.map_err(|error| TreeError::io(format!("cannot read the blob {digest}"), error))?;
        verified.finish(digest)?;
        Ok(data)
    }

    /// Returns the manifests of the index that have the tag, each once.
    fn tagged(&self, index: Index) -> Result<Vec<Descriptor>> {
        let Some(tag) = &self.tag else {
            let mut seen = HashSet::new();
            let mut all = index.manifests;
            all.retain(|one| seen.insert(one.digest.clone()));
            return Ok(all);
        };
        let names: Vec<_> = index.manifests.iter().flat_map(names_of).collect();
        let found = index.manifests.into_iter();
        let found: Vec<_> = found
            .filter(|one| names_of(one).iter().any(|name| is_name(name, tag)))
            .collect();
        match found.is_empty() {
            false => Ok(found),
            true => Err(TreeError::new(
                ErrorKind::NotFound,
                format!("there is no image {tag} here{}", listed(", only ", &names)),
            )),
        }
    }

    /// Returns the manifest for a platform. An index may contain others.
    fn select(&self, wanted: &Platform) -> Result<Descriptor> {
        let index = documents::index(&self.blobs.index()?)?;
        let names: Vec<_> = index.manifests.iter().flat_map(names_of).collect();
        let tagged = self.tagged(index)?;
        let mut candidates: Vec<(Descriptor, Option<Rc<Names>>)> =
            tagged.into_iter().map(|one| (one, None)).collect();
        let (mut manifests, mut others, mut indexes) = (Vec::new(), Vec::new(), 0);
        while let Some((one, inherited)) = candidates.pop() {
            if let Some(platform) = &one.platform
                && !platform.is_selected_by(wanted)
            {
                others.push(platform.to_string());
                continue;
            }
            if MANIFEST_TYPES.contains(&one.media_type.as_str()) {
                manifests.push((one, inherited));
                continue;
            }
            if !INDEX_TYPES.contains(&one.media_type.as_str()) {
                // An artifact that is not an image.
                continue;
            }
            indexes += 1;
            if indexes > limits::IMAGE_INDEXES {
                return Err(limits::exceeded("the image has too many indexes", b"")
                    .hint("select one by its tag: oci:DIR:TAG or oci-archive:FILE:TAG"));
            }
            let inner = documents::index(&self.manifest_document(&one)?)?;
            // The images of an index have its name. They share it: there may be tens of thousands.
            let inherited = one.annotations.map(Rc::new).or(inherited);
            let inner = inner.manifests.into_iter();
            candidates.extend(inner.map(|inner| (inner, inherited.clone())));
        }
        let digests: HashSet<_> = manifests
            .iter()
            .map(|(one, _)| one.digest.clone())
            .collect();
        if digests.len() > 1 {
            let what = format!(
                "there are {} images here{}",
                digests.len(),
                listed(": ", &names)
            );
            return Err(TreeError::new(ErrorKind::Refused, what)
                .hint("select one by its tag, oci:DIR:TAG or oci-archive:FILE:TAG, or by its variant: --platform OS/ARCH/VARIANT"));
        }
        let selected = manifests.pop().map(|(mut one, inherited)| {
            let own = one.annotations.get_or_insert_default();
            own.inherit(inherited.as_deref());
            one
        });
        selected.ok_or_else(|| {
            others.sort_unstable();
            others.dedup();
            others.truncate(SHOWN);
            let what = match others.is_empty() {
                true => "there is no image here".to_owned(),
                false => format!("no image is for {wanted}, only for {}", others.join(", ")),
            };
            let error = TreeError::new(ErrorKind::NotFound, what);
            match others.is_empty() {
                true => error,
                false => error.hint("select another platform: --platform"),
            }
        })
    }
}

impl<B: Blobs> ImageSource for OciImage<B> {
    fn image(&self, platform: &Platform) -> Result<Image> {
        let descriptor = self.select(platform)?;
        let manifest = documents::manifest(&self.manifest_document(&descriptor)?)?;
        let open = |digest: &Digest| self.blobs.blob(digest);
        let config = Self::document(&manifest.config, limits::IMAGE_CONFIG, open)?;
        let config = documents::parse(&config, "the config")?;
        let mut blobs = Vec::new();
        for layer in manifest.layers {
            if !LAYER_TYPES.contains(&layer.media_type.as_str()) {
                let what = format!("a layer has the unknown media type {}", layer.media_type);
                return Err(TreeError::new(ErrorKind::Refused, what));
            }
            let note = layer.annotations.and_then(|notes| notes.snapshot);
            blobs.push((
                LayerBlob::Digest(layer.digest, layer.media_type),
                layer.size,
                note.and_then(|note| SnapshotNote::parse(&note)),
            ));
        }
        let names = names_of(&descriptor);
        let name = names.last().cloned();
        assemble(config, blobs, (name, Some(descriptor.digest)), platform)
    }

    fn layer<'s>(&'s self, layer: &ImageLayer) -> Result<Box<dyn Read + 's>> {
        match &layer.blob {
            LayerBlob::Digest(digest, _) => Ok(self.blobs.blob(digest)?.1),
            LayerBlob::File(name) => Err(missing(name)),
        }
    }
}

/// Returns the tag and the full name of an image, the latter last.
fn names_of(descriptor: &Descriptor) -> Vec<String> {
    let names = descriptor.annotations.as_ref();
    names.map(Names::listed).unwrap_or_default()
}

/// Returns whether an image with this name or tag is the one with the given tag or name.
fn is_name(name: &str, tag: &str) -> bool {
    let is_tag_of = |rest: &str| rest.ends_with(':') && !tag.contains([':', '/']);
    name == tag || name.strip_suffix(tag).is_some_and(is_tag_of)
}

/// The number of names in a message.
const SHOWN: usize = 10;

/// Returns the end of a message: these words, and the names that exist.
pub(super) fn listed(words: &str, names: &[String]) -> String {
    let mut names = names.to_vec();
    names.sort_unstable();
    names.dedup();
    let more = names.len().saturating_sub(SHOWN);
    names.truncate(SHOWN);
    match (names.is_empty(), more) {
        (true, _) => String::new(),
        (false, 0) => format!("{words}{}", names.join(", ")),
        (false, more) => format!("{words}{} and {more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_tag_and_by_name() {
        for (name, tag, found) in [
            ("1.0", "1.0", true),
            ("docker.io/library/app:1.0", "1.0", true),
            (
                "docker.io/library/app:1.0",
                "docker.io/library/app:1.0",
                true,
            ),
            ("docker.io/library/app:1.0", ".0", false),
            ("docker.io/library/app:1.0", "app:1.0", false),
            ("1.0", "2.0", false),
        ] {
            assert_eq!(is_name(name, tag), found, "{name} {tag}");
        }
    }
}
