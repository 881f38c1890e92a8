//! Decides which snapshots pruning retains: one pure function of times, kinds and tags.
//!
//! Hours, days, weeks, months and years are those of a time zone. The newest snapshot of each period is
//! retained. A snapshot that was taken while the clock was wrong belongs to the period of its recorded time;
//! `last` goes by the order of the list only.

use std::collections::HashSet;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};

use crate::error::Result;
use crate::store::manifest::{SnapshotKind, SnapshotRef};
use crate::store::retention::{Counts, Rules};
use crate::store::span;

/// The reasons to retain one snapshot; empty if it is pruned.
pub type Verdict = Vec<String>;

/// A snapshot that the rules may remove, with its time if that is valid.
struct Candidate<'s> {
    at: usize,
    snapshot: &'s SnapshotRef,
    time: Option<ZonedDateTime>,
}

/// Returns the verdict on each snapshot; both lists are ordered from oldest to newest.
pub fn choose(
    snapshots: &[SnapshotRef],
    rules: &Rules,
    now: Timestamp,
    zone: &TimeZone,
) -> Result<Vec<Verdict>> {
    rules.check()?;
    let mut verdicts: Vec<Verdict> = vec![Verdict::new(); snapshots.len()];
    let mut keep = |at: usize, reason: String| {
        if let Some(verdict) = verdicts.get_mut(at) {
            verdict.push(reason);
        }
    };
    let mut candidates = Vec::new();
    for (at, snapshot) in snapshots.iter().enumerate() {
        let exemptions = [
            (snapshot.kind == SnapshotKind::Manual && !rules.manual).then_some("manual"),
            (snapshot.protected && !rules.protected).then_some("protected"),
        ];
        let mut removable = true;
        for reason in exemptions.into_iter().flatten() {
            keep(at, reason.to_owned());
            removable = false;
        }
        if removable {
            let time = snapshot.created.parse::<Timestamp>();
            let time = time.map(|time| time.to_zoned_datetime(zone.clone()));
            if let Err(error) = &time {
                keep(at, format!("invalid time ({error})"));
            }
            candidates.push(Candidate {
                at,
                snapshot,
                time: time.ok(),
            });
        }
    }
    let last = rules.counts.last.unwrap_or_default();
    for candidate in candidates.iter().rev().take(to_usize(last)) {
        keep(candidate.at, "last".to_owned());
    }
    for candidate in &candidates {
        let mut tags = rules.tags.iter();
        if let Some(tag) = tags.find(|tag| has_tag(candidate.snapshot, tag)) {
            keep(candidate.at, format!("tag {tag}"));
        }
    }
    if let Some(within) = &rules.within {
        let now = now.to_zoned_datetime(zone.clone());
        // An interval that begins before the first date of the calendar includes every snapshot.
        let from = now.checked_sub(span::parse(within)?).ok();
        for candidate in &candidates {
            let time = candidate.time.as_ref();
            if time.is_some_and(|time| from.as_ref().is_none_or(|from| time >= from)) {
                keep(candidate.at, format!("within {within}"));
            }
        }
    }
    // The newest comes first; among equal times, the later one in the list.
    candidates.retain(|candidate| candidate.time.is_some());
    candidates.sort_by(|a, b| (&b.time, b.at).cmp(&(&a.time, a.at)));
    for (count, name, period) in periods(&rules.counts) {
        let mut seen = HashSet::new();
        for candidate in &candidates {
            let Some(time) = &candidate.time else {
                continue;
            };
            if seen.len() >= to_usize(count) {
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

fn to_usize(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// A function that returns the name of the period that contains a time.
type Period = fn(&ZonedDateTime) -> String;

fn periods(counts: &Counts) -> [(u32, &'static str, Period); 5] {
    let count = |count: Option<u32>| count.unwrap_or_default();
    [
        // The offset distinguishes the two equal hours at the end of daylight saving time.
        (count(counts.hourly), "hour", |time| {
            format!("{} {:02}:00{}", time.date(), time.hour(), time.offset())
        }),
        (count(counts.daily), "day", |time| time.date().to_string()),
        (count(counts.weekly), "week", |time| {
            let week = time.iso_week_date();
            format!("{}-W{:02}", week.year(), week.week())
        }),
        (count(counts.monthly), "month", |time| {
            format!("{}-{:02}", time.year(), time.month())
        }),
        (count(counts.yearly), "year", |time| time.year().to_string()),
    ]
}

fn has_tag(snapshot: &SnapshotRef, tag: &str) -> bool {
    match tag.split_once('=') {
        Some((key, value)) => snapshot.tags.get(key).is_some_and(|found| found == value),
        None => snapshot.tags.contains_key(tag),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Map;

    use super::*;
    use crate::error::Kind;
    use crate::store::manifest::{LayerId, SnapshotId};
    use crate::store::name::SnapshotName;

    /// Returns snapshots with these times, oldest first.
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

    /// Returns the indices of the retained snapshots.
    #[track_caller]
    fn retained(snapshots: &[SnapshotRef], rules: &Rules) -> Vec<usize> {
        let now = "2026-11-24T12:00:00Z".parse().unwrap();
        let verdicts = choose(snapshots, rules, now, &zone()).unwrap();
        let verdicts = verdicts.iter().enumerate();
        verdicts
            .filter_map(|(at, reasons)| (!reasons.is_empty()).then_some(at))
            .collect()
    }

    fn rules(set: impl FnOnce(&mut Rules)) -> Rules {
        let mut rules = Rules::default();
        set(&mut rules);
        rules
    }

    #[test]
    fn the_newest_of_each_period_is_retained() {
        let taken = snapshots(&[
            "2024-12-31T12:00:00Z", // 0
            "2025-06-01T12:00:00Z", // 1
            "2026-10-31T12:00:00Z", // 2
            "2026-11-15T12:00:00Z", // 3: Sunday of week 46
            "2026-11-16T12:00:00Z", // 4: Monday of week 47
            "2026-11-22T22:30:00Z", // 5: Sunday 23:30 in Berlin
            "2026-11-22T23:30:00Z", // 6: Monday of week 48 there
            "2026-11-24T09:10:00Z", // 7
            "2026-11-24T09:50:00Z", // 8
            "2026-11-24T10:05:00Z", // 9
        ]);
        for (rules, expected) in [
            (rules(|r| r.counts.last = Some(3)), &[7, 8, 9][..]),
            (
                rules(|r| r.counts.last = Some(99)),
                &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
            ),
            (rules(|r| r.counts.hourly = Some(2)), &[8, 9]),
            (rules(|r| r.counts.daily = Some(3)), &[5, 6, 9]),
            (rules(|r| r.counts.weekly = Some(3)), &[3, 5, 9]),
            (rules(|r| r.counts.monthly = Some(2)), &[2, 9]),
            (rules(|r| r.counts.yearly = Some(3)), &[0, 1, 9]),
            (rules(|r| r.within = Some("36h".to_owned())), &[7, 8, 9]),
            (
                rules(|r| r.within = Some("1mo".to_owned())),
                &[2, 3, 4, 5, 6, 7, 8, 9],
            ),
            (
                rules(|r| {
                    r.counts.last = Some(1);
                    r.counts.daily = Some(2);
                    r.counts.yearly = Some(2);
                }),
                &[1, 6, 9],
            ),
        ] {
            assert_eq!(retained(&taken, &rules), expected, "{rules:?}");
        }
    }

    #[test]
    fn periods_are_correct_across_daylight_saving_changes() {
        // At the end of daylight saving time, the hour from two to three occurs twice, and the day has 25
        // hours.
        let back = snapshots(&[
            "2026-10-24T22:10:00Z", // 0: 00:10
            "2026-10-25T00:30:00Z", // 1: 02:30, daylight saving time
            "2026-10-25T01:30:00Z", // 2: 02:30, standard time
            "2026-10-25T22:50:00Z", // 3: 23:50
            "2026-10-25T23:10:00Z", // 4
        ]);
        assert_eq!(
            retained(&back, &rules(|r| r.counts.daily = Some(2))),
            [3, 4]
        );
        assert_eq!(
            retained(&back, &rules(|r| r.counts.hourly = Some(4))),
            [1, 2, 3, 4]
        );
        // At the start of daylight saving time, the day has 23 hours.
        let forward = snapshots(&[
            "2026-03-28T22:59:00Z", // 0: the day before
            "2026-03-28T23:01:00Z", // 1
            "2026-03-29T21:59:00Z", // 2: the same day
            "2026-03-29T22:01:00Z", // 3: the day after
        ]);
        assert_eq!(
            retained(&forward, &rules(|r| r.counts.daily = Some(3))),
            [0, 2, 3]
        );
    }

    #[test]
    fn retention_tolerates_a_clock_that_goes_backwards() {
        let taken = snapshots(&[
            "2026-11-20T10:00:00Z",
            "2031-01-01T10:00:00Z", // a wrong clock
            "2026-11-21T10:00:00Z",
            "2026-11-21T10:00:00Z", // at the same time
            "2026-11-20T09:00:00Z", // set back
        ]);
        assert_eq!(
            retained(&taken, &rules(|r| r.counts.last = Some(2))),
            [3, 4]
        );
        assert_eq!(
            retained(&taken, &rules(|r| r.counts.daily = Some(3))),
            [0, 1, 3]
        );
        assert_eq!(
            retained(&taken, &rules(|r| r.within = Some("4d".to_owned()))),
            [1, 2, 3]
        );
    }

    #[test]
    fn exempt_and_tagged_snapshots_are_retained() {
        let mut taken = snapshots(&["2026-11-20T10:00:00Z"; 6]);
        taken[0].kind = SnapshotKind::Manual;
        taken[1].kind = SnapshotKind::Auto;
        taken[2].protected = true;
        taken[3].tags.insert("release".to_owned(), "1.0".to_owned());
        taken[4].created = "yesterday".to_owned();
        let last = rules(|r| r.counts.last = Some(1));
        assert_eq!(retained(&taken, &last), [0, 2, 4, 5]);
        let manual = Rules {
            manual: true,
            ..last.clone()
        };
        assert_eq!(retained(&taken, &manual), [2, 4, 5]);
        let protected = Rules {
            protected: true,
            ..last.clone()
        };
        assert_eq!(retained(&taken, &protected), [0, 4, 5]);
        for (tag, expected) in [
            ("release", true),
            ("release=1.0", true),
            ("release=2", false),
            ("rel", false),
        ] {
            let tagged = Rules {
                tags: vec![tag.to_owned()],
                ..last.clone()
            };
            assert_eq!(retained(&taken, &tagged).contains(&3), expected, "{tag}");
        }
    }

    #[test]
    fn rules_that_keep_nothing_are_refused() {
        for empty in [
            Rules::default(),
            rules(|r| r.counts.last = Some(0)),
            rules(|r| r.manual = true),
        ] {
            assert_eq!(empty.check().unwrap_err().kind, Kind::Usage);
        }
        let odd = rules(|r| r.within = Some("soon".to_owned()));
        assert_eq!(odd.check().unwrap_err().kind, Kind::Usage);
        let mut newer = rules(|r| r.counts.last = Some(1));
        newer.extra.insert("keep_fortnightly".to_owned(), 3.into());
        assert_eq!(newer.check().unwrap_err().kind, Kind::Failed);
    }

    #[test]
    fn rules_round_trip_through_json() {
        let rules = rules(|r| {
            r.counts.daily = Some(7);
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
