//! The command `cowl import`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use super::create::policy;
use super::{CliCommand, Context, output};
use crate::archive::input::{self, Input};
use crate::archive::unfinished::UnfinishedFile;
use crate::error::{Error, Result};
use crate::lifecycle::create::{Source, create};
use crate::lifecycle::whole::{self, Incoming};
use crate::store::Store;
use crate::store::name::ContainerName;

/// Import a container that `cowl export` wrote
///
/// A file of `cowl export --with-snapshots` becomes the original container, with all its snapshots. A
/// plain tar archive or a directory becomes a new container, as with `cowl create --from`, and needs
/// a NAME.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The archive, - for an archive on standard input, or a directory
    #[arg(value_name = "FILE|DIR|-")]
    source: OsString,
    /// The container's name [default: its original name]
    name: Option<OsString>,
    /// Write the container's LXC config, if it has one, to this file
    #[arg(long, value_name = "FILE")]
    lxc_config: Option<OsString>,
    /// Import a container image (OCI, docker save) as plain files instead of refusing it
    #[arg(long)]
    force: bool,
    /// Skip files and attributes that the store's file system, or the user, cannot store; for plain
    /// archives and directories
    #[arg(long)]
    skip_unsupported: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = self.name.as_ref().map(ContainerName::parse).transpose()?;
        let path = Path::new(&self.source);
        if self.source == "-" {
            return self.stream(context, name.as_ref(), std::io::stdin().lock());
        }
        let at = |error| Error::at("read", path, error);
        let file = File::open(path).map_err(at)?;
        if file.metadata().map_err(at)?.is_dir() {
            let name = self.required(name.as_ref())?;
            return self.create(&context.open_or_create_store()?, name, Source::Path(path));
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
                let name = self.required(name)?;
                let source = Source::Tree(Box::new(tree));
                self.create(&context.open_or_create_store()?, name, source)
            }
            Input::Container(archive) => {
                let store = context.open_or_create_store()?;
                let mut bar = output::Bar::new("importing");
                let done = whole::import(&store, name, archive, &mut |done| bar.update(done))?;
                drop(bar);
                self.write_config(&done)?;
                let snapshots = match done.snapshots {
                    0 => "no snapshots".to_owned(),
                    1 => "1 snapshot".to_owned(),
                    n => format!("{n} snapshots"),
                };
                output::print_note(&format!("imported {} with {snapshots}", done.name));
                Ok(0)
            }
        }
    }

    /// Writes the imported container's LXC config to the file of `--lxc-config`.
    fn write_config(&self, done: &Incoming) -> Result<()> {
        let Some(config) = &done.config else {
            return Ok(());
        };
        let Some(path) = &self.lxc_config else {
            output::print_note(&format!(
                "{} was an LXC container; the option --lxc-config FILE extracts its config",
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

    fn required<'n>(&self, name: Option<&'n ContainerName>) -> Result<&'n ContainerName> {
        name.ok_or_else(|| {
            Error::usage("a plain archive or directory needs a container name").hint(format!(
                "name it: cowl import {} NAME",
                crate::shell::quoted(&self.source)
            ))
        })
    }

    fn create(&self, store: &Store, name: &ContainerName, source: Source<'_>) -> Result<u8> {
        let mut bar = output::Bar::new("importing");
        let policy = policy(self.force, self.skip_unsupported);
        let notes = create(store, name, source, policy, &mut |done| bar.update(done))?;
        drop(bar);
        for note in notes {
            output::print_note(&note);
        }
        Ok(0)
    }
}
