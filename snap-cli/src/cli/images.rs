//! The options of commands that create containers from images.

use std::ffi::OsStr;
use std::path::Path;

use super::output;
use crate::archive::image_source::{self, ImageSource, Platform, Reference};
use crate::error::{Error, Result};
use crate::lifecycle::image::{self, ImageOptions, LayerSnapshots};
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
}

impl ImageArgs {
    /// Opens the image that `source` is; `None` if it is a root filesystem. With `force`, a path is never an image.
    ///
    /// A compressed archive is unpacked in the directory `temporary`.
    pub(super) fn open(
        &self,
        temporary: &Path,
        source: &OsStr,
        force: Force,
    ) -> Result<Option<Box<dyn ImageSource>>> {
        let opened = match (Reference::parse(source), force) {
            (Some(Reference::Unsupported(prefix)), _) => {
                return Err(image::unsupported_error(prefix));
            }
            (Some(Reference::Stored(..)), Force::Yes) => {
                return Err(Error::usage(
                    "--force imports the files of an image, but this source is named as an image",
                )
                .hint("omit --force, or write only the path, without oci:, oci-archive: or docker-archive:"));
            }
            (Some(Reference::Stored(transport, path, name)), Force::No) => {
                Some(image_source::open(transport, &path, name, temporary)?)
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
            .hint("name an image: oci:DIR, oci-archive:FILE or docker-archive:FILE")),
            _ => Ok(opened),
        }
    }

    /// Creates the container `name` from an image.
    pub(super) fn create(
        &self,
        store: &Store,
        name: &ContainerName,
        source: &dyn ImageSource,
        unsupported: Unsupported,
    ) -> Result<u8> {
        let options = ImageOptions {
            platform: self.platform.clone().unwrap_or_else(Platform::of_machine),
            unsupported,
            snapshots: match self.layer_snapshots {
                true => LayerSnapshots::Take,
                false => LayerSnapshots::Omit,
            },
            blobs: match self.keep_blobs {
                true => Blobs::Keep,
                false => Blobs::Discard,
            },
        };
        let mut bar = output::Bar::new("importing");
        let notes = image::create(store, name, source, &options, &mut |done| bar.update(done))?;
        drop(bar);
        for note in notes {
            output::print_note(&note);
        }
        Ok(0)
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
