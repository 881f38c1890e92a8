//! Which snapshots of a list are meant, and in which order. Pure.

use std::cmp::Reverse;

use globset::{GlobBuilder, GlobMatcher};
use jiff::Timestamp;

use super::list::Entry;
use crate::error::{Error, Result};
use crate::store::manifest::SnapshotKind;

/// What a snapshot must be to be listed; what is left empty asks for nothing.
#[derive(Debug, Default)]
pub struct Filter {
    /// Taken at this moment or later.
    pub since: Option<Timestamp>,
    /// Taken before this moment.
    pub until: Option<Timestamp>,
    /// Has all of these tags: a key, and the value where one is asked for.
    pub tags: Vec<(String, Option<String>)>,
    /// Its name, or its remark, fits.
    pub pattern: Option<Pattern>,
    /// Made by one of these.
    pub kinds: Vec<SnapshotKind>,
}

impl Filter {
    /// Whether the filter lets it through. One whose time can't be read has no time.
    pub fn takes(&self, entry: &Entry) -> bool {
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
        let fits = self.pattern.as_ref().is_none_or(|pattern| {
            pattern.fits(snapshot.name.as_str()) || pattern.fits(&snapshot.comment)
        });
        let kind = self.kinds.is_empty() || self.kinds.contains(&snapshot.kind);
        late && early && tagged && fits && kind
    }
}

/// What a text must look like: a shell's pattern, or a part of it, in whatever case.
#[derive(Debug)]
pub enum Pattern {
    /// The text has this part.
    Part(String),
    /// The whole text is like this.
    Glob(GlobMatcher),
}

impl Pattern {
    /// A pattern of a shell when it has one of `*?[`, else a part.
    pub fn parse(text: &str) -> Result<Self> {
        if !text.contains(['*', '?', '[']) {
            return Ok(Self::Part(text.to_lowercase()));
        }
        let glob = GlobBuilder::new(text).case_insensitive(true).build();
        glob.map(|glob| Self::Glob(glob.compile_matcher()))
            .map_err(|error| {
                Error::usage(format!("\"{text}\" is no pattern"))
                    .because(error)
                    .hint("a pattern is as in a shell: * ? [abc]")
            })
    }

    /// Whether the text is like this.
    pub fn fits(&self, text: &str) -> bool {
        match self {
            Self::Part(part) => text.to_lowercase().contains(part),
            Self::Glob(glob) => glob.is_match(text),
        }
    }
}

/// By what a list is sorted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// As they were taken, whatever the clock said.
    #[default]
    Taken,
    /// By the clock.
    Time,
    /// By name; numbers in names by their value.
    Name,
    /// The largest first.
    Size,
    /// By remark.
    Comment,
}

/// Sorts a list; what is equal stays as it was.
pub fn sort(entries: &mut [Entry], order: Order) {
    match order {
        Order::Taken => {}
        Order::Time => entries.sort_by_key(|e| e.snapshot.created.parse::<Timestamp>().ok()),
        Order::Name => entries.sort_by_cached_key(|e| natural(e.snapshot.name.as_str())),
        Order::Size => entries.sort_by_key(|e| Reverse(e.bytes)),
        Order::Comment => entries.sort_by(|a, b| a.snapshot.comment.cmp(&b.snapshot.comment)),
    }
}

/// A name cut into text and numbers, so that snap10 comes after snap9.
pub fn natural(name: &str) -> Vec<(String, u128)> {
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
        // At most 64 digits: what no number holds is as large as can be.
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

    fn entry(name: &str, created: &str, comment: &str, tags: &[(&str, &str)]) -> Entry {
        let tags = tags.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Entry {
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
    fn filters() {
        let one = entry(
            "snap0",
            "2026-01-02T03:04:05Z",
            "Before the upgrade",
            &[("env", "prod")],
        );
        let takes = |filter: Filter| filter.takes(&one);
        assert!(takes(Filter::default()));
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
            assert_eq!(takes(filter), expected);
        }
        for (key, value, expected) in [
            ("env", None, true),
            ("env", Some("prod"), true),
            ("env", Some("test"), false),
            ("other", None, false),
        ] {
            let tags = vec![(key.to_owned(), value.map(str::to_owned))];
            assert_eq!(
                takes(Filter {
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
                takes(Filter {
                    pattern,
                    ..Filter::default()
                }),
                expected,
                "{text}"
            );
        }
        assert!(Pattern::parse("[").is_err());
        let kinds = vec![SnapshotKind::Auto, SnapshotKind::Scheduled];
        assert!(!takes(Filter {
            kinds,
            ..Filter::default()
        }));
    }

    #[test]
    fn a_time_that_can_not_be_read_is_none() {
        let odd = entry("a", "yesterday", "", &[]);
        let since = Some("2000-01-01T00:00:00Z".parse().unwrap());
        assert!(
            !Filter {
                since,
                ..Filter::default()
            }
            .takes(&odd)
        );
    }

    #[test]
    fn orders() {
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
