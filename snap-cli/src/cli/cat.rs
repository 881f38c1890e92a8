//! `cowl cat`

use std::ffi::OsString;
use std::io::{Read, Write};

use super::{Context, Verb, output, read_state};
use crate::error::{Error, Result};
use crate::store::name::StatePath;
use crate::tree::{ErrorKind, TreeError, inspect};

/// Print files of a state, without mounting it
///
/// Symbolic links lead where they would lead a program in the container.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The files
    #[arg(value_name = "NAME[@SNAP]:PATH", required = true)]
    files: Vec<OsString>,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let places = self
            .files
            .iter()
            .map(|raw| StatePath::parse(raw).map(|place| (raw, place)));
        let places: Vec<_> = places.collect::<Result<_>>()?;
        for (raw, place) in places {
            let Some(path) = &place.path else {
                return Err(Error::usage(format!("{} names no file", place.address))
                    .hint(format!("say which: cowl cat {}:PATH", place.address)));
            };
            let (store, state, _reading) = read_state(context, &place.address)?;
            let view = store.view(&state.stack)?;
            let file = inspect::open(&view, path);
            let (file, size) = file.map_err(|error| told(&error, raw, &place))?;
            print(&mut file.take(size), raw)?;
        }
        Ok(0)
    }
}

fn print(file: &mut dyn Read, raw: &OsString) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let mut buffer = vec![0; 128 << 10];
    loop {
        let length = match file.read(&mut buffer) {
            Ok(0) => return out.flush().map_err(output::stdout_lost),
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::at("read", raw.as_ref(), error)),
        };
        out.write_all(buffer.get(..length).unwrap_or_default())
            .map_err(output::stdout_lost)?;
    }
}

/// A failure to find a place, with its whole name.
pub(super) fn told(error: &TreeError, raw: &OsString, place: &StatePath) -> Error {
    use std::os::unix::ffi::OsStrExt;
    let what = format!("{}: {}", output::shown(raw.as_bytes()), error.message());
    let hint = format!("`cowl ls {}:PATH` shows what is there", place.address);
    match error.kind() {
        ErrorKind::NotFound => Error::not_found(what).hint(hint),
        ErrorKind::Refused => Error::failed(what).hint(hint),
        _ => Error::failed(format!("{}: {error}", output::shown(raw.as_bytes()))),
    }
}
