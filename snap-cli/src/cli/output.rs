//! Output: data to standard output, everything else to standard error.
//!
//! All text for people passes through [`plain`] here. Names, comments and messages come from containers, archives and
//! configs, and must not control the terminal. Only [`write_line`] writes bytes without escaping.

use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use cowl_layers::shown::{Allowed, Show, plain};
use log::{LevelFilter, Log, Metadata, Record};
use serde_json::{Value, json};

use super::daemon_log;
use crate::config::ColorChoice;
use crate::error::{Error, Result};
/// Returns a path for JSON, exact for any bytes.
pub(super) use crate::store::bytes::to_value as json_path;

pub(super) use super::progress::Bar;
pub(super) use super::table::print_table;

/// The logger: prints records as notes, and in a daemon bounds the log file.
struct NoteLogger;

impl Log for NoteLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            print_message("note", "33", &record.args().to_string());
            if IS_DAEMON.load(Ordering::Relaxed) {
                // An error cannot be logged here: it would log recursively.
                let _unchanged = daemon_log::rotate_if_long();
            }
        }
    }

    fn flush(&self) {}
}

/// Installs the logger, which prints the library's warnings, and the panic hook.
pub(super) fn init_log() {
    cowl_layers::panics::install();
    // Fails only if a logger is installed already, which then prints the warnings.
    if log::set_logger(&NoteLogger).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Configures the logger for a daemon, whose standard error is its log: prints informational records, too, and bounds
/// the size of the log.
pub(super) fn log_as_daemon() {
    IS_DAEMON.store(true, Ordering::Relaxed);
    log::set_max_level(LevelFilter::Info);
}

/// Whether this process is a daemon.
static IS_DAEMON: AtomicBool = AtomicBool::new(false);
/// Whether notes and progress bars are suppressed.
static QUIET: AtomicBool = AtomicBool::new(false);
/// A [`ColorChoice`], global because a process runs one command line.
static COLOR: AtomicU8 = AtomicU8::new(ColorChoice::Auto as u8);

/// Applies `--quiet` and the count of `--verbose`.
pub(super) fn set_verbosity(quiet: bool, verbose: u8) {
    QUIET.store(quiet, Ordering::Relaxed);
    log::set_max_level(match (quiet, verbose) {
        (true, _) => LevelFilter::Error,
        (false, 0) => LevelFilter::Warn,
        (false, 1) => LevelFilter::Info,
        (false, _) => LevelFilter::Debug,
    });
}

/// Returns whether notes and progress bars are suppressed.
pub(super) fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Sets the conditions under which output is colored.
pub(super) fn set_color(choice: ColorChoice) {
    COLOR.store(choice as u8, Ordering::Relaxed);
}

/// Returns whether output to a stream is colored; `is_terminal` is about that stream.
fn is_colored(is_terminal: bool) -> bool {
    match COLOR.load(Ordering::Relaxed) {
        choice if choice == ColorChoice::Always as u8 => true,
        choice if choice == ColorChoice::Never as u8 => false,
        _ => is_terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
    }
}

/// A color or weight of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "the complete palette for commands")]
pub(super) enum Color {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
}

impl Color {
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

/// Colors text for standard output, or a table's cell, if standard output is colored.
pub(super) fn paint(color: Color, text: &str) -> String {
    if text.is_empty() || !is_colored(std::io::stdout().is_terminal()) {
        return text.to_owned();
    }
    format!("\u{1b}[{}m{text}\u{1b}[0m", color.code())
}

/// Prints a message with a label on standard error; `color` is the code of the label's color.
fn print_message(label: &str, color: &str, text: &str) {
    // Further lines are indented, so that the text cannot forge a line that begins with a label.
    let text = text.trim_end().replace('\n', "\n  ");
    let lines = Allowed {
        lines: true,
        colors: false,
    };
    let text = plain(&text, lines);
    let line = if is_colored(std::io::stderr().is_terminal()) {
        format!("\u{1b}[1;{color}m{label}:\u{1b}[0m {text}\n")
    } else {
        format!("{label}: {text}\n")
    };
    // If standard error fails, there is nowhere to report it.
    drop(std::io::stderr().write_all(line.as_bytes()));
}

/// Prints a note on standard error, unless `--quiet` is given.
pub(super) fn print_note(text: &str) {
    if !is_quiet() {
        print_message("note", "33", text);
    }
}

/// Prints a line that the command on another host printed on its standard error.
pub(super) fn print_remote(line: &str) {
    print_message("remote", "36", line);
}

/// Returns the options that give another command the verbosity of this one.
pub(super) fn verbosity_options() -> &'static [&'static str] {
    match log::max_level() {
        _ if is_quiet() => &["--quiet"],
        LevelFilter::Debug | LevelFilter::Trace => &["-v", "-v"],
        LevelFilter::Info => &["-v"],
        LevelFilter::Off | LevelFilter::Error | LevelFilter::Warn => &[],
    }
}

/// The format of a command's output and errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Json,
}

