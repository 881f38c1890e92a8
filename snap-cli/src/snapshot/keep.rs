//! What pruning keeps: one pure function over times, kinds and tags.
//!
//! Days, weeks and the rest are those of a time zone, as a calendar on the wall has them. Of each, the newest
//! snapshot stays. A snapshot that was taken while the clock was wrong counts where its time says; which ones
//! are the last is told by their order alone.

use std::collections::HashSet;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::shell::quoted;
use crate::store::manifest::{SnapshotKind, SnapshotRef};
use crate::store::span;

/// What is kept. Kept with a container's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rules {
    /// The last N.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<u32>,
    /// The newest of each of the latest N hours that have any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hourly: Option<u32>,
    /// The same of days.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daily: Option<u32>,
    /// The same of weeks, which begin on Monday.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weekly: Option<u32>,
    /// The same of months.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monthly: Option<u32>,
    /// The same of years.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub yearly: Option<u32>,
    /// All that are not older than this span.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
    /// All with one of these tags: "KEY" or "KEY=VALUE".
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Those that somebody asked for may go, too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub manual: bool,
    /// Protected ones may go, too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// What this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// What becomes of one snapshot, and why it stays; nothing: it goes.
pub type Verdict = Vec<String>;

impl Rules {
    /// Whether they say nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether they say which snapshots may go, and not what is kept.
    pub fn says_only_which(&self) -> bool {
        let kept = Self {
            manual: false,
            protected: false,
            ..self.clone()
        };
        !self.is_empty() && kept.is_empty()
    }

    /// The rules as options of a command line.
    pub fn typed(&self) -> String {
        let counts = [
            ("last", self.last),
            ("hourly", self.hourly),
            ("daily", self.daily),
            ("weekly", self.weekly),
            ("monthly", self.monthly),
            ("yearly", self.yearly),
        ];
        let mut words = Vec::new();
        for (name, count) in counts {
            words.extend(count.map(|count| format!("--keep-{name} {count}")));
        }
        let within = self.within.iter();
        words.extend(within.map(|span| format!("--keep-within {}", quoted(span))));
        let tags = self.tags.iter();
        words.extend(tags.map(|tag| format!("--keep-tag {}", quoted(tag))));
        words.extend(self.manual.then(|| "--manual".to_owned()));
        words.extend(self.protected.then(|| "--protected".to_owned()));
        words.join(" ")
    }

    /// Rules that keep nothing at all are a mistake.
    pub fn check(&self) -> Result<()> {
        if !self.extra.is_empty() {
            let unknown: Vec<_> = self.extra.keys().map(String::as_str).collect();
            return Err(Error::failed(format!(
                "the settings say something that this program does not know: {}",
                unknown.join(", ")
            ))
            .hint("a newer cowl wrote them: use that, or give the rules on the command line"));
        }
        let counts = [
            self.last,
            self.hourly,
            self.daily,
            self.weekly,
            self.monthly,
            self.yearly,
        ];
        let some = counts.iter().flatten().any(|count| *count > 0);
        if let Some(within) = &self.within {
            span::parse(within)?;
        }
        if !some && self.within.is_none() && self.tags.is_empty() {
            return Err(
                Error::usage("nothing says which snapshots to keep: all would go").hint(
                    "say it, for example: --keep-last 3 --keep-daily 7; `cowl rm NAME --all` \
                     removes all",
                ),
            );
        }
        Ok(())
    }
}

/// A snapshot with its time where it can be read.
struct Candidate<'s> {
    at: usize,
    snapshot: &'s SnapshotRef,
    time: Option<ZonedDateTime>,
}

