//! Runs programs, and prints every command line first.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Failure of an xtask command, with a message for the user.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

/// Result of an xtask command.
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

/// Returns a failure with the message `text`.
pub(crate) fn failure<T>(text: impl Into<String>) -> Result<T> {
    Err(Failure(text.into()))
}

/// Prints a line to standard output. If that fails (a closed pipe), it exits the process, because no reader is left.
pub(crate) fn note(text: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// Prints a heading.
pub(crate) fn title(text: &str) {
    let bold = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    note(&if bold {
        format!("\n\x1b[1m== {text}\x1b[0m")
    } else {
        format!("\n== {text}")
    });
}

/// Returns the root directory of the repository.
pub(crate) fn root() -> Result<PathBuf> {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_owned)
        .ok_or_else(|| Failure("this program was built outside the repository".to_owned()))
}

/// Returns Cargo's target directory, which contains this program.
pub(crate) fn target() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    program
        .ancestors()
        .find(|directory| directory.join("CACHEDIR.TAG").is_file())
        .map(Path::to_owned)
        .ok_or_else(|| {
            Failure(format!(
                "{} is not in a cargo target directory",
                program.display()
            ))
        })
}

/// A command line that is printed before it runs.
#[derive(Debug)]
pub(crate) struct Run {
    command: Command,
    words: Vec<OsString>,
    shown: bool,
}

impl Run {
    /// Creates a command line that runs `program`.
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

    /// Creates a bash command line with `set -euo pipefail`: the failure of any part of a pipeline fails the whole
    /// line.
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

    /// Creates a command line of the Cargo that runs this program, in the root of the repository.
    pub(crate) fn cargo() -> Result<Run> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut run = Run::new(cargo);
        run.command
            .current_dir(root()?)
            .env("CARGO_TARGET_DIR", target()?);
        run.words = vec!["cargo".into()];
        Ok(run)
    }

    /// Appends an argument.
    pub(crate) fn arg(mut self, word: impl AsRef<OsStr>) -> Run {
        self.words.push(word.as_ref().to_owned());
        self.command.arg(word);
        self
    }

    /// Appends arguments.
    pub(crate) fn args<S: AsRef<OsStr>>(self, words: impl IntoIterator<Item = S>) -> Run {
        words.into_iter().fold(self, Run::arg)
    }

    /// Sets an environment variable for the program.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Run {
        self.command.env(name, value);
        self
    }

    /// Sets the working directory of the program.
    pub(crate) fn within(mut self, directory: &Path) -> Run {
        self.command.current_dir(directory);
        self
    }

    /// Suppresses the printed command line.
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

    /// Runs the program, which inherits standard output and standard error.
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

    /// Runs the program and returns its standard output without trailing whitespace.
    pub(crate) fn output(mut self) -> Result<String> {
        self.announce();
        self.command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let output = self
            .command
            .output()
            .map_err(|error| self.cannot_start(&error))?;
        let text = String::from_utf8(output.stdout)
            .map_err(|_| Failure(format!("`{}` printed invalid UTF-8", self.line())))?;
        if !output.status.success() {
            return failure(format!(
                "`{}` ended with {}\n{text}",
                self.line(),
                output.status
            ));
        }
        Ok(text.trim_end().to_owned())
    }

    /// Runs the program and returns its exit code and its combined output. Prints no output, and does not check the
    /// code.
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
