//! Filters and sorts lists of snapshots.
//!
//! Pure.

use std::cmp::Reverse;

use cowl_layers::shown::Show as _;
use globset::{GlobBuilder, GlobMatcher};
use jiff::Timestamp;

use super::list::SnapshotEntry;
use crate::error::{Error, Result};
use crate::store::manifest::SnapshotKind;

/// The conditions on listed snapshots.
///
/// An empty field imposes none.
#[derive(Debug, Default)]
pub struct Filter {
    /// The earliest creation time.
    pub since: Option<Timestamp>,
    /// The end of the creation times, exclusive.
    pub until: Option<Timestamp>,
    /// The required tags: keys, each with a value if one is required.
    pub tags: Vec<(String, Option<String>)>,
    /// The pattern that the name or the comment must match.
    pub pattern: Option<Pattern>,
    /// The accepted kinds.
    pub kinds: Vec<SnapshotKind>,
}

impl Filter {
    /// Returns whether a snapshot meets all conditions.
    ///
    /// An invalid time meets no condition on the time.
    pub fn matches(&self, entry: &SnapshotEntry) -> bool {
        let snapshot = &entry.snapshot;
        let time = || snapshot.created.parse::<Timestamp>();
        let late = self
            .since
            .is_none_or(|since| time().is_ok_and(|time| time >= since));
        let early = self
            .until
            .is_none_or(|until| time().is_ok_and(|time| time < until));
        let tagged = self.tags.iter().all(|(key, wanted)| {
            let found = snapshot.tags.get(key);
            found.is_some_and(|value| wanted.as_ref().is_none_or(|wanted| wanted == value))
        });
        let named = self.pattern.as_ref().is_none_or(|pattern| {
            pattern.matches(snapshot.name.as_str()) || pattern.matches(&snapshot.comment)
        });
        let kind = self.kinds.is_empty() || self.kinds.contains(&snapshot.kind);
        late && early && tagged && named && kind
    }
}

/// A case-insensitive pattern for text.
#[derive(Debug)]
pub enum Pattern {
    /// The text contains this string, which is in lower case.
    Substring(String),
    /// The whole text matches this shell pattern.
    Glob(GlobMatcher),
}

impl Pattern {
    /// Parses a shell pattern if `text` contains one of `*?[`, and otherwise a substring.
    pub fn parse(text: &str) -> Result<Self> {
        if !text.contains(['*', '?', '[']) {
            return Ok(Self::Substring(text.to_lowercase()));
        }
        let glob = GlobBuilder::new(text).case_insensitive(true).build();
        glob.map(|glob| Self::Glob(glob.compile_matcher()))
            .map_err(|error| {
                Error::usage(format!("invalid pattern \"{}\"", text.shown()))
                    .because(error)
                    .hint("use the shell's pattern syntax: * ? [abc]")
            })
    }

    /// Returns whether the text matches.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Substring(part) => text.to_lowercase().contains(part),
            Self::Glob(glob) => glob.is_match(text),
        }
    }
}

/// The sort order of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The order of creation, independent of the clock.
    #[default]
    Taken,
    /// By creation time.
    Time,
    /// By name; numbers in names by their value.
    Name,
    /// By size, the largest first.
    Size,
    /// By comment.
    Comment,
}

/// Sorts a list.
///
/// The sort is stable.
pub fn sort(entries: &mut [SnapshotEntry], order: Order) {
    match order {
        Order::Taken => {}
        Order::Time => entries.sort_by_key(|e| e.snapshot.created.parse::<Timestamp>().ok()),
        Order::Name => entries.sort_by_cached_key(|e| natural_key(e.snapshot.name.as_str())),
        Order::Size => entries.sort_by_key(|e| Reverse(e.bytes)),
        Order::Comment => entries.sort_by(|a, b| a.snapshot.comment.cmp(&b.snapshot.comment)),
    }
}

