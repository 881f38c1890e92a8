//! The command `cowl create`.

use std::ffi::OsString;
use std::path::Path;

use super::{CliCommand, Context, output};
use crate::archive::image::Images;
use crate::error::Result;
use crate::lifecycle::create::{Source, create};
use crate::store::collect;
use crate::store::name::ContainerName;

/// Create a container from a root filesystem
///
/// Owners, modes, times, hard links, devices, extended attributes, ACLs and capabilities are preserved.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The new container's name
    name: OsString,
    /// A directory, a tar archive (plain, or compressed with gzip, zstd or xz), or - for an archive on
    /// standard input
    #[arg(long, value_name = "DIR|FILE|-")]
    from: OsString,
    /// Import a container image (OCI, docker save) as plain files instead of refusing it
    #[arg(long)]
    force: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.open_or_create_store()?;
        if let Err(error) = collect::collect(&store) {
            log::info!("cannot collect garbage: {error}");
        }
        let source = if self.from == "-" {
            Source::Stdin
        } else {
            Source::Path(Path::new(&self.from))
        };
        let mut bar = output::Bar::new("importing");
        let notes = create(&store, &name, source, images(self.force), &mut |done| {
            bar.update(done)
        })?;
        drop(bar);
        for note in notes {
            output::print_note(&note);
        }
        Ok(0)
    }
}

/// Returns the treatment of container images that the option `--force` selects.
pub(super) fn images(force: bool) -> Images {
    match force {
        true => Images::ImportAsFiles,
        false => Images::Refuse,
    }
}
