//! Debug symbols apart from the programs: they are most of what a release build writes, and only debuggers and
//! backtraces read them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::run::{Failure, Result, Run};

/// A program without symbols, and the file with its symbols, which the program names in its debuglink.
#[derive(Debug)]
pub(crate) struct Separated {
    pub(crate) program: PathBuf,
    pub(crate) symbols: PathBuf,
}

/// Writes a copy of `program` without its symbols, and its symbols, to the directory `to`. Debuggers look for the
/// symbols in the directory of the program, in `.debug` there, and below /usr/lib/debug.
pub(crate) fn separate(program: &Path, to: &Path) -> Result<Separated> {
    let name = program
        .file_name()
        .ok_or_else(|| Failure(format!("{} is not a program", program.display())))?;
    let mut symbols = name.to_owned();
    symbols.push(".debug");
    let separated = Separated {
        program: to.join(name),
        symbols: to.join(symbols),
    };
    std::fs::create_dir_all(to)?;
    Run::new("objcopy")
        .arg("--only-keep-debug")
        .args([program, &separated.symbols])
        .unseen()
        .run()?;
    let mut link = OsString::from("--add-gnu-debuglink=");
    link.push(&separated.symbols);
    Run::new("objcopy")
        .arg("--strip-all")
        .arg(link)
        .args([program, &separated.program])
        .unseen()
        .run()?;
    Ok(separated)
}
