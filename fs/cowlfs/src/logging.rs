//! The daemon's log: lines on standard error, which is a file when the manager started it.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

use cowl_layers::shown::{Allowed, plain};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The protocol crate calls every reply that comes after an unmount an error.
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
        // There is nowhere left to report that the log can't be written.
        drop(std::io::stderr().write_all(line.as_bytes()));
    }

    fn flush(&self) {}
}

/// Turns the log on: warnings and errors, or everything.
pub fn start(debug: bool) {
    let level = if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Warn
    };
    // Fails only when a log was started before, which is then as good.
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
