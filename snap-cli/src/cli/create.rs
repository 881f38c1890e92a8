//! The command `cowl create`.

use std::ffi::OsString;
use std::path::Path;

use super::images::{Force, ImageArgs};
use super::{CliCommand, Context, output};
use crate::archive::image::Images;
use crate::error::Result;
use crate::lifecycle::create::{ImportPolicy, Source, create};
use crate::store::collect;
use crate::store::name::ContainerName;
use crate::tree::omissions::Unsupported;

/// Create a container from a root filesystem
///
/// Owners, modes, times, hard links, devices, extended attributes, ACLs and capabilities are preserved.
///
/// Archives are read as GNU tar reads them. Leading slashes of names are removed, and symbolic links in
/// the directories of names are followed within the new root filesystem. What Linux can never store,
/// such as extended attributes of other operating systems, is skipped with a note.
///
/// Images are named as for skopeo and podman, or recognized by their content. Containers that are created
/// from images with equal lower layers share these layers. The image's command, environment, user and
/// working directory are those of `cowl exec NAME`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The new container's name
    name: OsString,
    /// A directory, a tar archive (plain, or compressed with gzip, zstd or xz), - for an archive on standard
    /// input, or an image: docker://REGISTRY/REPOSITORY[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG] or
    /// docker-archive:FILE[:NAME]
    #[arg(long, value_name = "DIR|FILE|-|IMAGE")]
    from: OsString,
    #[command(flatten)]
    image: ImageArgs,
    /// Import the files of an image in a directory or a file as they are
    #[arg(long)]
    force: bool,
    /// Skip files and attributes that the store's file system cannot store
    #[arg(long)]
    skip_unsupported: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.open_or_create_store()?;
        if let Err(error) = collect::collect(&store) {
            log::info!("cannot collect garbage: {error}");
        }
        let policy = policy(self.force, self.skip_unsupported);
        let force = Force::from_option(self.force);
        let places = (store.root(), store.paths().transfers());
        if let Some(image) = (self.image).open((places.0, &places.1), &self.from, force)? {
            (self.image).create(&store, &name, &*image, policy.unsupported)?;
            return Ok(0);
        }
        let source = if self.from == "-" {
            Source::Stdin
        } else {
            Source::Path(Path::new(&self.from))
        };
        let mut bar = output::Bar::new("importing");
        let notes = create(&store, &name, source, policy, &mut |done| bar.update(done))?;
        drop(bar);
        for note in notes {
            output::print_note(&note);
        }
        Ok(0)
    }
}

/// Returns the policy that the options `--force` and `--skip-unsupported` select.
pub(super) fn policy(force: bool, skip_unsupported: bool) -> ImportPolicy {
    ImportPolicy {
        images: match force {
            true => Images::ImportAsFiles,
            false => Images::Refuse,
        },
        unsupported: match skip_unsupported {
            true => Unsupported::Skip,
            false => Unsupported::Refuse,
        },
    }
}
