//! Texts that people write: on the command line, in a file, in an editor.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// A longer remark is a mistake: some other file.
const LONGEST: u64 = 64 << 10;

/// A word of the command line as text.
pub(super) fn plain(word: &OsString) -> Result<String> {
    match word.to_str() {
        Some(text) => Ok(text.trim_end().to_owned()),
        None => Err(Error::usage("the text is not valid UTF-8")),
    }
}

/// The text of a file, or of standard input for "-"; blank lines at its end are left out.
pub(super) fn read_text(file: &Path) -> Result<String> {
    let at = |error| Error::at("read", file, error);
    let mut bytes = Vec::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin()
            .lock()
            .take(LONGEST + 1)
            .read_to_end(&mut bytes),
        false => std::fs::File::open(file)
            .map_err(at)?
            .take(LONGEST + 1)
            .read_to_end(&mut bytes),
    };
    read.map_err(at)?;
    if bytes.len() as u64 > LONGEST {
        return Err(Error::usage(format!(
            "{} is longer than {LONGEST} bytes: is that a remark?",
            file.shown()
        )));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(_) => Err(Error::usage(format!("{} is not valid UTF-8", file.shown()))),
    }
}

/// What somebody makes of `text` in an editor.
pub(super) fn edited(text: &str) -> Result<String> {
    let lost = |error: std::io::Error| Error::failed("cannot edit the text").because(error);
    let mut file = tempfile::Builder::new()
        .prefix("cowl-comment-")
        .suffix(".txt")
        .tempfile()
        .map_err(lost)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.flush())
        .map_err(lost)?;
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR"));
    let editor = editor.unwrap_or_else(|| OsString::from("vi"));
    // The variable may hold arguments, as other programs take it.
    let status = Command::new("sh")
        .args(["-c", "exec $COWL_EDITOR \"$1\"", "cowl"])
        .arg(file.path())
        .env("COWL_EDITOR", &editor)
        .status()
        .map_err(lost)?;
    if !status.success() {
        return Err(Error::failed(format!(
            "the editor {} ended with {status}; nothing was changed",
            editor.shown()
        ))
        .hint("set VISUAL or EDITOR, or give the text on the command line"));
    }
    read_text(file.path())
}

/// A moment: a time of this machine's zone, one with a zone of its own, or an age.
pub(super) fn moment(word: &OsString) -> Result<jiff::Timestamp> {
    let text = plain(word)?;
    at_moment(&text, &jiff::ZonedDateTime::now()).ok_or_else(|| {
        Error::usage(format!("\"{text}\" is no time")).hint(
            "a time is 2026-11-24, \"2026-11-24 13:00\", 2026-11-24T13:00:00Z, or an age: 7d, 36h, 2w",
        )
    })
}

fn at_moment(text: &str, now: &jiff::ZonedDateTime) -> Option<jiff::Timestamp> {
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
    fn moments() {
        let now: jiff::ZonedDateTime = "2026-11-24T13:00:00+01:00[Europe/Berlin]".parse().unwrap();
        for (text, utc) in [
            ("2026-11-24", "2026-11-23T23:00:00Z"),
            ("2026-11-24 12:30", "2026-11-24T11:30:00Z"),
            ("2026-11-24T12:30:00Z", "2026-11-24T12:30:00Z"),
            ("7d", "2026-11-17T12:00:00Z"),
            ("36h", "2026-11-23T00:00:00Z"),
            ("2w", "2026-11-10T12:00:00Z"),
            // The clocks were changed on the way.
            ("1mo", "2026-10-24T11:00:00Z"),
        ] {
            let found = at_moment(text, &now).map(|time| time.to_string());
            assert_eq!(found.as_deref(), Some(utc), "{text}");
        }
        for bad in ["", "x", "7", "13:00", "2026-13-01"] {
            assert_eq!(at_moment(bad, &now), None, "{bad}");
        }
    }

    #[test]
    fn files_that_hold_no_remark() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("remark");
        std::fs::write(&file, "one\ntwo\n\n").unwrap();
        assert_eq!(read_text(&file).unwrap(), "one\ntwo");
        std::fs::write(&file, b"\xff").unwrap();
        assert!(read_text(&file).is_err());
        std::fs::write(&file, vec![b'x'; 70_000]).unwrap();
        assert!(read_text(&file).is_err());
        assert!(read_text(&dir.path().join("absent")).is_err());
    }
}
