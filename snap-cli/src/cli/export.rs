//! `cowl export`

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Context, Verb, output, read_state};
use crate::archive::{Compression, export};
use crate::error::{Error, Result};
use crate::store::name::Address;

/// Write a state as a tar archive
///
/// Hard links, extended attributes and ACLs are kept; GNU tar unpacks it with
/// `tar --numeric-owner --acls --xattrs --xattrs-include='*' -xpf FILE`. For a container that is
/// being written to, export a snapshot.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The archive: .tar, .tar.gz, .tar.zst or .tar.xz; or - for a plain one on standard output.
    /// A file that is there is replaced when the new one is complete.
    #[arg(value_name = "FILE|-")]
    file: OsString,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let source = Address::parse(&self.source)?;
        let target = (self.file != "-").then(|| Path::new(&self.file));
        let compression = match target {
            Some(path) => compression(path)?,
            None => Compression::None,
        };
        let (store, state, _reading) = read_state(context, &source)?;
        let view = store.view(&state.stack)?;
        let mut bar = output::Bar::new("exporting");
        let mut progress = |done| bar.tell(done);
        let done = match target {
            None => export::tar(&view, std::io::stdout().lock(), compression, &mut progress)?,
            Some(path) => {
                let unfinished = Unfinished::new(path)?;
                let done = export::tar(&view, &unfinished.file, compression, &mut progress)?;
                unfinished.finish()?;
                done
            }
        };
        drop(bar);
        for (path, why) in &done.notes {
            output::note(&format!("{}: {why}", output::shown(path)));
        }
        Ok(0)
    }
}

fn compression(path: &Path) -> Result<Compression> {
    Compression::of_name(path.as_os_str().as_bytes()).ok_or_else(|| {
        Error::usage(format!(
            "the end of the name {} tells no kind of archive",
            path.display()
        ))
        .hint("end it in .tar, .tar.gz, .tar.zst or .tar.xz, or write - for standard output")
    })
}

/// A file that gets its name when it is complete. What is no regular file (a fifo, /dev/null) is written
/// as it is.
struct Unfinished<'p> {
    file: File,
    path: &'p Path,
    temporary: Option<PathBuf>,
}

impl<'p> Unfinished<'p> {
    fn new(path: &'p Path) -> Result<Self> {
        let at = |error| Error::at("write", path, error);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                return Err(Error::failed(format!("{} is a folder", path.display()))
                    .hint("name a file to write"));
            }
            Ok(meta) if !meta.is_file() => {
                let file = File::options().write(true).open(path).map_err(at)?;
                return Ok(Self {
                    file,
                    path,
                    temporary: None,
                });
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(error)),
        }
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(name);
        let file = File::create_new(&temporary).map_err(at)?;
        Ok(Self {
            file,
            path,
            temporary: Some(temporary),
        })
    }

    fn finish(mut self) -> Result<()> {
        let at = |error| Error::at("write", self.path, error);
        self.file.flush().map_err(at)?;
        if let Some(temporary) = &self.temporary {
            self.file.sync_all().map_err(at)?;
            std::fs::rename(temporary, self.path).map_err(at)?;
        }
        self.temporary = None;
        Ok(())
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(error) = std::fs::remove_file(temporary)
        {
            log::warn!("cannot remove {}: {error}", temporary.display());
        }
    }
}
