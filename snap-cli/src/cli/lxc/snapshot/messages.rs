//! Messages of `lxc-snapshot`: on standard error, and in the log file of `-o`.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use cowl_layers::shown::{Allowed, plain};

use crate::cli::output;
use crate::error::{Error, Result};

/// The levels at which notes are written to the log file.
const NOTE_LEVELS: [&str; 5] = ["WARN", "NOTICE", "INFO", "DEBUG", "TRACE"];

/// The destinations of messages.
#[derive(Debug, Default)]
pub(super) struct Messages {
    quiet: bool,
    file: Option<File>,
    notes: bool,
}

impl Messages {
    /// Creates a writer to standard error; with `quiet`, it does not print errors.
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            ..Self::default()
        }
    }

    /// Opens a log file, to which messages are written as well.
    pub(super) fn open_log(&mut self, path: &Path, level: &str) -> Result<()> {
        let opened = File::options().append(true).create(true).open(path);
        self.file = Some(opened.map_err(|error| Error::at("write", path, error))?);
        let level = level.to_ascii_uppercase();
        self.notes = NOTE_LEVELS.contains(&level.as_str());
        Ok(())
    }

    fn log(&self, level: &str, text: &str) {
        let Some(mut file) = self.file.as_ref() else {
            return;
        };
        let text = plain(text, Allowed::default());
        let line = format!("{} lxc-snapshot {level} {text}\n", crate::store::now());
        if let Err(error) = file.write_all(line.as_bytes()) {
            log::warn!("cannot write to the log file: {error}");
        }
    }

    /// Prints a note.
    pub(super) fn note(&self, text: &str) {
        output::print_note(text);
        if self.notes {
            self.log("NOTICE", text);
        }
    }

    /// Prints an error, unless `-q` is given.
    pub(super) fn error(&self, error: &Error) {
        if !self.quiet {
            output::print_error(error, output::Format::Text);
        }
        self.log("ERROR", &error.to_string());
    }
}
