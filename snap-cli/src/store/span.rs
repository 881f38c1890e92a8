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

/// The difference between the clocks of two hosts that is accepted.
const SKEW: std::time::Duration = std::time::Duration::from_secs(60);

/// Returns a time that another host claims. One that is invalid or in the future becomes the current time: it would be the
/// newest one for ever, and `cowl prune` retains the newest.
pub fn claimed(text: Option<&str>) -> String {
    let time = text.and_then(|text| text.parse::<Timestamp>().ok());
    let limit = Timestamp::now().saturating_add(SKEW);
    let past = time.filter(|time| limit.as_ref().is_ok_and(|limit| time <= limit));
    past.map_or_else(now, |time| time.to_string())
}

/// Returns a time that another host claims. One that is invalid becomes the current time.
pub fn valid(text: &str) -> String {
    let time = text.parse::<Timestamp>();
    time.map_or_else(|_| now(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_the_future_are_not_accepted() {
        assert_eq!(
            claimed(Some("2026-01-02T03:04:05Z")),
            "2026-01-02T03:04:05Z"
        );
        for bad in [Some("9000-01-01T00:00:00Z"), Some("x"), None] {
            let time: Timestamp = claimed(bad).parse().unwrap();
            let limit = Timestamp::now().saturating_add(SKEW).unwrap();
            assert!(time <= limit, "{bad:?}");
        }
    }

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
