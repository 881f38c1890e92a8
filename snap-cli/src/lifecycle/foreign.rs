//! The rules for snapshots that a container gets from an image or from another store: names, numbers, texts and order. No
//! I/O.
//!
//! `cowl pull --update` and `cowl receive` use the same rules (docs/decisions/0048), so that a snapshot looks the same
//! whichever way it arrived.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;

use crate::archive::image_source::snapshot_note;
use crate::store::manifest::{ContainerManifest, SnapshotKind, SnapshotRef};
use crate::store::name::{MAX_NAME, SnapshotName};
use crate::store::span;

/// The length of a name that every suffix leaves: a manifest has fewer than 10,000,000 snapshots.
const MAX_BEGIN: usize = MAX_NAME - "-10000000".len();

/// The names of a container's snapshots, and its counters.
#[derive(Debug)]
pub(super) struct Names {
    taken: HashSet<SnapshotName>,
    next_snap: u64,
    next_auto: u64,
    /// The numbers at which the search for a free suffix continues, by the begin of the name: a hostile sender can send
    /// very many snapshots with one name.
    next_suffixes: HashMap<String, usize>,
}

impl Names {
    /// Returns the names in a manifest.
    pub(super) fn of(manifest: &ContainerManifest) -> Self {
        Self {
            taken: manifest.snapshots.iter().map(|s| s.name.clone()).collect(),
            next_snap: manifest.next_snap,
            next_auto: manifest.next_auto,
            next_suffixes: HashMap::new(),
        }
    }

    /// Returns the counters after the new names.
    pub(super) fn counters(&self) -> (u64, u64) {
        (self.next_snap, self.next_auto)
    }

    /// Returns the next name for an automatic snapshot.
    pub(super) fn automatic(&mut self) -> SnapshotName {
        let (name, number) = first_free(self.next_auto, &SnapshotName::automatic, &self.taken);
        self.next_auto = self.next_auto.max(number.saturating_add(1));
        self.taken.insert(name.clone());
        name
    }

    /// Returns the next numbered name.
    fn counted(&mut self) -> SnapshotName {
        let (name, number) = first_free(self.next_snap, &SnapshotName::counted, &self.taken);
        self.next_snap = self.next_snap.max(number.saturating_add(1));
        self.taken.insert(name.clone());
        name
    }

    /// Returns the name for a snapshot that its sender names `wanted`.
    ///
    /// A number that is in use, or was used before, becomes the next one. Another name that is in use gets a number at its
    /// end. The next number replaces an invalid name, and a number that is too large: it would leave none for the
    /// snapshots that follow.
    pub(super) fn assign(&mut self, wanted: &str) -> SnapshotName {
        let Ok(name) = SnapshotName::parse(wanted) else {
            return self.counted();
        };
        if !name.is_reserved() {
            return self.with_suffix(name);
        }
        let is_taken = self.taken.contains(&name);
        if let Some(number) = name
            .number("snap")
            .filter(|n| *n >= self.next_snap && !is_taken)
        {
            self.next_snap = number + 1;
        } else if let Some(number) = name
            .number("auto")
            .filter(|n| *n >= self.next_auto && !is_taken)
        {
            self.next_auto = number + 1;
        } else {
            return match name.as_str().starts_with("auto") {
                true => self.automatic(),
                false => self.counted(),
            };
        }
        self.taken.insert(name.clone());
        name
    }

    /// Returns a name that is not reserved, with a number at its end if it is in use.
    fn with_suffix(&mut self, name: SnapshotName) -> SnapshotName {
        if self.taken.insert(name.clone()) {
            return name;
        }
        let text = name.as_str();
        let with = |number: usize| {
            let end = format!("-{number}");
            let length = text.len().min(MAX_NAME - end.len());
            let begin = text.get(..length)?.trim_end_matches('.');
            SnapshotName::parse(format!("{begin}{end}")).ok()
        };
        // Names that differ only after this length get the same names with a suffix.
        let begin = text.get(..text.len().min(MAX_BEGIN)).unwrap_or(text);
        let from = self.next_suffixes.get(begin).copied().unwrap_or(2);
        let mut numbered = (from..=from + self.taken.len()).filter_map(|n| Some((n, with(n)?)));
        match numbered.find(|(_, name)| !self.taken.contains(name)) {
            Some((number, free)) => {
                self.next_suffixes.insert(begin.to_owned(), number + 1);
                self.taken.insert(free.clone());
                free
            }
            None => self.counted(),
        }
    }
}

/// Returns the first free name with a number from `from`, and the number.
fn first_free(
    from: u64,
    named: &dyn Fn(u64) -> SnapshotName,
    taken: &HashSet<SnapshotName>,
) -> (SnapshotName, u64) {
    // A counter can be wrong in the manifest of another host. One of so many numbers is free, whatever the counter is.
    let mut numbers = (from..=u64::MAX).chain(0..from);
    let number = numbers.find(|number| !taken.contains(&named(*number)));
    let number = number.unwrap_or(from);
    (named(number), number)
}

