//! The log: lines on standard error.

use std::io::Write as _;

use cowl_layers::shown::{Allowed, plain};
use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Other crates log each frame of a connection.
        metadata.target().starts_with("cowl") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let level = record.level().as_str().to_lowercase();
        let line = format!(
            "cowl-snapshotter: {level}: {}\n",
            plain(&text, Allowed::default())
        );
        // If standard error fails, there is nowhere to report it.
        drop(std::io::stderr().write_all(line.as_bytes()));
    }

    fn flush(&self) {}
}

/// Starts to log messages of at least this level.
pub(crate) fn start(level: LevelFilter) {
    // Fails only if a logger is set already, which then remains in use.
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
