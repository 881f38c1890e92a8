//! How things are printed: data to standard output, everything else to standard error.
//!
//! Text for people goes through [`plain`] here, whatever it was made of: names, comments and messages come from
//! containers, archives and configs, and must not be able to speak to the terminal. Only what is a result as
//! bytes ([`result`]) is written as it is.

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use cowl_layers::shown::{Allowed, Show, plain};
use log::{LevelFilter, Log, Metadata, Record};
use serde_json::{Value, json};

use super::daemon_log;
use crate::config::When;
use crate::error::{Error, Result};
/// Returns a path for JSON, exact for any bytes.
pub(super) use crate::store::bytes::to_value as json_path;

pub(super) use super::progress::Bar;
pub(super) use super::table::table;

struct Notes;

impl Log for Notes {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            say("note", "33", &record.args().to_string());
            if IS_DAEMON.load(Ordering::Relaxed) {
                // Said nowhere: this is where it would be said.
                let _unchanged = daemon_log::bound();
            }
        }
    }

    fn flush(&self) {}
}

/// Lets the library's warnings be seen.
pub(super) fn start_log() {
    // Fails only when a log was started before, which is then as good.
    cowl_layers::shown::plain_panics();
    if log::set_logger(&Notes).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Lets everything that the library tells be seen: for a daemon, whose standard error is its log, which is
/// bounded from here on.
pub(super) fn log_everything() {
    IS_DAEMON.store(true, Ordering::Relaxed);
    log::set_max_level(LevelFilter::Info);
}

/// This process is a daemon.
static IS_DAEMON: AtomicBool = AtomicBool::new(false);
/// Neither notes nor bars are wanted.
static QUIET: AtomicBool = AtomicBool::new(false);
/// A [`When`]: this process prints for one command line.
static COLOUR: AtomicU8 = AtomicU8::new(When::Auto as u8);

/// Sets what `--quiet` and `--verbose` ask for.
pub(super) fn loudness(quiet: bool, verbose: u8) {
    QUIET.store(quiet, Ordering::Relaxed);
    log::set_max_level(match (quiet, verbose) {
        (true, _) => LevelFilter::Error,
        (false, 0) => LevelFilter::Warn,
        (false, 1) => LevelFilter::Info,
        (false, _) => LevelFilter::Debug,
    });
}

/// Whether nothing but data and errors is to be seen.
pub(super) fn quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Sets when output is coloured.
pub(super) fn colour(when: When) {
    COLOUR.store(when as u8, Ordering::Relaxed);
}

fn coloured(terminal: bool) -> bool {
    match COLOUR.load(Ordering::Relaxed) {
        when if when == When::Always as u8 => true,
        when if when == When::Never as u8 => false,
        _ => terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
    }
}

/// How a piece of text looks where colours are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "the palette; verbs take from it what they need")]
pub(super) enum Colour {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
}

impl Colour {
    fn code(self) -> &'static str {
        match self {
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Red => "31",
            Self::Green => "32",
            Self::Yellow => "33",
            Self::Blue => "34",
            Self::Magenta => "35",
            Self::Cyan => "36",
        }
    }
}

/// Text for standard output, coloured if that is wanted there. Cells of a table may be painted too.
pub(super) fn paint(colour: Colour, text: &str) -> String {
    if text.is_empty() || !coloured(std::io::stdout().is_terminal()) {
        return text.to_owned();
    }
    format!("\u{1b}[{}m{text}\u{1b}[0m", colour.code())
}

/// A line on standard error.
fn say(label: &str, colour: &str, text: &str) {
    // A line of its own begins with a label; what is in the text cannot look like one.
    let text = text.trim_end().replace('\n', "\n  ");
    let lines = Allowed {
        lines: true,
        colors: false,
    };
    let text = plain(&text, lines);
    let line = if coloured(std::io::stderr().is_terminal()) {
        format!("\u{1b}[1;{colour}m{label}:\u{1b}[0m {text}\n")
    } else {
        format!("{label}: {text}\n")
    };
    // There is nowhere left to tell that standard error can't be written.
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// A remark that is no data.
pub(super) fn note(text: &str) {
    if !quiet() {
        say("note", "33", text);
    }
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
pub(super) fn usage(error: clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    let is_mistake = error.use_stderr();
    let colors = coloured(match is_mistake {
        true => std::io::stderr().is_terminal(),
        false => std::io::stdout().is_terminal(),
    });
    let colors = match colors {
        true => cowlfs::cli::Colors::On,
        false => cowlfs::cli::Colors::Off,
    };
    let text = cowlfs::cli::render_error(error, colors);
    let written = match is_mistake {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
    match written {
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

/// What besides visible characters may be in text for people on standard output.
fn allowed(lines: bool) -> Allowed {
    Allowed {
        lines,
        colors: coloured(std::io::stdout().is_terminal()),
    }
}

/// A piece of one line on standard output, as it is printed: the cells of tables are measured so.
pub(super) fn piece(text: &str) -> String {
    plain(text, allowed(false)).into_owned()
}

/// Prints one line for people.
pub(super) fn line(text: &str) -> Result<()> {
    result(plain(text, allowed(false)).as_bytes())
}

/// Prints text of any number of lines for people.
pub(super) fn text(text: &str) -> Result<()> {
    result(plain(text, allowed(true)).as_bytes())
}

/// Prints a path, for programs as it is, for people on a terminal as one line of plain text.
pub(super) fn place(path: &std::path::Path) -> Result<()> {
    match std::io::stdout().is_terminal() {
        true => line(&path.shown().to_string()),
        false => result(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())),
    }
}

/// Prints a result as it is, and ends the line.
pub(super) fn result(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(stdout_lost)
}

/// Prints JSON.
pub(super) fn data(value: &Value) -> Result<()> {
    result(format!("{value:#}").as_bytes())
}

/// A name or path as one line of text: as it is where it is plain text, else with escapes.
pub(super) fn shown(bytes: &[u8]) -> String {
    bytes.shown().to_string()
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
        assert_eq!(
            shown("a\u{202e}\u{9b}\n\u{e9}".as_bytes()),
            "a\\u{202e}\\u{9b}\\n\u{e9}"
        );
        assert_eq!(json_path(b"\xff"), json!([255]));
    }

    #[test]
    fn only_our_own_output_may_be_closed() {
        let pipe = || std::io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&stdout_lost(pipe())));
        assert!(!is_closed_pipe(&Error::failed("x").because(pipe())));
    }
}
