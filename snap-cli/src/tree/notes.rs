//! Notes on objects that an import or an export skipped or changed.
//!
//! An archive is untrusted and can cause a note for each of its entries, so the notes are counted by reason and only
//! the first few objects are named.

use cowl_layers::shown::Show as _;

/// The number of objects that are named for each reason.
const NAMED: usize = 3;

/// The number of bytes of an object's name that are retained.
const NAME_BYTES: usize = 4096;

/// Notes in the order in which their reasons occurred first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes(Vec<Note>);

/// The objects for which the same reason was noted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Note {
    reason: &'static str,
    count: u64,
    /// The first objects, escaped.
    named: Vec<String>,
}

impl Notes {
    /// Adds a note on the object at a path.
    pub(crate) fn add(&mut self, reason: &'static str, path: &[u8]) {
        self.insert(reason, || name(path));
    }

    /// Adds a note on a part of the object at a path, such as an xattr.
    pub(crate) fn add_part(&mut self, reason: &'static str, path: &[u8], part: &[u8]) {
        self.insert(reason, || format!("{} ({})", name(path), name(part)));
    }

    fn insert(&mut self, reason: &'static str, name: impl FnOnce() -> String) {
        let found = self.0.iter().position(|note| note.reason == reason);
        let at = found.unwrap_or_else(|| {
            self.0.push(Note {
                reason,
                count: 0,
                named: Vec::new(),
            });
            self.0.len() - 1
        });
        if let Some(note) = self.0.get_mut(at) {
            note.count += 1;
            if note.named.len() < NAMED {
                note.named.push(name());
            }
        }
    }

    /// Adds all notes of another operation.
    pub(crate) fn append(&mut self, other: Self) {
        for mut new in other.0 {
            match self.0.iter_mut().find(|note| note.reason == new.reason) {
                Some(note) => {
                    note.count += new.count;
                    new.named.truncate(NAMED - note.named.len());
                    note.named.append(&mut new.named);
                }
                None => self.0.push(new),
            }
        }
    }

    /// Returns whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns one line of text for each reason.
    pub fn lines(&self) -> Vec<String> {
        let line = |note: &Note| {
            let named = note.named.join(", ");
            match note.count - note.named.len() as u64 {
                0 => format!("{named}: {}", note.reason),
                more => format!("{named} and {more} more: {}", note.reason),
            }
        };
        self.0.iter().map(line).collect()
    }
}

/// Returns the escaped and possibly shortened name of an object.
fn name(path: &[u8]) -> String {
    match path.get(..NAME_BYTES) {
        Some(start) if path.len() > NAME_BYTES => format!("{}...", start.shown()),
        _ if path.is_empty() => ".".to_owned(),
        _ => path.shown().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_counted_by_reason_and_have_bounded_size() {
        let mut notes = Notes::default();
        assert!(notes.is_empty());
        notes.add_part("skipped", b"f\n", b"user.x");
        for n in 0..100_000 {
            notes.add("changed", format!("{n}").as_bytes());
        }
        notes.add("changed", &[b'x'; 1 << 20]);
        let want = ["f\\n (user.x): skipped", "0, 1, 2 and 99998 more: changed"];
        assert_eq!(notes.lines(), want);
        let mut more = Notes::default();
        more.add("skipped", b"");
        more.add("other", &[b'x'; 1 << 20]);
        notes.append(more);
        let lines = notes.lines();
        assert_eq!(lines[0], "f\\n (user.x), .: skipped");
        assert!(lines[2].len() < 2 * NAME_BYTES && lines[2].ends_with("xxx...: other"));
    }
}
