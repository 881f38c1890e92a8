//! `cowl create`

use std::ffi::OsString;
use std::path::Path;

use super::{Context, Verb, output};
use crate::archive::image::Images;
use crate::error::Result;
use crate::lifecycle::create::{Source, create};
use crate::store::collect;
use crate::store::name::ContainerName;

/// Make a container from a root file system
///
/// Owners, modes, times, hard links, devices, extended attributes, ACLs and capabilities are kept.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The new container's name
    name: OsString,
    /// A folder, a tar archive (plain, or compressed by gzip, zstd or xz), or - for an archive on
    /// standard input
    #[arg(long, value_name = "DIR|FILE|-")]
    from: OsString,
    /// Take the files of a container image (OCI, docker save) as they are, instead of refusing it
    #[arg(long)]
    force: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_or_new()?;
        if let Err(error) = collect::collect(&store) {
            log::info!("cleaning up: {error}");
        }
        let source = if self.from == "-" {
            Source::Stdin
        } else {
            Source::Path(Path::new(&self.from))
        };
        let mut bar = output::Bar::new("importing");
        let notes = create(&store, &name, source, images(self.force), &mut |done| {
            bar.tell(done)
        })?;
        drop(bar);
        for note in notes {
            output::note(&note);
        }
        Ok(0)
    }
}

/// What `--force` says.
pub(super) fn images(force: bool) -> Images {
    match force {
        true => Images::TakeAsFiles,
        false => Images::Refuse,
    }
}
