//! The present moment, and spans of time as people type them: `7d`, `36h`, `2 weeks`, `1mo`.

use jiff::{Span, Timestamp, ZonedDateTime};

use crate::error::{Error, Result};

/// Reads a span; it must not be negative.
pub fn parse(text: &str) -> Result<Span> {
    let refused = |why: String| {
        Error::usage(format!(
            "\"{}\" is no span of time: {why}",
            text.escape_default()
        ))
        .hint("type a number and a unit: 36h, 7d, 2w, 6mo, 1y")
    };
    let span: Span = text
        .parse()
        .map_err(|e: jiff::Error| refused(e.to_string()))?;
    match span.is_negative() {
        true => Err(refused("it is negative".to_owned())),
        false => Ok(span),
    }
}

/// The second at which a span from now ends; the end of time when it is too long for the calendar.
pub fn until(span: &Span) -> i64 {
    match ZonedDateTime::now().checked_add(*span) {
        Ok(end) => end.timestamp().as_second(),
        Err(_) => Timestamp::MAX.as_second(),
    }
}

/// The present moment, in the form in which manifests record it.
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
    fn spans() {
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