impl Format {
    /// Returns the format that the option `--json` selects.
    pub(super) fn from_option(json: bool) -> Self {
        match json {
            true => Self::Json,
            false => Self::Text,
        }
    }
}

/// Prints an error on standard error.
pub(super) fn print_error(error: &Error, format: Format) {
    if format == Format::Json {
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
    print_message("error", "31", &error.to_string());
    if let Some(hint) = &error.hint {
        print_message("hint", "36", hint);
    }
}

/// Prints a result of clap: help on standard output, usage errors on standard error. Returns the exit code.
pub(super) fn print_clap_output(error: clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    let is_usage_error = error.use_stderr();
    let colors = is_colored(match is_usage_error {
        true => std::io::stderr().is_terminal(),
        false => std::io::stdout().is_terminal(),
    });
    let colors = match colors {
        true => cowlfs::cli::Colors::On,
        false => cowlfs::cli::Colors::Off,
    };
    let text = cowlfs::cli::render_error(error, colors);
    let written = match is_usage_error {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
    match written {
        Ok(()) => ExitCode::from(code),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

const STDOUT: &str = "cannot write to standard output";

/// Converts an error of writing to standard output.
pub(super) fn stdout_error(error: std::io::Error) -> Error {
    Error::failed(STDOUT).because(error)
}

/// Returns whether the reader of standard output has closed the pipe, which is not an error (`cowl diff web | head`).
pub(super) fn is_closed_pipe(error: &Error) -> bool {
    error.what == STDOUT
        && error
            .source
            .as_ref()
            .and_then(|source| source.downcast_ref::<std::io::Error>())
            .is_some_and(|source| source.kind() == ErrorKind::BrokenPipe)
}

/// Returns the control characters that may be in text on standard output.
fn allowed(lines: bool) -> Allowed {
    Allowed {
        lines,
        colors: is_colored(std::io::stdout().is_terminal()),
    }
}

/// Escapes a part of a line for standard output. The width of a table's cell is that of the escaped text.
pub(super) fn escape_cell(text: &str) -> String {
    plain(text, allowed(false)).into_owned()
}

/// Prints one line of text, escaped.
pub(super) fn print_line(text: &str) -> Result<()> {
    write_line(plain(text, allowed(false)).as_bytes())
}

/// Prints text of any number of lines, escaped except for line breaks.
pub(super) fn print_text(text: &str) -> Result<()> {
    write_line(plain(text, allowed(true)).as_bytes())
}

/// Prints a path: escaped on a terminal, unchanged for programs.
pub(super) fn print_path(path: &std::path::Path) -> Result<()> {
    match std::io::stdout().is_terminal() {
        true => print_line(&path.shown().to_string()),
        false => write_line(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())),
    }
}

/// Writes bytes and a line break to standard output, without escaping.
pub(super) fn write_line(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(stdout_error)
}

/// Prints JSON on standard output.
pub(super) fn print_json(value: &Value) -> Result<()> {
    write_line(format!("{value:#}").as_bytes())
}

/// Returns the displayable form of a name or path; see [`Show::shown`].
pub(super) fn shown(bytes: &[u8]) -> String {
    bytes.shown().to_string()
}

/// Formats a number of objects: "1 layer", "2 layers".
pub(super) fn counted(number: usize, noun: &str) -> String {
    match number {
        1 => format!("1 {noun}"),
        n => format!("{n} {noun}s"),
    }
}

/// Formats a size with a binary unit.
pub(super) fn format_size(bytes: u64) -> String {
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

/// Formats a timestamp of a manifest in this machine's time zone. Returns an invalid one unchanged.
pub(super) fn format_local_time(stored: &str) -> String {
    match stored.parse::<jiff::Timestamp>() {
        Ok(time) => {
            let zoned = time.to_zoned_datetime(jiff::tz::TimeZone::system());
            zoned.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        Err(_) => stored.to_owned(),
    }
}

/// Formats seconds since 1970 in this machine's time zone; seconds out of range mean an unlimited time.
pub(super) fn format_local_second(second: i64) -> String {
    match jiff::Timestamp::from_second(second) {
        Ok(time) => format_local_time(&time.to_string()),
        Err(_) => "always".to_owned(),
    }
}

/// Formats seconds since 1970 as a timestamp of a manifest, in UTC.
pub(super) fn format_utc(second: i64) -> Option<String> {
    let time = jiff::Timestamp::from_second(second);
    time.map(|time| time.to_string()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_binary_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (200 << 20, "200 MiB"),
            (u64::MAX, "16383 PiB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }

    #[test]
    fn names_are_escaped_to_one_line() {
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
    fn only_a_closed_standard_output_is_a_closed_pipe() {
        let pipe = || std::io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&stdout_error(pipe())));
        assert!(!is_closed_pipe(&Error::failed("x").because(pipe())));
    }
}
