//! The command `cowl import`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::create::policy;
use super::images::{Force, ImageArgs};
use super::{CliCommand, Context, output};
use crate::archive::bundle::BundleReader;
use crate::archive::input::{self, Input};
use crate::archive::unfinished::UnfinishedFile;
use crate::container::lxc::LxcCopy;
use crate::error::{Error, Result};
use crate::lifecycle::create::{Source, create};
use crate::lifecycle::whole::{self, SentConfigs};
use crate::lxc::lxcpath;
use crate::recover;
use crate::store::Store;
use crate::store::bytes::Blob;
use crate::store::name::ContainerName;
use crate::store::paths::Paths;

/// Import a container that `cowl export` wrote
///
/// A file of `cowl export --with-snapshots` becomes the original container, with all its snapshots. A
/// plain tar archive, a directory or an image becomes a new container, as with `cowl create --from`, and
/// needs a NAME.
///
/// With --lxc, a container that was an LXC container becomes one again in the same step: with its config,
/// a host name and hardware addresses of its own, and its new directory in place of the original's. A
/// config can name programs that LXC runs as root, so use it only for archives that you trust. Without
/// --lxc, the configs of snapshots are stored, but not used (see `cowl restore --trust-config`).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The archive, - for an archive on standard input, a directory, or an image (see `cowl create --from`)
    #[arg(value_name = "FILE|DIR|-|IMAGE")]
    source: OsString,
    /// The container's name [default: its original name]
    name: Option<OsString>,
    /// Write the container's LXC config, if it has one, to this file
    #[arg(long, value_name = "FILE")]
    lxc_config: Option<OsString>,
    /// Register the container with LXC, so that lxc-start can start it
    #[arg(long)]
    lxc: bool,
    /// The directory of LXC's containers [default: the output of `lxc-config lxc.lxcpath`]
    #[arg(long, short = 'P', value_name = "DIR", requires = "lxc")]
    lxcpath: Option<PathBuf>,
    #[command(flatten)]
    image: ImageArgs,
    /// Import the files of an image in a directory or a file as they are
    #[arg(long)]
    force: bool,
    /// Skip files and attributes that the store's file system cannot store; for plain archives and
    /// directories
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
        if let Some(done) = self.image(context, name.as_ref())? {
            return Ok(done);
        }
        let at = |error| Error::at("read", path, error);
        let file = File::open(path).map_err(at)?;
        if file.metadata().map_err(at)?.is_dir() {
            self.refuse_lxc()?;
            let name = self.required(name.as_ref())?;
            return self.create(&context.open_or_create_store()?, name, Source::Path(path));
        }
        self.stream(context, name.as_ref(), file)
    }
}

impl Args {
    /// Imports the source if it is an image.
    fn image(&self, context: &Context, name: Option<&ContainerName>) -> Result<Option<u8>> {
        let force = Force::from_option(self.force);
        // The store may not exist yet.
        let temporary = context.root.ancestors().find(|dir| dir.is_dir());
        let temporary = temporary.unwrap_or(Path::new("/"));
        let transfers = Paths::new(&context.root).transfers();
        let Some(image) = (self.image).open((temporary, &transfers), &self.source, force)? else {
            return Ok(None);
        };
        self.refuse_lxc()?;
        let name = self.required(name)?;
        let store = context.open_or_create_store()?;
        let unsupported = policy(self.force, self.skip_unsupported).unsupported;
        self.image.create(&store, name, &*image, unsupported)?;
        Ok(Some(0))
    }

    fn stream(
        &self,
        context: &Context,
        name: Option<&ContainerName>,
        input: impl Read,
    ) -> Result<u8> {
        match input::open(input)? {
            Input::Tree(tree) => {
                self.refuse_lxc()?;
                let name = self.required(name)?;
                let source = Source::Tree(Box::new(tree));
                self.create(&context.open_or_create_store()?, name, source)
            }
            Input::Container(archive) => {
                let lxc = match self.lxc {
                    true => Some(lxc_copy(self.lxcpath.as_deref(), name, &archive)?),
                    false => None,
                };
                let store = context.open_or_create_store()?;
                let mut bar = output::Bar::new("importing");
                let from = (name, sent_configs(self.lxc));
                let done = whole::import(&store, from, archive, &mut |done| bar.update(done))?;
                drop(bar);
                done.notes.iter().for_each(|note| output::print_note(note));
                let file = self.lxc_config.as_deref().map(Path::new);
                write_config((&done.name, done.config.as_ref()), file, lxc.is_some())?;
                let snapshots = match done.snapshots {
                    0 => "no snapshots".to_owned(),
                    1 => "1 snapshot".to_owned(),
                    n => format!("{n} snapshots"),
                };
                output::print_note(&format!("imported {} with {snapshots}", done.name));
                match lxc {
                    Some(lxc) => convert(&store, &done.name, lxc),
                    None => Ok(0),
                }
            }
        }
    }

    fn refuse_lxc(&self) -> Result<()> {
        match self.lxc {
            false => Ok(()),
            true => Err(
                Error::usage("--lxc needs an archive of `cowl export --with-snapshots`")
                    .hint("omit --lxc; then use cowl lxc NAME --config-file FILE"),
            ),
        }
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

/// Prepares the LXC container of `--lxc`, before anything is imported.
pub(super) fn lxc_copy(
    path: Option<&Path>,
    name: Option<&ContainerName>,
    archive: &BundleReader<'_>,
) -> Result<LxcCopy> {
    let found = whole::describe(archive)?;
    let Some(config) = found.config else {
        return Err(Error::failed(format!(
            "cannot register {} with LXC: the archive has no LXC config",
            found.name
        ))
        .hint("omit --lxc; then use cowl lxc NAME --like OTHER"));
    };
    let lxcpath = lxcpath(path)?;
    let name = name.unwrap_or(&found.name);
    LxcCopy::from_archive(config.0, found.files, lxcpath, name)
}

/// Returns the treatment of the LXC configs of snapshots: with `--lxc`, the user trusts the sender.
pub(super) fn sent_configs(lxc: bool) -> SentConfigs {
    match lxc {
        true => SentConfigs::Trusted,
        false => SentConfigs::SetApart,
    }
}

/// Writes an imported container's LXC config to the file of `--lxc-config`.
pub(super) fn write_config(
    (name, config): (&ContainerName, Option<&Blob>),
    file: Option<&Path>,
    is_registered: bool,
) -> Result<()> {
    let Some(config) = config else {
        return Ok(());
    };
    let Some(path) = file else {
        if !is_registered {
            output::print_note(&format!(
                "{name} was an LXC container: with --lxc it becomes one again; --lxc-config FILE extracts its config"
            ));
        }
        return Ok(());
    };
    let unfinished = UnfinishedFile::new(path)?;
    let written = unfinished.file().write_all(&config.0);
    written.map_err(|error| Error::at("write", path, error))?;
    unfinished.finish()
}

/// Makes an imported container an LXC container.
pub(super) fn convert(store: &Store, name: &ContainerName, lxc: LxcCopy) -> Result<u8> {
    let options = lxc.options();
    let mut container = recover::open(store, name)?;
    let notes = lxc.convert(&mut container)?;
    recover::complete_outside(container)?;
    for note in notes {
        output::print_note(&note);
    }
    output::print_note(&format!("start it with: lxc-start {options}"));
    Ok(0)
}
