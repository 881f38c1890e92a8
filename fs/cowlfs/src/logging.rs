//! The daemon's log: lines on standard error. If `cowl` started the daemon, that is a file.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

use cowl_layers::shown::{Allowed, plain};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // `fuser` logs an error for each reply after an unmount.
        !metadata.target().starts_with("fuser") || log::max_level() >= LevelFilter::Debug
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let line = format!(
            "cowlfs: {}: {}\n",
            record.level().as_str().to_lowercase(),
            plain(&text, Allowed::default())
        );
        // If standard error fails, there is nowhere to report it.
        drop(std::io::stderr().write_all(line.as_bytes()));
    }

    fn flush(&self) {}
}

/// Starts to log messages of at least this level.
pub fn start(level: LevelFilter) {
    // Fails only if a logger is set already, which then remains in use.
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
