//! `cowl import`

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::create::images;
use super::{Context, Verb, output};
use crate::archive::input::{self, Input};
use crate::archive::unfinished::UnfinishedFile;
use crate::error::{Error, Result};
use crate::lifecycle::create::{Source, create};
use crate::lifecycle::whole::{self, Incoming};
use crate::store::Store;
use crate::store::name::ContainerName;

/// Bring a container back from what `cowl export` wrote
///
/// A file of `cowl export --with-snapshots` becomes the container that it was, with all its snapshots.
/// A plain tar archive or a folder becomes a new container, as by `cowl create --from`; a name is wanted
/// then.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The archive, - for one on standard input, or a folder
    #[arg(value_name = "FILE|DIR|-")]
    source: OsString,
    /// The container's name [default: the one that it had]
    name: Option<OsString>,
    /// Write the config of the LXC container that it was to this file
    #[arg(long, value_name = "FILE")]
    lxc_config: Option<OsString>,
    /// Take the files of a container image (OCI, docker save) as they are, instead of refusing it
    #[arg(long)]
    force: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = self.name.as_ref().map(ContainerName::parse).transpose()?;
        let path = Path::new(&self.source);
        if self.source == "-" {
            return self.stream(context, name.as_ref(), std::io::stdin().lock());
        }
        let at = |error| Error::at("read", path, error);
        let file = File::open(path).map_err(at)?;
        if file.metadata().map_err(at)?.is_dir() {
            let name = self.wanted(name.as_ref())?;
            return self.made(&context.store_or_new()?, name, Source::Path(path));
        }
        self.stream(context, name.as_ref(), file)
    }
}

impl Args {
    fn stream(
        &self,
        context: &Context,
        name: Option<&ContainerName>,
        input: impl Read,
    ) -> Result<u8> {
        match input::open(input)? {
            Input::Tree(tree) => {
                let name = self.wanted(name)?;
                let source = Source::Tree(Box::new(tree));
                self.made(&context.store_or_new()?, name, source)
            }
            Input::Container(archive) => {
                let store = context.store_or_new()?;
                let mut bar = output::Bar::new("importing");
                let done = whole::import(&store, name, archive, &mut |done| bar.tell(done))?;
                drop(bar);
                self.config(&done)?;
                let snapshots = match done.snapshots {
                    0 => "no snapshots".to_owned(),
                    1 => "its snapshot".to_owned(),
                    n => format!("its {n} snapshots"),
                };
                output::note(&format!("{} is there, with {snapshots}", done.name));
                Ok(0)
            }
        }
    }

    fn config(&self, done: &Incoming) -> Result<()> {
        let Some(config) = &done.config else {
            return Ok(());
        };
        let Some(path) = &self.lxc_config else {
            output::note(&format!(
                "{} was an LXC container; its config is in the archive: --lxc-config FILE writes it",
                done.name
            ));
            return Ok(());
        };
        let path = Path::new(path);
        let unfinished = UnfinishedFile::new(path)?;
        let written = unfinished.file().write_all(&config.0);
        written.map_err(|error| Error::at("write", path, error))?;
        unfinished.finish()
    }

    fn wanted<'n>(&self, name: Option<&'n ContainerName>) -> Result<&'n ContainerName> {
        name.ok_or_else(|| {
            Error::usage("a tree of files has no name that its container could have").hint(format!(
                "cowl import {} NAME",
                crate::shell::quoted(&self.source)
            ))
        })
    }

    fn made(&self, store: &Store, name: &ContainerName, source: Source<'_>) -> Result<u8> {
        let mut bar = output::Bar::new("importing");
        let notes = create(store, name, source, images(self.force), &mut |done| {
            bar.tell(done);
        })?;
        drop(bar);
        for note in notes {
            output::note(&note);
        }
        Ok(0)
    }
}
