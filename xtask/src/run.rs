//! Running programs in the open: every command line is printed before it runs.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Why a command of this program failed, as one says it to a person.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

/// What everything here returns.
pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure(error.to_string())
    }
}

/// A failure with this text.
pub(crate) fn failure<T>(text: impl Into<String>) -> Result<T> {
    Err(Failure(text.into()))
}

/// Says something. Standard output may be gone (a closed pipe): then there is nobody to tell.
pub(crate) fn note(text: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Announces a part of the work.
pub(crate) fn title(text: &str) {
    let bold = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    note(&if bold {
        format!("\n\x1b[1m== {text}\x1b[0m")
    } else {
        format!("\n== {text}")
    });
}

/// The repository's root folder.
pub(crate) fn root() -> Result<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_owned)
        .ok_or_else(|| Failure("this program was built outside the repository".to_owned()))
}

/// Cargo's target folder: where this program itself lies.
pub(crate) fn target() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    program
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").is_file())
        .map(Path::to_owned)
        .ok_or_else(|| {
            Failure(format!(
                "{} is not in a cargo target folder",
                program.display()
            ))
        })
}

/// A command line that is printed, then run.
#[derive(Debug)]
pub(crate) struct Run {
    command: Command,
    words: Vec<OsString>,
    shown: bool,
}

impl Run {
    /// Starts a command line.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Run {
        let words = vec![program.as_ref().to_owned()];
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        Run {
            command,
            words,
            shown: true,
        }
    }

    /// A line for the shell, with `set -e`; a part of a pipe that fails makes the whole fail.
    pub(crate) fn shell(line: &str) -> Run {
        let mut command = Command::new("bash");
        command
            .stdin(Stdio::null())
            .args(["-euo", "pipefail", "-c", line]);
        Run {
            command,
            words: vec![line.into()],
            shown: true,
        }
    }

    /// Cargo, the same one that runs this program, at the repository's root.
    pub(crate) fn cargo() -> Result<Run> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut run = Run::new(cargo);
        run.command
            .current_dir(root()?)
            .env("CARGO_TARGET_DIR", target()?);
        run.words = vec!["cargo".into()];
        Ok(run)
    }

    /// Adds a word.
    pub(crate) fn arg(mut self, word: impl AsRef<OsStr>) -> Run {
        self.words.push(word.as_ref().to_owned());
        self.command.arg(word);
        self
    }

    /// Adds words.
    pub(crate) fn args<S: AsRef<OsStr>>(self, words: impl IntoIterator<Item = S>) -> Run {
        words.into_iter().fold(self, Run::arg)
    }

    /// Sets a variable of its environment.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Run {
        self.command.env(name, value);
        self
    }

    /// Runs it in this folder.
    pub(crate) fn within(mut self, folder: &Path) -> Run {
        self.command.current_dir(folder);
        self
    }

    /// Does not print the command line.
    pub(crate) fn unseen(mut self) -> Run {
        self.shown = false;
        self
    }

    fn line(&self) -> String {
        self.words
            .iter()
            .map(|word| word.display().to_string())
            .collect::<Vec<_>>()
            .join(" ")
    }

    fn announce(&self) {
        if self.shown {
            note(&format!("$ {}", self.line()));
        }
    }

    /// Runs it; its output goes where ours goes.
    pub(crate) fn run(mut self) -> Result<()> {
        self.announce();
        let start = Instant::now();
        let status = self
            .command
            .status()
            .map_err(|error| self.cannot_start(&error))?;
        if status.success() {
            return Ok(());
        }
        failure(format!(
            "`{}` ended with {status} after {:.1?}",
            self.line(),
            start.elapsed()
        ))
    }

    /// Runs it and takes its standard output, without the line end.
    pub(crate) fn output(mut self) -> Result<String> {
        self.announce();
        self.command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let output = self
            .command
            .output()
            .map_err(|error| self.cannot_start(&error))?;
        let text = String::from_utf8(output.stdout)
            .map_err(|_| Failure(format!("`{}` printed what is not UTF-8", self.line())))?;
        if !output.status.success() {
            return failure(format!(
                "`{}` ended with {}\n{text}",
                self.line(),
                output.status
            ));
        }
        Ok(text.trim_end().to_owned())
    }

    /// Runs it and gives the exit code, all it printed and nothing printed here.
    pub(crate) fn code_and_text(mut self) -> Result<(Option<i32>, String)> {
        self.announce();
        let output = self
            .command
            .output()
            .map_err(|error| self.cannot_start(&error))?;
        let mut bytes = output.stdout;
        bytes.extend_from_slice(&output.stderr);
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => error.into_bytes().escape_ascii().to_string(),
        };
        Ok((output.status.code(), text))
    }

    fn cannot_start(&self, error: &std::io::Error) -> Failure {
        Failure(format!("cannot start `{}`: {error}", self.line()))
    }
}
