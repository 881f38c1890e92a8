//! How things are printed: data to standard output, everything else to standard error.

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use log::{LevelFilter, Log, Metadata, Record};
use serde_json::{Value, json};

use crate::delta::error::Progress;
use crate::error::{Error, Result};

struct Notes;

impl Log for Notes {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            say("note", "33", &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Lets the library's warnings be seen.
pub(super) fn start_log() {
    // Fails only when a log was started before, which is then as good.
    if log::set_logger(&Notes).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Lets everything that the library tells be seen: for a daemon, whose standard error is its log.
pub(super) fn log_everything() {
    log::set_max_level(LevelFilter::Info);
}

fn coloured() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A line on standard error.
fn say(label: &str, colour: &str, text: &str) {
    let line = if coloured() {
        format!("\u{1b}[1;{colour}m{label}:\u{1b}[0m {text}\n")
    } else {
        format!("{label}: {text}\n")
    };
    // There is nowhere left to tell that standard error can't be written.
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// A remark that is no data.
pub(super) fn note(text: &str) {
    say("note", "33", text);
}

/// Prints an error.
pub(super) fn complain(error: &Error, as_json: bool) {
    if as_json {
        let source = error.source.as_ref().map(ToString::to_string);
        let value = json!({"error": {
            "kind": error.kind.name(),
            "what": error.what,
            "hint": error.hint,
            "source": source,
        }});
        drop(std::io::stderr().write_all(format!("{value}\n").as_bytes()));
        return;
    }
    say("error", "31", &error.to_string());
    if let Some(hint) = &error.hint {
        say("hint", "36", hint);
    }
}

/// Prints what clap has to say: help to standard output, mistakes to standard error.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    match error.print() {
        Ok(()) => ExitCode::from(code),
        Err(lost) if lost.kind() == ErrorKind::BrokenPipe => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

const STDOUT: &str = "cannot write to standard output";

/// An error of writing standard output.
pub(super) fn stdout_lost(error: std::io::Error) -> Error {
    Error::failed(STDOUT).because(error)
}

/// Whether the reader of our output went away, which is its right (`cowl diff web | head`).
pub(super) fn is_closed_pipe(error: &Error) -> bool {
    error.what == STDOUT
        && error
            .source
            .as_ref()
            .and_then(|source| source.downcast_ref::<std::io::Error>())
            .is_some_and(|source| source.kind() == ErrorKind::BrokenPipe)
}

/// Prints one line of data.
pub(super) fn line(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(stdout_lost)
}

/// Prints JSON.
pub(super) fn data(value: &Value) -> Result<()> {
    line(format!("{value:#}").as_bytes())
}

/// Prints a table; the columns named in `right` are numbers.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>, right: &[usize]) -> Result<()> {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for column in right {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let text = table.trim_fmt();
    let lines: Vec<_> = text
        .lines()
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect();
    line(lines.join("\n").as_bytes())
}

/// A name or path as one line of text: as it is where it is plain text, else with escapes.
pub(super) fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(|c| c.is_control() || c == '\\') => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

/// A path for JSON, exact whatever its bytes: a string, or an array of bytes when it is not UTF-8.
pub(super) fn json_path(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => bytes.into(),
    }
}

/// A size for people.
pub(super) fn size(bytes: u64) -> String {
    let mut unit = "B";
    let mut value = bytes;
    let mut tenth = 0;
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 1024 {
            break;
        }
        tenth = value % 1024 * 10 / 1024;
        value /= 1024;
        unit = next;
    }
    if unit == "B" || value >= 100 {
        format!("{value} {unit}")
    } else {
        format!("{value}.{tenth} {unit}")
    }
}

/// A moment of a manifest in this machine's time zone.
pub(super) fn local_time(stored: &str) -> String {
    match stored.parse::<jiff::Timestamp>() {
        Ok(time) => {
            let zoned = time.to_zoned_datetime(jiff::tz::TimeZone::system());
            zoned.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        Err(_) => stored.to_owned(),
    }
}

/// A second since 1970 in this machine's time zone.
pub(super) fn local_second(second: i64) -> String {
    match jiff::Timestamp::from_second(second) {
        Ok(time) => local_time(&time.to_string()),
        Err(_) => "always".to_owned(),
    }
}

/// A second since 1970 as manifests tell times.
pub(super) fn utc_second(second: i64) -> Option<String> {
    let time = jiff::Timestamp::from_second(second);
    time.map(|time| time.to_string()).ok()
}

/// Tells how far a long work has come, on a terminal only.
pub(super) struct Bar {
    bar: Option<indicatif::ProgressBar>,
    last: Instant,
}

impl Bar {
    pub(super) fn new(doing: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = indicatif::ProgressBar::new_spinner();
            bar.set_prefix(doing);
            bar
        });
        Self {
            bar,
            last: Instant::now(),
        }
    }

    pub(super) fn tell(&mut self, done: Progress) {
        const PAUSE: Duration = Duration::from_millis(100);
        if let Some(bar) = &self.bar
            && self.last.elapsed() >= PAUSE
        {
            self.last = Instant::now();
            let prefix = bar.prefix();
            bar.set_message(format!(
                "{prefix}: {} files, {}",
                done.entries,
                size(done.bytes)
            ));
            bar.tick();
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (200 << 20, "200 MiB"),
            (u64::MAX, "16383 PiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn names_stay_one_line() {
        assert_eq!(shown("caf\u{e9}".as_bytes()), "caf\u{e9}");
        assert_eq!(shown(b"a\nb"), "a\\nb");
        assert_eq!(shown(b"\xff"), "\\xff");
        assert_eq!(shown(b"a\\nb"), "a\\\\nb");
        assert_eq!(json_path(b"\xff"), json!([255]));
    }

    #[test]
    fn only_our_own_output_may_be_closed() {
        let pipe = || std::io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&stdout_lost(pipe())));
        assert!(!is_closed_pipe(&Error::failed("x").because(pipe())));
    }
}