/// What becomes of each snapshot, in their order, oldest first.
pub fn choose(
    snapshots: &[SnapshotRef],
    rules: &Rules,
    now: Timestamp,
    zone: &TimeZone,
) -> Result<Vec<Verdict>> {
    rules.check()?;
    let mut verdicts: Vec<Verdict> = vec![Verdict::new(); snapshots.len()];
    let mut keep = |at: usize, why: String| {
        if let Some(verdict) = verdicts.get_mut(at) {
            verdict.push(why);
        }
    };
    let mut candidates = Vec::new();
    for (at, snapshot) in snapshots.iter().enumerate() {
        let out_of_bounds = [
            (snapshot.kind == SnapshotKind::Manual && !rules.manual).then_some("manual"),
            (snapshot.protected && !rules.protected).then_some("protected"),
        ];
        let mut free = true;
        for why in out_of_bounds.into_iter().flatten() {
            keep(at, why.to_owned());
            free = false;
        }
        if free {
            let time = snapshot.created.parse::<Timestamp>();
            let time = time.map(|time| time.to_zoned_datetime(zone.clone()));
            if let Err(error) = &time {
                keep(at, format!("its time can't be read ({error})"));
            }
            candidates.push(Candidate {
                at,
                snapshot,
                time: time.ok(),
            });
        }
    }
    let last = rules.last.unwrap_or_default();
    for candidate in candidates.iter().rev().take(size(last)) {
        keep(candidate.at, "last".to_owned());
    }
    for candidate in &candidates {
        if let Some(tag) = rules.tags.iter().find(|tag| has(candidate.snapshot, tag)) {
            keep(candidate.at, format!("tag {tag}"));
        }
    }
    if let Some(within) = &rules.within {
        let now = now.to_zoned_datetime(zone.clone());
        // Further back than the calendar goes: everything is younger.
        let from = now.checked_sub(span::parse(within)?).ok();
        for candidate in &candidates {
            let time = candidate.time.as_ref();
            if time.is_some_and(|time| from.as_ref().is_none_or(|from| time >= from)) {
                keep(candidate.at, format!("within {within}"));
            }
        }
    }
    // The newest comes first; of equal times the later in the list.
    candidates.retain(|candidate| candidate.time.is_some());
    candidates.sort_by(|a, b| (&b.time, b.at).cmp(&(&a.time, a.at)));
    for (count, name, period) in periods(rules) {
        let mut seen = HashSet::new();
        for candidate in &candidates {
            let Some(time) = &candidate.time else {
                continue;
            };
            if seen.len() >= size(count) {
                break;
            }
            let period = period(time);
            if seen.insert(period.clone()) {
                keep(candidate.at, format!("{name} {period}"));
            }
        }
    }
    Ok(verdicts)
}