/// Limits what a sender can claim about a snapshot that is added to a container.
///
/// It becomes a manual one: `cowl prune` counts scheduled and automatic ones, so others would displace those of the
/// container. A time in the future would be the newest one for ever.
pub(super) fn limit_claims(snapshot: &mut SnapshotRef) {
    snapshot.kind = SnapshotKind::Manual;
    limit_texts(snapshot);
}

/// Corrects the time, the comment and the tags of a sender's snapshot.
pub(super) fn limit_texts(snapshot: &mut SnapshotRef) {
    snapshot.created = span::claimed(Some(&snapshot.created));
    snapshot.comment = snapshot_note::plain_comment(&snapshot.comment);
    snapshot_note::retain_plain_tags(&mut snapshot.tags);
}

/// Adds snapshots to the list, which remains sorted by time, and clears references to parents that are not in it.
pub(super) fn insert(manifest: &mut ContainerManifest, new: Vec<SnapshotRef>) {
    // The text of a time omits zeros at the end of the fraction, so it has another order.
    let time = |snapshot: &SnapshotRef| snapshot.created.parse::<Timestamp>().ok();
    let mut new: Vec<_> = new.into_iter().map(|new| (time(&new), new)).collect();
    new.sort_by_key(|(time, _)| *time);
    let mut new = new.into_iter().peekable();
    let mut all = Vec::with_capacity(manifest.snapshots.len() + new.len());
    for own in std::mem::take(&mut manifest.snapshots) {
        let later = time(&own);
        while let Some((_, earlier)) = new.next_if(|(time, _)| *time < later) {
            all.push(earlier);
        }
        all.push(own);
    }
    all.extend(new.map(|(_, snapshot)| snapshot));
    manifest.snapshots = all;
    let known: HashSet<_> = manifest.snapshots.iter().map(|known| known.id).collect();
    for snapshot in &mut manifest.snapshots {
        snapshot.parent = snapshot.parent.filter(|parent| known.contains(parent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(taken: &[&str], next_snap: u64, next_auto: u64) -> Names {
        Names {
            taken: taken
                .iter()
                .map(|name| SnapshotName::parse(name).unwrap())
                .collect(),
            next_snap,
            next_auto,
            next_suffixes: HashMap::new(),
        }
    }

    #[test]
    fn names_are_retained_if_they_are_free() {
        let mut names = names(&["before"], 2, 0);
        for (wanted, expected) in [
            // This number was used.
            ("snap1", "snap2"),
            ("snap7", "snap7"),
            ("snap7", "snap8"),
            ("snap3", "snap9"),
            ("auto4", "auto4"),
            ("auto4", "auto5"),
            ("before", "before-2"),
            ("before", "before-3"),
            ("after", "after"),
            ("after", "after-2"),
            ("snap007", "snap10"),
            ("snap99999999999999999999", "snap11"),
            ("snap18446744073709551615", "snap12"),
            ("../x", "snap13"),
            ("", "snap14"),
            ("a\u{1b}", "snap15"),
        ] {
            assert_eq!(names.assign(wanted).as_str(), expected, "{wanted}");
        }
        assert_eq!(names.counters(), (16, 6));
        assert_eq!(names.automatic().as_str(), "auto6");
    }

    /// A hostile sender must not make the receiver compute for long: with a search from 2 for each name, or with times that
    /// are parsed for each comparison, this takes minutes.
    #[test]
    fn many_snapshots_with_similar_names_are_added_at_once() {
        const COUNT: usize = 30_000;
        let long = |number: usize| format!("{}{number:05}", "x".repeat(MAX_NAME - 5));
        let taken: Vec<String> = (0..COUNT).map(long).collect();
        let taken: Vec<&str> = taken.iter().map(String::as_str).collect();
        let mut names = names(&taken, 0, 0);
        let assigned: HashSet<_> = taken.iter().map(|name| names.assign(name)).collect();
        assert_eq!(assigned.len(), COUNT);
        assert_eq!(names.taken.len(), 2 * COUNT);
    }

    #[test]
    fn extreme_names_are_free_in_the_end() {
        let long = "x".repeat(MAX_NAME);
        let most = format!("snap{}", u64::MAX);
        let mut names = names(&[&long, &most], u64::MAX, 0);
        let expected = format!("{}-2", "x".repeat(MAX_NAME - 2));
        assert_eq!(names.assign(&long).as_str(), expected);
        assert_eq!(names.assign(&most).as_str(), "snap0");
        assert_eq!(names.assign(&most).as_str(), "snap1");
    }
}
