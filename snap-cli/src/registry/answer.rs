//! Answers of registries, and files of the user, of which a limited number of bytes is read.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;
use ureq::Body;
use ureq::http::{HeaderMap, Response, StatusCode, header};

use super::pace::PacedReader;
use crate::error::{Error, Kind, Result};

/// The maximum number of bytes of the answer that contains an error.
const MAX_ERROR: u64 = 64 << 10;

/// The maximum number of characters of a registry's text in a message.
const MAX_TEXT: usize = 300;

/// The longest time that a registry can request before the next attempt.
const MAX_DELAY: Duration = Duration::from_secs(60);

/// Returns the body of an answer; fails if it has more than `limit` bytes.
pub(super) fn read(response: Response<Body>, limit: u64, what: &str) -> Result<Vec<u8>> {
    let too_long = |size: Option<u64>| {
        let size = size.map_or("more".to_owned(), |size| format!("{size} bytes"));
        Error::failed(format!("{what} has {size}; the limit is {limit} bytes"))
    };
    let declared = content_length(response.headers());
    if declared.is_some_and(|size| size > limit) {
        return Err(too_long(declared));
    }
    let mut data = Vec::new();
    let reader = PacedReader::new(response.into_body().into_reader());
    let read = reader.take(limit.saturating_add(1)).read_to_end(&mut data);
    read.map_err(|error| Error::failed(format!("cannot read {what}")).because(error))?;
    match data.len() as u64 > limit {
        true => Err(too_long(None)),
        false => Ok(data),
    }
}

/// Returns whether a request with this answer may succeed later.
pub(super) fn is_temporary(status: StatusCode) -> bool {
    // 501 and 505 state that the server never supports the request.
    matches!(status.as_u16(), 408 | 429 | 500 | 502..=504 | 506..=599)
}

/// Returns the value of a header, if it is text.
pub(super) fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Returns the size of a body that a header declares.
pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    text(headers, header::CONTENT_LENGTH.as_str())?.parse().ok()
}

/// Returns the time after which a registry permits the next attempt (RFC 9110: a number of seconds, or a date).
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = text(headers, header::RETRY_AFTER.as_str())?;
    let seconds = text.parse::<u64>().ok().or_else(|| {
        let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
        let left = date
            .as_second()
            .saturating_sub(Timestamp::now().as_second());
        Some(u64::try_from(left).unwrap_or(0))
    })?;
    Some(Duration::from_secs(seconds).min(MAX_DELAY))
}

#[derive(Deserialize)]
struct Errors {
    errors: Vec<RegistryError>,
}

#[derive(Deserialize)]
struct RegistryError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// Returns the text of an answer that is an error: the status, and the registry's explanation.
pub(super) fn describe(response: Response<Body>) -> (StatusCode, String) {
    let status = response.status();
    let mut text = status.as_u16().to_string();
    if let Some(reason) = status.canonical_reason() {
        text = format!("{text} {reason}");
    }
    let reader = PacedReader::new(response.into_body().into_reader());
    let mut data = Vec::new();
    if let Err(error) = reader.take(MAX_ERROR).read_to_end(&mut data) {
        log::debug!("cannot read the explanation of an error: {error}");
    }
    if let Ok(Errors { errors }) = serde_json::from_slice(&data)
        && let Some(RegistryError { code, message }) = errors.into_iter().next()
    {
        let parts = [code, message];
        let parts: Vec<_> = parts.iter().filter(|part| !part.is_empty()).collect();
        for part in parts {
            text = format!("{text}: {}", shortened(part));
        }
    }
    (status, text)
}

/// Returns the beginning of a text, on one line.
pub(super) fn shortened(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let line = words.join(" ");
    match line.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}...", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

/// Reads a file of at most `limit` bytes. If it does not exist, the error has the kind [`Kind::NotFound`].
pub(super) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error {
            kind: Kind::NotFound,
            ..Error::at("read", path, error)
        },
        _ => Error::at("read", path, error),
    })?;
    read_open_file((&file, path), limit)
}

/// Reads an open file of at most `limit` bytes.
pub(super) fn read_open_file((file, path): (&File, &Path), limit: u64) -> Result<Vec<u8>> {
    let at = |error| Error::at("read", path, error);
    let mut data = Vec::new();
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut data);
    read.map_err(at)?;
    if data.len() as u64 > limit {
        let too_long = std::io::Error::other(format!("it has more than {limit} bytes"));
        return Err(at(too_long));
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, body: &str) -> Response<Body> {
        let body = Body::builder().data(body.to_owned());
        Response::builder().status(status).body(body).unwrap()
    }

    #[test]
    fn answers_are_limited() {
        assert_eq!(read(response(200, "1234"), 4, "it").unwrap(), b"1234");
        assert!(read(response(200, "12345"), 4, "it").is_err());
    }

    #[test]
    fn requested_waits_are_limited() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(wait("7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("86400"), Some(MAX_DELAY));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(wait("Mon, 06 Nov 2293 08:49:37 GMT"), Some(MAX_DELAY));
        for bad in ["", "-1", "soon", "99999999999999999999"] {
            assert_eq!(wait(bad), None, "{bad}");
        }
    }

    #[test]
    fn errors_of_registries_are_shortened() {
        let json = r#"{"errors":[{"code":"DENIED","message":"no\naccess"}]}"#;
        assert_eq!(
            describe(response(403, json)).1,
            "403 Forbidden: DENIED: no access"
        );
        assert_eq!(
            describe(response(500, "<html>")).1,
            "500 Internal Server Error"
        );
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "x".repeat(1000));
        assert!(describe(response(400, &long)).1.len() < 400);
    }
}
