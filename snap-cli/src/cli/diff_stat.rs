//! The summary of `cowl diff --stat`, and the totals of `cowl diff --json`.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::output::{self, Color};
use crate::delta::{Change, Status};
use crate::error::Result;

/// Prints the counts and sizes of each top-level directory, and the totals by kind of change.
pub(super) fn print(changes: &[Change]) -> Result<()> {
    let mut dirs: BTreeMap<&[u8], Vec<&Change>> = BTreeMap::new();
    for change in changes {
        // A rename counts in the directory of its new name.
        dirs.entry(top_level(&change.path))
            .or_default()
            .push(change);
    }
    let rows = dirs.into_iter().map(|(name, changes)| {
        let totals = Totals::of_changes(changes);
        let kinds = totals.present().map(Tally::count_text);
        let kinds = kinds.collect::<Vec<_>>().join(", ");
        vec![format!("/{}", output::shown(name)), kinds, totals.growth()]
    });
    output::print_table(&[], rows.collect(), &[2])?;
    output::print_line(&Totals::of_changes(changes).text())
}

/// Returns the first component of a path, or an empty name for the root.
fn top_level(path: &[u8]) -> &[u8] {
    match path.split(|byte| *byte == b'/').next() {
        Some(b".") | None => b"",
        Some(first) => first,
    }
}

/// The number of changes of one kind, and the sizes of their files in bytes.
#[derive(Clone, Copy, Debug)]
struct Tally {
    status: Status,
    word: &'static str,
    count: usize,
    old: u64,
    new: u64,
}

impl Tally {
    fn count_text(&self) -> String {
        format!("{} {}", self.count, self.word)
    }
}

/// Totals of a list of changes, by kind.
#[derive(Clone, Debug)]
pub(super) struct Totals([Tally; 5]);

impl Totals {
    /// Counts the changes.
    pub(super) fn of_changes<'c>(changes: impl IntoIterator<Item = &'c Change>) -> Self {
        let empty = |status, word| Tally {
            status,
            word,
            count: 0,
            old: 0,
            new: 0,
        };
        let mut tallies = [
            empty(Status::Added, "added"),
            empty(Status::Modified, "modified"),
            empty(Status::Deleted, "deleted"),
            empty(Status::TypeChanged, "type changed"),
            empty(Status::Renamed, "renamed"),
        ];
        for change in changes {
            for tally in &mut tallies {
                if tally.status == change.status {
                    tally.count += 1;
                    tally.old += change.old_size.unwrap_or(0);
                    tally.new += change.new_size.unwrap_or(0);
                }
            }
        }
        Self(tallies)
    }

    /// Returns the totals for JSON.
    pub(super) fn as_json(&self) -> Value {
        let (old, new) = self.sizes();
        let mut value = json!({ "old_size": old, "new_size": new });
        for tally in &self.0 {
            if let Some(object) = value.as_object_mut() {
                object.insert(tally.status.letter().to_string(), tally.count.into());
            }
        }
        value
    }

    /// Returns the kinds that occur.
    fn present(&self) -> impl Iterator<Item = &Tally> {
        self.0.iter().filter(|tally| tally.count > 0)
    }

    fn sizes(&self) -> (u64, u64) {
        let sum = |size: fn(&Tally) -> u64| -> u64 { self.0.iter().map(size).sum() };
        (sum(|tally| tally.old), sum(|tally| tally.new))
    }

    /// Returns the difference of the sizes of all changes.
    fn growth(&self) -> String {
        let (old, new) = self.sizes();
        size_difference(old, new)
    }

    /// Returns one line: the count and the difference of sizes of each kind, then the difference of all.
    fn text(&self) -> String {
        let kinds = self.present().map(|tally| {
            let growth = size_difference(tally.old, tally.new);
            format!("{} ({growth})", tally.count_text())
        });
        let kinds: Vec<_> = kinds.collect();
        match kinds.as_slice() {
            [] => "no differences".to_owned(),
            [one] => one.clone(),
            several => format!("{}; {} in total", several.join(", "), self.growth()),
        }
    }
}

/// Formats the difference of two sizes, with its sign and its color.
fn size_difference(old: u64, new: u64) -> String {
    match old.cmp(&new) {
        std::cmp::Ordering::Less => {
            let size = output::format_size(new - old);
            output::paint(Color::Green, &format!("+{size}"))
        }
        std::cmp::Ordering::Equal => "0 B".to_owned(),
        std::cmp::Ordering::Greater => {
            let size = output::format_size(old - new);
            output::paint(Color::Red, &format!("-{size}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_counted_per_top_level_directory() {
        for (path, top) in [("etc/apt/new", "etc"), ("thing", "thing"), (".", "")] {
            assert_eq!(top_level(path.as_bytes()), top.as_bytes());
        }
    }
}
