//! What the front says besides its data: on standard error, and in the file of `-o`.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use cowl_layers::shown::{Allowed, plain};

use crate::cli::output;
use crate::error::{Error, Result};

/// Levels at which notes are wanted in the file.
const LOUD: [&str; 5] = ["WARN", "NOTICE", "INFO", "DEBUG", "TRACE"];

/// Where it goes.
#[derive(Debug, Default)]
pub(super) struct Said {
    quiet: bool,
    file: Option<File>,
    notes: bool,
}

impl Said {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            quiet,
            ..Self::default()
        }
    }

    /// Has it written to a file too.
    pub(super) fn keep(&mut self, path: &Path, level: &str) -> Result<()> {
        let opened = File::options().append(true).create(true).open(path);
        self.file = Some(opened.map_err(|error| Error::at("write", path, error))?);
        let level = level.to_ascii_uppercase();
        self.notes = LOUD.contains(&level.as_str());
        Ok(())
    }

    fn log(&self, level: &str, text: &str) {
        let Some(mut file) = self.file.as_ref() else {
            return;
        };
        let text = plain(text, Allowed::default());
        let line = format!("{} lxc-snapshot {level} {text}\n", crate::store::now());
        if let Err(error) = file.write_all(line.as_bytes()) {
            log::warn!("cannot write the log: {error}");
        }
    }

    /// A remark.
    pub(super) fn note(&self, text: &str) {
        output::note(text);
        if self.notes {
            self.log("NOTICE", text);
        }
    }

    /// What went wrong.
    pub(super) fn error(&self, error: &Error) {
        if !self.quiet {
            output::complain(error, false);
        }
        self.log("ERROR", &error.to_string());
    }
}
