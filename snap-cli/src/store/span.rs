//! The current time, and the grammar of time spans: `7d`, `36h`, `2 weeks`, `1mo`.

use jiff::{Span, Timestamp, ZonedDateTime};

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Parses a span, which must not be negative.
pub fn parse(text: &str) -> Result<Span> {
    let refused = |why: String| {
        Error::usage(format!("invalid time span \"{}\": {why}", text.shown()))
            .hint("specify a number and a unit: 36h, 7d, 2w, 6mo, 1y")
    };
    let span: Span = text
        .parse()
        .map_err(|e: jiff::Error| refused(e.to_string()))?;
    match span.is_negative() {
        true => Err(refused("it is negative".to_owned())),
        false => Ok(span),
    }
}

/// Returns the end of a span from now, in seconds since 1970. A span that is too long ends at the maximum timestamp.
pub fn until(span: &Span) -> i64 {
    match ZonedDateTime::now().checked_add(*span) {
        Ok(end) => end.timestamp().as_second(),
        Err(_) => Timestamp::MAX.as_second(),
    }
}

/// Returns the current time in the format of manifests (RFC 3339, UTC, milliseconds).
pub fn now() -> String {
    let now = jiff::Timestamp::now();
    match now.round(jiff::Unit::Millisecond) {
        Ok(rounded) => rounded.to_string(),
        Err(_) => now.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_parsed() {
        for good in ["7d", "36h", "2w", "1mo", "1y 2d", "0d", "90 minutes"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["", "7", "d", "-7d", "7 parsecs", "7d ago"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let now = Timestamp::now().as_second();
        let week = until(&parse("7d").unwrap()) - now;
        assert!((6 * 86_400..=8 * 86_400).contains(&week), "{week}");
        assert!(until(&parse("19000y").unwrap()) > now);
    }
}
