//! The snapshot whose state a layer of an image completes, in an annotation of the layer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The annotation.
pub(in crate::archive) const SNAPSHOT: &str = "io.cowl.snapshot";

/// The maximum size of the annotation, in bytes. A manifest has one for each layer, and registries limit its size.
const MAX_NOTE: usize = 8 << 10;

/// The maximum size of a comment in it, in bytes of JSON. The history of the image contains it in whole.
const MAX_COMMENT: usize = 4 << 10;

/// The properties of a snapshot that travel with its layer.
///
/// The values of an image are untrusted: a name may be invalid.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotNote {
    /// The name.
    pub name: String,
    /// The time at which it was taken (RFC 3339).
    pub created: String,
    /// The comment.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// The tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
}

impl SnapshotNote {
    /// Parses an annotation; `None` if it is invalid or too long.
    ///
    /// Control characters in the comment are replaced, and tags with some are omitted.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.len() > MAX_NOTE {
            log::warn!("a layer has an annotation of a snapshot that is too long; it is ignored");
            return None;
        }
        match serde_json::from_str::<Self>(text) {
            Ok(mut note) => {
                note.comment = plain_comment(&note.comment);
                retain_plain_tags(&mut note.tags);
                Some(note)
            }
            Err(error) => {
                log::warn!("the annotation of a layer is ignored: {error}");
                None
            }
        }
    }

    /// Returns the annotation. A long comment is shortened, and tags that do not fit are omitted.
    pub(in crate::archive) fn encode(&self) -> Option<String> {
        let mut note = self.clone();
        note.comment = fitting(&self.comment);
        let encode = |note: &Self| serde_json::to_string(note).ok();
        let text = encode(&note).filter(|text| text.len() <= MAX_NOTE);
        let text = text.or_else(|| {
            log::warn!(
                "the tags of the snapshot {} are too long for an image",
                self.name
            );
            note.tags.clear();
            encode(&note).filter(|text| text.len() <= MAX_NOTE)
        });
        if text.is_none() {
            log::warn!("the image has no description of the snapshot {}", self.name);
        }
        text
    }
}

/// Returns the comment of another host's snapshot, with replacements for control characters.
pub fn plain_comment(comment: &str) -> String {
    comment.chars().map(plain).collect()
}

/// Removes tags with control characters.
pub fn retain_plain_tags(tags: &mut BTreeMap<String, String>) {
    let is_plain = |text: &str| !text.chars().any(char::is_control);
    tags.retain(|key, value| is_plain(key) && is_plain(value));
}

/// Returns a character, or a replacement for a control character that a terminal would interpret.
fn plain(character: char) -> char {
    match character {
        '\n' | '\t' => character,
        _ if character.is_control() => char::REPLACEMENT_CHARACTER,
        _ => character,
    }
}

/// Returns a comment without control characters, shortened to the size that it may have in JSON.
fn fitting(comment: &str) -> String {
    let mut left = MAX_COMMENT;
    let mut found = String::new();
    for character in comment.chars().map(plain) {
        let size = match character {
            '"' | '\\' | '\n' | '\t' => 2,
            _ => character.len_utf8(),
        };
        let Some(rest) = left.checked_sub(size) else {
            found.push_str("...");
            break;
        };
        left = rest;
        found.push(character);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_round_trips() {
        let note = SnapshotNote {
            name: "snap3".to_owned(),
            created: "2026-01-02T03:04:05Z".to_owned(),
            comment: "two\nlines".to_owned(),
            tags: BTreeMap::from([("a".to_owned(), String::new())]),
        };
        let text = note.encode().unwrap();
        assert_eq!(SnapshotNote::parse(&text), Some(note.clone()));
        let long = SnapshotNote {
            comment: "\u{e9}".repeat(5000),
            tags: BTreeMap::from([("t".to_owned(), "x".repeat(9000))]),
            ..note
        };
        let found = SnapshotNote::parse(&long.encode().unwrap()).unwrap();
        assert!(found.comment.ends_with("\u{e9}...") && found.comment.len() < 4200);
        assert!(found.tags.is_empty());
    }

    #[test]
    fn every_comment_travels() {
        for (comment, expected) in [
            ("a\tb", "a\tb"),
            ("a\r\nb\u{1b}[2J", "a\u{fffd}\nb\u{fffd}[2J"),
            ("\u{85}", "\u{fffd}"),
        ] {
            let note = SnapshotNote {
                name: "web".to_owned(),
                comment: comment.to_owned(),
                tags: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
                ..SnapshotNote::default()
            };
            let text = note.encode().unwrap();
            let found = SnapshotNote::parse(&text).unwrap();
            assert_eq!(
                (found.comment.as_str(), &found.tags),
                (expected, &note.tags)
            );
            assert_eq!(found.encode().unwrap(), text);
        }
        for long in ["\"", "\\", "\n", "\t", "\u{1}", "\u{10ffff}"] {
            let note = SnapshotNote {
                comment: long.repeat(5000),
                tags: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
                ..SnapshotNote::default()
            };
            let found = SnapshotNote::parse(&note.encode().unwrap()).unwrap();
            assert!(found.comment.len() > 1000 && found.comment.ends_with("..."));
            assert_eq!(found.tags, note.tags, "{long:?}");
        }
        // An annotation of another program.
        let hostile =
            r#"{"name":"x","created":"","comment":"a\u001bb","tags":{"a":"\u0007","b":"c"}}"#;
        let found = SnapshotNote::parse(hostile).unwrap();
        assert_eq!(found.comment, "a\u{fffd}b");
        assert_eq!(
            found.tags,
            BTreeMap::from([("b".to_owned(), "c".to_owned())])
        );
    }

    #[test]
    fn invalid_notes_are_ignored() {
        let long = format!(
            r#"{{"name":"x","created":"","comment":"{}"}}"#,
            "x".repeat(MAX_NOTE)
        );
        for bad in ["", "[]", "{}", r#"{"name":1,"created":""}"#, &long] {
            assert_eq!(SnapshotNote::parse(bad), None, "{bad:.100}");
        }
    }
}
