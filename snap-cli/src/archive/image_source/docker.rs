//! Images in an archive of `docker save`, or in such an archive that was unpacked.

use std::io::Read;

use super::documents::{self, Saved};
use super::files::ImageFiles;
use super::layout::listed;
use super::platform::Platform;
use super::{Image, ImageLayer, ImageSource, LayerBlob, assemble, missing};
use crate::archive::limits;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// The file that lists the images.
pub(super) const MANIFEST: &str = "manifest.json";

/// An image of `docker save`.
#[derive(Debug)]
pub(super) struct SavedImage {
    pub(super) files: ImageFiles,
    /// The name of the image; `None` if there is only one.
    pub(super) name: Option<String>,
}

impl SavedImage {
    /// Returns whether the files are those of an image at all.
    pub(super) fn is_one(&self) -> bool {
        let list = self.files.read(MANIFEST, limits::IMAGE_MANIFEST);
        let Ok(Some(list)) = list else {
            return false;
        };
        documents::parse::<Vec<Saved>>(&list, MANIFEST).is_ok_and(|list| !list.is_empty())
    }

    fn select(&self) -> Result<Saved> {
        let list = self.files.read(MANIFEST, limits::IMAGE_MANIFEST)?;
        let list = list.ok_or_else(|| missing(MANIFEST))?;
        let mut images: Vec<Saved> = documents::parse(&list, MANIFEST)?;
        let names = |saved: &Saved| {
            let names = saved.repo_tags.iter().flatten();
            let short = names.filter(|name| name.len() <= limits::IMAGE_NAME);
            short.cloned().collect::<Vec<_>>()
        };
        let all: Vec<_> = images.iter().flat_map(names).collect();
        if let Some(name) = &self.name {
            images.retain(|image| names(image).iter().any(|own| is_same_name(own, name)));
        }
        if images.len() > 1 {
            let what = format!(
                "there are {} images here{}",
                images.len(),
                listed(": ", &all)
            );
            return Err(TreeError::new(ErrorKind::Refused, what)
                .hint("select one by its name: docker-archive:FILE:NAME:TAG"));
        }
        images.pop().ok_or_else(|| {
            let what = match &self.name {
                Some(name) => format!("there is no image {name} here{}", listed(", only ", &all)),
                None => "there is no image here".to_owned(),
            };
            TreeError::new(ErrorKind::NotFound, what)
        })
    }
}

/// Returns whether two names are the same, if `localhost/` and a missing tag are ignored.
fn is_same_name(own: &str, wanted: &str) -> bool {
    let own = own.strip_prefix("localhost/").unwrap_or(own);
    let wanted = wanted.strip_prefix("localhost/").unwrap_or(wanted);
    own == wanted || own.strip_suffix(":latest") == Some(wanted)
}

impl ImageSource for SavedImage {
    fn image(&self, platform: &Platform) -> Result<Image> {
        let saved = self.select()?;
        documents::check_layers(saved.layers.len())?;
        let config = self.files.read(&saved.config, limits::IMAGE_CONFIG)?;
        let config = config.ok_or_else(|| missing(&saved.config))?;
        let config = documents::parse(&config, "the config")?;
        let mut blobs = Vec::new();
        for name in saved.layers {
            let size = match self.files.open(&name)? {
                Some((size, _)) => size,
                None => return Err(missing(&name)),
            };
            blobs.push((LayerBlob::File(name), size, None));
        }
        let name = saved.repo_tags.unwrap_or_default().into_iter().next();
        assemble(config, blobs, (name, None), platform)
    }

    fn layer<'s>(&'s self, layer: &ImageLayer) -> Result<Box<dyn Read + 's>> {
        let name = match &layer.blob {
            LayerBlob::File(name) => name.clone(),
            LayerBlob::Digest(digest, _) => digest.to_string(),
        };
        match self.files.open(&name)? {
            Some((_, content)) => Ok(content),
            None => Err(missing(&name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_lack_the_host_and_the_tag() {
        for (own, wanted, same) in [
            ("localhost/app:1", "app:1", true),
            ("app:latest", "app", true),
            ("app:1", "app", false),
            ("docker.io/app:1", "app:1", false),
        ] {
            assert_eq!(is_same_name(own, wanted), same, "{own} {wanted}");
        }
    }
}
