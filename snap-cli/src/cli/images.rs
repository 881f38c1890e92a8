//! The options of commands that create containers from images.

use std::ffi::OsStr;
use std::path::Path;

use super::output;
use super::registry::RegistryArgs;
use crate::archive::image_source::{self, ImageSource, Platform, Reference};
use crate::error::{Error, Result};
use crate::lifecycle::image::{self, ImageOptions, Imported, LayerSnapshots};
use crate::lifecycle::update::{self, Current};
use crate::registry::{RegistryImage, RegistryRef};
use crate::store::Store;
use crate::store::image_layers::Blobs;
use crate::store::name::ContainerName;
use crate::tree::omissions::Unsupported;

/// The options for images.
#[derive(Debug, clap::Args)]
pub(super) struct ImageArgs {
    /// The platform of an image [default: linux and this machine's architecture]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    /// Take a snapshot for each layer of an image, named layer1, layer2 and so on
    #[arg(long)]
    layer_snapshots: bool,
    /// Keep the compressed layers of an image, so that `cowl export --oci` writes them unchanged
    #[arg(long)]
    keep_blobs: bool,
    #[command(flatten)]
    registry: RegistryArgs,
}

impl ImageArgs {
    /// Opens the image that `source` is; `None` if it is a root filesystem. With `force`, a path is never an image.
    ///
    /// A compressed archive is unpacked in the directory `temporary`. Layers of an image in a registry will be downloaded
    /// to the directory `transfers`.
    pub(super) fn open(
        &self,
        (temporary, transfers): (&Path, &Path),
        source: &OsStr,
        force: Force,
    ) -> Result<Option<Box<dyn ImageSource>>> {
        let opened = match (Reference::parse(source), force) {
            (Some(Reference::Unsupported(prefix)), _) => {
                return Err(image::unsupported_error(prefix));
            }
            (Some(Reference::Stored(..) | Reference::Registry(_)), Force::Yes) => {
                return Err(Error::usage(
                    "--force imports the files of an image, but this source is named as an image",
                )
                .hint("omit --force; an image in files may also be named by its path only"));
            }
            (Some(Reference::Stored(transport, path, name)), Force::No) => {
                Some(image_source::open(transport, &path, name, temporary)?)
            }
            (Some(Reference::Registry(name)), Force::No) => {
                let reference = RegistryRef::parse(&name)?;
                let image = self.registry.open(&reference, transfers)?;
                Some(Box::new(image) as Box<dyn ImageSource>)
            }
            (None, Force::No) if source != "-" => {
                image_source::recognize(Path::new(source), temporary)?
            }
            (None, _) => None,
        };
        let has_option = self.platform.is_some() || self.layer_snapshots || self.keep_blobs;
        match (&opened, has_option) {
            (None, true) => Err(Error::usage(
                "--platform, --layer-snapshots and --keep-blobs are for images, and this is not one",
            )
            .hint("name an image: docker://REFERENCE, oci:DIR, oci-archive:FILE or docker-archive:FILE")),
            _ => Ok(opened),
        }
    }

    /// Opens an image in a registry. Its layers will be downloaded to the directory `transfers`.
    pub(super) fn open_registry(
        &self,
        reference: &RegistryRef,
        transfers: &Path,
    ) -> Result<RegistryImage> {
        self.registry.open(reference, transfers)
    }

    fn options(&self, unsupported: Unsupported) -> ImageOptions {
        ImageOptions {
            platform: self.platform.clone().unwrap_or_else(Platform::of_machine),
            unsupported,
            snapshots: match self.layer_snapshots {
                true => LayerSnapshots::Each,
                false => LayerSnapshots::Recorded,
            },
            blobs: match self.keep_blobs {
                true => Blobs::Keep,
                false => Blobs::Discard,
            },
        }
    }

    /// Creates the container `name` from an image.
    pub(super) fn create(
        &self,
        store: &Store,
        name: &ContainerName,
        source: &dyn ImageSource,
        unsupported: Unsupported,
    ) -> Result<Imported> {
        let options = self.options(unsupported);
        let mut bar = output::Bar::new("importing");
        let imported = image::create(store, name, source, &options, &mut |done| bar.update(done))?;
        drop(bar);
        imported
            .notes
            .iter()
            .for_each(|note| output::print_note(note));
        Ok(imported)
    }

    /// Adds the snapshots of an image to the container `name`.
    pub(super) fn update(
        &self,
        store: &Store,
        name: &ContainerName,
        source: &dyn ImageSource,
        unsupported: Unsupported,
    ) -> Result<(Imported, Current)> {
        let options = self.options(unsupported);
        let mut bar = output::Bar::new("updating");
        let (imported, current) =
            update::update(store, name, source, &options, &mut |done| bar.update(done))?;
        drop(bar);
        imported
            .notes
            .iter()
            .for_each(|note| output::print_note(note));
        Ok((imported, current))
    }
}

/// Whether the files of an image are imported instead of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Force {
    No,
    Yes,
}

impl Force {
    /// Returns the meaning of the option `--force`.
    pub(super) fn from_option(force: bool) -> Self {
        match force {
            true => Self::Yes,
            false => Self::No,
        }
    }
}