fn size(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// What tells one hour, day, ... from another.
type Period = fn(&ZonedDateTime) -> String;

fn periods(rules: &Rules) -> [(u32, &'static str, Period); 5] {
    let count = |count: Option<u32>| count.unwrap_or_default();
    [
        // With the offset: the hour before the clocks are put back is not the one after.
        (count(rules.hourly), "hour", |time| {
            format!("{} {:02}:00{}", time.date(), time.hour(), time.offset())
        }),
        (count(rules.daily), "day", |time| time.date().to_string()),
        (count(rules.weekly), "week", |time| {
            let week = time.iso_week_date();
            format!("{}-W{:02}", week.year(), week.week())
        }),
        (count(rules.monthly), "month", |time| {
            format!("{}-{:02}", time.year(), time.month())
        }),
        (count(rules.yearly), "year", |time| time.year().to_string()),
    ]
}

fn has(snapshot: &SnapshotRef, tag: &str) -> bool {
    match tag.split_once('=') {
        Some((key, value)) => snapshot.tags.get(key).is_some_and(|found| found == value),
        None => snapshot.tags.contains_key(tag),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::error::Kind;
    use crate::store::manifest::{LayerId, SnapshotId};
    use crate::store::name::SnapshotName;

    /// Snapshots with these times, oldest first.
    fn snapshots(times: &[&str]) -> Vec<SnapshotRef> {
        let snapshot = |(at, time): (usize, &&str)| SnapshotRef {
            id: SnapshotId::fresh(),
            name: SnapshotName::counted(at as u64),
            kind: SnapshotKind::Scheduled,
            created: (*time).to_owned(),
            parent: None,
            layer: LayerId::fresh(),
            comment: String::new(),
            tags: BTreeMap::new(),
            protected: false,
            settling: None,
            extra: Map::new(),
        };
        times.iter().enumerate().map(snapshot).collect()
    }

    fn zone() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    /// The numbers of those that stay.
    #[track_caller]
    fn stay(snapshots: &[SnapshotRef], rules: &Rules) -> Vec<usize> {
        let now = "2026-11-24T12:00:00Z".parse().unwrap();
        let verdicts = choose(snapshots, rules, now, &zone()).unwrap();
        let stay = verdicts.iter().enumerate();
        stay.filter_map(|(at, why)| (!why.is_empty()).then_some(at))
            .collect()
    }

    fn rules(set: impl FnOnce(&mut Rules)) -> Rules {
        let mut rules = Rules::default();
        set(&mut rules);
        rules
    }

    #[test]
    fn the_newest_of_each_period_stays() {
        let taken = snapshots(&[
            "2024-12-31T12:00:00Z", // 0
            "2025-06-01T12:00:00Z", // 1
            "2026-10-31T12:00:00Z", // 2
            "2026-11-15T12:00:00Z", // 3: Sunday of week 46
            "2026-11-16T12:00:00Z", // 4: Monday of week 47
            "2026-11-22T22:30:00Z", // 5: Sunday, half past eleven in Berlin
            "2026-11-22T23:30:00Z", // 6: Monday of week 48 there
            "2026-11-24T09:10:00Z", // 7
            "2026-11-24T09:50:00Z", // 8
            "2026-11-24T10:05:00Z", // 9
        ]);
        for (rules, expected) in [
            (rules(|r| r.last = Some(3)), &[7, 8, 9][..]),
            (
                rules(|r| r.last = Some(99)),
                &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            ),
            (rules(|r| r.hourly = Some(2)), &[8, 9]),
            (rules(|r| r.daily = Some(3)), &[5, 6, 9]),
            (rules(|r| r.weekly = Some(3)), &[3, 5, 9]),
            (rules(|r| r.monthly = Some(2)), &[2, 9]),
            (rules(|r| r.yearly = Some(3)), &[0, 1, 9]),
            (rules(|r| r.within = Some("36h".to_owned())), &[7, 8, 9]),
            (
                rules(|r| r.within = Some("1mo".to_owned())),
                &[2, 3, 4, 5, 6, 7, 8, 9],
            ),
            (
                rules(|r| {
                    r.last = Some(1);
                    r.daily = Some(2);
                    r.yearly = Some(2);
                }),
                &[1, 6, 9],
            ),
        ] {
            assert_eq!(stay(&taken, &rules), expected, "{rules:?}");
        }
    }

    #[test]
    fn days_on_which_the_clocks_are_changed() {
        // Put back: the hour from two to three comes twice, and the day has 25.
        let back = snapshots(&[
            "2026-10-24T22:10:00Z", // 0: ten past midnight
            "2026-10-25T00:30:00Z", // 1: half past two, summer time
            "2026-10-25T01:30:00Z", // 2: half past two, winter time
            "2026-10-25T22:50:00Z", // 3: ten to midnight
            "2026-10-25T23:10:00Z", // 4
        ]);
        assert_eq!(stay(&back, &rules(|r| r.daily = Some(2))), [3, 4]);
        assert_eq!(stay(&back, &rules(|r| r.hourly = Some(4))), [1, 2, 3, 4]);
        // Put forward: the day has 23 hours.
        let forward = snapshots(&[
            "2026-03-28T22:59:00Z", // 0: the day before
            "2026-03-28T23:01:00Z", // 1
            "2026-03-29T21:59:00Z", // 2: the same day
            "2026-03-29T22:01:00Z", // 3: the day after
        ]);
        assert_eq!(stay(&forward, &rules(|r| r.daily = Some(3))), [0, 2, 3]);
    }

    #[test]
    fn a_clock_that_went_backwards() {
        let taken = snapshots(&[
            "2026-11-20T10:00:00Z",
            "2031-01-01T10:00:00Z", // a wrong clock
            "2026-11-21T10:00:00Z",
            "2026-11-21T10:00:00Z", // at the same moment
            "2026-11-20T09:00:00Z", // put back
        ]);
        assert_eq!(stay(&taken, &rules(|r| r.last = Some(2))), [3, 4]);
        assert_eq!(stay(&taken, &rules(|r| r.daily = Some(3))), [0, 1, 3]);
        assert_eq!(
            stay(&taken, &rules(|r| r.within = Some("4d".to_owned()))),
            [1, 2, 3]
        );
    }

    #[test]
    fn what_is_not_asked_about_stays() {
        let mut taken = snapshots(&["2026-11-20T10:00:00Z"; 6]);
        taken[0].kind = SnapshotKind::Manual;
        taken[1].kind = SnapshotKind::Auto;
        taken[2].protected = true;
        taken[3].tags.insert("release".to_owned(), "1.0".to_owned());
        taken[4].created = "yesterday".to_owned();
        let last = rules(|r| r.last = Some(1));
        assert_eq!(stay(&taken, &last), [0, 2, 4, 5]);
        let manual = Rules {
            manual: true,
            ..last.clone()
        };
        assert_eq!(stay(&taken, &manual), [2, 4, 5]);
        let protected = Rules {
            protected: true,
            ..last.clone()
        };
        assert_eq!(stay(&taken, &protected), [0, 4, 5]);
        for (tag, kept) in [
            ("release", true),
            ("release=1.0", true),
            ("release=2", false),
            ("rel", false),
        ] {
            let tagged = Rules {
                tags: vec![tag.to_owned()],
                ..last.clone()
            };
            assert_eq!(stay(&taken, &tagged).contains(&3), kept, "{tag}");
        }
    }

    #[test]
    fn rules_that_keep_nothing_are_refused() {
        for empty in [
            Rules::default(),
            rules(|r| r.last = Some(0)),
            rules(|r| r.manual = true),
        ] {
            assert_eq!(empty.check().unwrap_err().kind, Kind::Usage);
        }
        let odd = rules(|r| r.within = Some("soon".to_owned()));
        assert_eq!(odd.check().unwrap_err().kind, Kind::Usage);
        let mut newer = rules(|r| r.last = Some(1));
        newer.extra.insert("keep_fortnightly".to_owned(), 3.into());
        assert_eq!(newer.check().unwrap_err().kind, Kind::Failed);
    }

    #[test]
    fn rules_come_back() {
        let rules = rules(|r| {
            r.daily = Some(7);
            r.within = Some("2d".to_owned());
            r.tags = vec!["a=b".to_owned()];
        });
        let value = serde_json::to_value(&rules).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"daily": 7, "within": "2d", "tags": ["a=b"]})
        );
        assert_eq!(serde_json::from_value::<Rules>(value).unwrap(), rules);
    }
}
