//! Text input: on the command line, from a file, from an editor.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The maximum length of a comment in bytes. A longer file is probably not meant as a comment.
const MAX_LENGTH: u64 = 64 << 10;

/// Converts a word of the command line to text, without trailing blanks.
pub(super) fn parse(word: &OsString) -> Result<String> {
    match word.to_str() {
        Some(text) => Ok(text.trim_end().to_owned()),
        None => Err(Error::usage("the text is not valid UTF-8")),
    }
}

/// Reads the text of a file, or of standard input for "-", without trailing blanks.
pub(super) fn read_text(file: &Path) -> Result<String> {
    let at = |error| Error::at("read", file, error);
    let mut bytes = Vec::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin()
            .lock()
            .take(MAX_LENGTH + 1)
            .read_to_end(&mut bytes),
        false => std::fs::File::open(file)
            .map_err(at)?
            .take(MAX_LENGTH + 1)
            .read_to_end(&mut bytes),
    };
    read.map_err(at)?;
    if bytes.len() as u64 > MAX_LENGTH {
        return Err(Error::usage(format!(
            "cannot use {} as a comment: it is longer than {MAX_LENGTH} bytes",
            file.shown()
        )));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(_) => Err(Error::usage(format!("{} is not valid UTF-8", file.shown()))),
    }
}

/// Opens `text` in the user's editor and returns the edited text.
pub(super) fn edit(text: &str) -> Result<String> {
    let failed = |error: std::io::Error| Error::failed("cannot edit the text").because(error);
    let mut file = tempfile::Builder::new()
        .prefix("cowl-comment-")
        .suffix(".txt")
        .tempfile()
        .map_err(failed)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.flush())
        .map_err(failed)?;
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR"));
    let editor = editor.unwrap_or_else(|| OsString::from("vi"));
    // The variable may contain arguments, as in other programs.
    let status = Command::new("sh")
        .args(["-c", "exec $COWL_EDITOR \"$1\"", "cowl"])
        .arg(file.path())
        .env("COWL_EDITOR", &editor)
        .status()
        .map_err(failed)?;
    if !status.success() {
        return Err(Error::failed(format!(
            "the editor {} failed: {status}; nothing was changed",
            editor.shown()
        ))
        .hint("set VISUAL or EDITOR, or write the text on the command line"));
    }
    read_text(file.path())
}

/// Parses a time: in this machine's time zone, with a time zone of its own, or an age.
pub(super) fn parse_time(word: &OsString) -> Result<jiff::Timestamp> {
    let text = parse(word)?;
    time_at(&text, &jiff::ZonedDateTime::now()).ok_or_else(|| {
        Error::usage(format!("invalid time: \"{text}\"")).hint(
            "write a time as 2026-11-24, \"2026-11-24 13:00\", 2026-11-24T13:00:00Z, or an age: 7d, 36h, 2w",
        )
    })
}

/// Parses a time; ages and the default time zone come from `now`.
fn time_at(text: &str, now: &jiff::ZonedDateTime) -> Option<jiff::Timestamp> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Some(time);
    }
    if let Ok(time) = text.parse::<jiff::civil::DateTime>() {
        let zoned = time.to_zoned_datetime(now.time_zone().clone()).ok()?;
        return Some(zoned.timestamp());
    }
    let age = text.parse::<jiff::Span>().ok()?;
    Some(now.checked_sub(age.abs()).ok()?.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_ages_are_parsed() {
        let now: jiff::ZonedDateTime = "2026-11-24T13:00:00+01:00[Europe/Berlin]".parse().unwrap();
        for (text, utc) in [
            ("2026-11-24", "2026-11-23T23:00:00Z"),
            ("2026-11-24 12:30", "2026-11-24T11:30:00Z"),
            ("2026-11-24T12:30:00Z", "2026-11-24T12:30:00Z"),
            ("7d", "2026-11-17T12:00:00Z"),
            ("36h", "2026-11-23T00:00:00Z"),
            ("2w", "2026-11-10T12:00:00Z"),
            // Daylight saving time ended within this month.
            ("1mo", "2026-10-24T11:00:00Z"),
        ] {
            let found = time_at(text, &now).map(|time| time.to_string());
            assert_eq!(found.as_deref(), Some(utc), "{text}");
        }
        for bad in ["", "x", "7", "13:00", "2026-13-01"] {
            assert_eq!(time_at(bad, &now), None, "{bad}");
        }
    }

    #[test]
    fn unsuitable_files_are_refused_as_comments() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("comment");
        std::fs::write(&file, "one\ntwo\n\n").unwrap();
        assert_eq!(read_text(&file).unwrap(), "one\ntwo");
        std::fs::write(&file, b"\xff").unwrap();
        assert!(read_text(&file).is_err());
        std::fs::write(&file, vec![b'x'; 70_000]).unwrap();
        assert!(read_text(&file).is_err());
        assert!(read_text(&dir.path().join("absent")).is_err());
    }
}