/// Returns the sort key of a name: pairs of text and number, so that snap10 follows snap9.
pub fn natural_key(name: &str) -> Vec<(String, u128)> {
    let mut parts: Vec<(String, u128)> = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (before, after) = rest.split_at(text);
        let digits = after
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(after.len());
        let (number, tail) = after.split_at(digits);
        // Numbers that overflow sort last; a name has at most 64 digits.
        parts.push((before.to_owned(), number.parse().unwrap_or(u128::MAX)));
        rest = tail;
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::store::manifest::{Durability, LayerId, SnapshotId, SnapshotRef};
    use crate::store::name::SnapshotName;

    fn entry(name: &str, created: &str, comment: &str, tags: &[(&str, &str)]) -> SnapshotEntry {
        let tags = tags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        SnapshotEntry {
            snapshot: SnapshotRef {
                id: SnapshotId::fresh(),
                name: SnapshotName::parse(name).unwrap(),
                kind: SnapshotKind::Manual,
                created: created.to_owned(),
                parent: None,
                layer: LayerId::fresh(),
                comment: comment.to_owned(),
                tags: tags.collect::<BTreeMap<_, _>>(),
                protected: false,
                settling: None,
                extra: serde_json::Map::new(),
            },
            parent: None,
            bytes: name.len() as u64,
            durability: Durability::Durable,
        }
    }

    #[test]
    fn filters_match() {
        let one = entry(
            "snap0",
            "2026-01-02T03:04:05Z",
            "Before the upgrade",
            &[("env", "prod")],
        );
        let matches = |filter: Filter| filter.matches(&one);
        assert!(matches(Filter::default()));
        let time = |text: &str| Some(text.parse().unwrap());
        for (since, until, expected) in [
            (time("2026-01-02T03:04:05Z"), None, true),
            (time("2026-01-02T03:04:06Z"), None, false),
            (None, time("2026-01-02T03:04:05Z"), false),
            (None, time("2026-01-02T04:04:06+00:00"), true),
        ] {
            let filter = Filter {
                since,
                until,
                ..Filter::default()
            };
            assert_eq!(matches(filter), expected);
        }
        for (key, value, expected) in [
            ("env", None, true),
            ("env", Some("prod"), true),
            ("env", Some("test"), false),
            ("other", None, false),
        ] {
            let tags = vec![(key.to_owned(), value.map(str::to_owned))];
            assert_eq!(
                matches(Filter {
                    tags,
                    ..Filter::default()
                }),
                expected
            );
        }
        for (text, expected) in [
            ("UPGRADE", true),
            ("snap0", true),
            ("snap", true),
            ("snap?", true),
            ("*the*", true),
            ("the", true),
            ("the*", false),
            ("x", false),
        ] {
            let pattern = Some(Pattern::parse(text).unwrap());
            assert_eq!(
                matches(Filter {
                    pattern,
                    ..Filter::default()
                }),
                expected,
                "{text}"
            );
        }
        assert!(Pattern::parse("[").is_err());
        let kinds = vec![SnapshotKind::Auto, SnapshotKind::Scheduled];
        assert!(!matches(Filter {
            kinds,
            ..Filter::default()
        }));
    }

    #[test]
    fn an_invalid_time_matches_no_time_filter() {
        let odd = entry("a", "yesterday", "", &[]);
        let since = Some("2000-01-01T00:00:00Z".parse().unwrap());
        assert!(
            !Filter {
                since,
                ..Filter::default()
            }
            .matches(&odd)
        );
    }

    #[test]
    fn snapshots_are_sorted_in_every_order() {
        let list = || {
            vec![
                entry("snap10", "2026-01-01T00:00:00Z", "b", &[]),
                entry("snap9", "2026-01-03T00:00:00Z", "a", &[]),
                // The clock went back.
                entry("zz", "2025-01-01T00:00:00Z", "c", &[]),
            ]
        };
        for (order, expected) in [
            (Order::Taken, ["snap10", "snap9", "zz"]),
            (Order::Time, ["zz", "snap10", "snap9"]),
            (Order::Name, ["snap9", "snap10", "zz"]),
            (Order::Size, ["snap10", "snap9", "zz"]),
            (Order::Comment, ["snap9", "snap10", "zz"]),
        ] {
            let mut sorted = list();
            sort(&mut sorted, order);
            let names: Vec<_> = sorted.iter().map(|e| e.snapshot.name.as_str()).collect();
            assert_eq!(names, expected, "{order:?}");
        }
    }
}
