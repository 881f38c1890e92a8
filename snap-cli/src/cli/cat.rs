//! The command `cowl cat`.

use std::ffi::OsString;
use std::io::{Read, Write};

use super::{CliCommand, Context, Namespace, output, read_state};
use crate::error::{Error, Result};
use crate::store::name::StatePath;
use crate::tree::{ErrorKind, TreeError, inspect};

/// Print files of a state without mounting it
///
/// Symbolic links are resolved inside the container.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The files to print
    #[arg(value_name = "NAME[@SNAP]:PATH", required = true)]
    files: Vec<OsString>,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        // All are parsed before the first is printed.
        let files = self
            .files
            .iter()
            .map(|raw| context.state_path(raw).map(|parsed| (raw, parsed)));
        let files: Vec<_> = files.collect::<Result<_>>()?;
        for (raw, parsed) in files {
            let Some(path) = &parsed.path else {
                return Err(
                    Error::usage(format!("no path specified in {}", parsed.address))
                        .hint(format!("specify one: cowl cat {}:PATH", parsed.address)),
                );
            };
            let (store, state, _reading) = read_state(context, &parsed.address)?;
            let view = store.view(&state.stack)?;
            let file = inspect::open(&view, path);
            let (file, size) = file.map_err(|error| describe(&error, raw, &parsed))?;
            print(&mut file.take(size), raw)?;
        }
        Ok(0)
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

fn print(file: &mut dyn Read, raw: &OsString) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut buffer = vec![0; 128 << 10];
    loop {
        let length = match file.read(&mut buffer) {
            Ok(0) => return out.flush().map_err(output::stdout_error),
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::at("read", raw.as_ref(), error)),
        };
        out.write_all(buffer.get(..length).unwrap_or_default())
            .map_err(output::stdout_error)?;
    }
}

/// Converts an error of a path in a state; `raw` is the argument that it was parsed from.
pub(super) fn describe(error: &TreeError, raw: &OsString, parsed: &StatePath) -> Error {
    use std::os::unix::ffi::OsStrExt;
    let what = format!("{}: {}", output::shown(raw.as_bytes()), error.message());
    let hint = format!("list a directory: cowl ls {}:PATH", parsed.address);
    match error.kind() {
        ErrorKind::NotFound => Error::not_found(what).hint(hint),
        ErrorKind::Refused => Error::failed(what).hint(hint),
        _ => Error::failed(format!("{}: {error}", output::shown(raw.as_bytes()))),
    }
}
