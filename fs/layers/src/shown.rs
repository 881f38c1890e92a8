//! Escapes names, paths and messages for display.
//!
//! A file name is an arbitrary string of bytes. It can contain escape sequences that reprogram a terminal, line
//! breaks that forge lines of output, and characters that reverse the order of the surrounding text. [`Show`] writes
//! a name unambiguously as one piece of plain text. [`plain`] is for the writers of messages: it removes such
//! characters from any source, such as errors of a library or the output of another program.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fmt::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A name or path to be displayed; see [`Show::shown`].
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(&'a [u8]);

/// Names and paths that can be displayed.
pub trait Show {
    /// Returns a displayable form.
    ///
    /// Control characters, bidirectional controls, characters of zero width, backslashes, and bytes that are not
    /// UTF-8 are escaped: `\n`, `\x1b`, `\u{202e}`, `\\`. Everything else is unchanged.
    fn shown(&self) -> Shown<'_>;
}

impl Show for [u8] {
    fn shown(&self) -> Shown<'_> {
        Shown(self)
    }
}

impl Show for str {
    fn shown(&self) -> Shown<'_> {
        Shown(self.as_bytes())
    }
}

impl Show for OsStr {
    fn shown(&self) -> Shown<'_> {
        Shown(self.as_bytes())
    }
}

impl Show for Path {
    fn shown(&self) -> Shown<'_> {
        self.as_os_str().shown()
    }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if is_unsafe(c) => escape(f, c)?,
                    c => f.write_char(c)?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Whether a character controls the terminal or the text instead of being visible.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Bidirectional marks, embeddings, overrides and isolates.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Line and paragraph separators; zero-width spaces; deprecated and invisible formatting characters.
            | '\u{2028}' | '\u{2029}' | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escape(out: &mut impl Write, c: char) -> fmt::Result {
    match c {
        '\n' => out.write_str("\\n"),
        '\r' => out.write_str("\\r"),
        '\t' => out.write_str("\\t"),
        c if c.is_ascii() => write!(out, "\\x{:02x}", u32::from(c)),
        c => write!(out, "\\u{{{:x}}}", u32::from(c)),
    }
}

/// The control characters that a message may contain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Line breaks.
    pub lines: bool,
    /// The escape sequences of colors and weights, for a colored message.
    pub colors: bool,
}

/// Escapes all characters of a message that are not visible, except for tabs and those in `allowed`.
///
/// This is the last step before a message is written.
pub fn plain(text: &str, allowed: Allowed) -> Cow<'_, str> {
    let stays = |c: char| c == '\t' || (c == '\n' && allowed.lines);
    if !text.chars().any(|c| is_unsafe(c) && !stays(c)) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let color = if allowed.colors { color(rest) } else { None };
        let piece = color.unwrap_or_else(|| rest.get(..c.len_utf8()).unwrap_or(rest));
        if color.is_some() || !is_unsafe(c) || stays(c) {
            out.push_str(piece);
        } else if escape(&mut out, c).is_err() {
            // Writing to a string does not fail.
            out.push('?');
        }
        rest = rest.get(piece.len()..).unwrap_or_default();
    }
    Cow::Owned(out)
}

/// Returns the sequence at the start of `text` that sets a foreground color, bold, dim or underline, or resets them.
fn color(text: &str) -> Option<&str> {
    const CODES: [&str; 13] = [
        "0", "1", "2", "4", "31", "32", "33", "34", "35", "36", "1;31", "1;33", "1;36",
    ];
    let inner = text.strip_prefix("\u{1b}[")?;
    let (code, _) = inner.split_once('m')?;
    let known = code.is_empty() || CODES.contains(&code);
    known.then(|| text.get(..code.len() + 3)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_names_are_escaped() {
        for (name, text) in [
            (&b"plain name"[..], "plain name"),
            ("caf\u{e9} \u{6f22}".as_bytes(), "caf\u{e9} \u{6f22}"),
            (b"a\nb\r\tc", "a\\nb\\r\\tc"),
            (b"\x1b[31mred\x07\x7f", "\\x1b[31mred\\x07\\x7f"),
            ("\u{9b}31m\u{85}".as_bytes(), "\\u{9b}31m\\u{85}"),
            ("a\u{202e}txt.exe".as_bytes(), "a\\u{202e}txt.exe"),
            (
                "\u{2066}\u{2069}\u{feff}\u{2028}".as_bytes(),
                "\\u{2066}\\u{2069}\\u{feff}\\u{2028}",
            ),
            (b"\xff\xc3(\xe2\x80", "\\xff\\xc3(\\xe2\\x80"),
            // A literal backslash must be distinguishable from an escape.
            (b"\\x1b", "\\\\x1b"),
            (b"", ""),
        ] {
            assert_eq!(name.shown().to_string(), text);
            assert_eq!(OsStr::from_bytes(name).shown().to_string(), text);
            assert_eq!(Path::new(OsStr::from_bytes(name)).shown().to_string(), text);
        }
    }

    #[test]
    fn no_unsafe_character_remains_unescaped() {
        let all: String = (0..=0x10_ffff).filter_map(char::from_u32).collect();
        for text in [
            all.shown().to_string(),
            plain(&all, Allowed::default()).into_owned(),
        ] {
            assert!(!text.chars().any(|c| is_unsafe(c) && c != '\t'));
            assert!(!text.chars().any(char::is_control) || text.contains('\t'));
        }
    }

    #[test]
    fn messages_preserve_allowed_characters() {
        let allowed = |lines, colors| Allowed { lines, colors };
        let text = "\u{1b}[1;31merror:\u{1b}[0m a\tb\n\u{1b}[8mhidden \u{1b}[2J \u{1b}[m\u{1b}";
        for (how, expected) in [
            (
                allowed(false, false),
                "\\x1b[1;31merror:\\x1b[0m a\tb\\n\\x1b[8mhidden \\x1b[2J \\x1b[m\\x1b",
            ),
            (
                allowed(true, true),
                "\u{1b}[1;31merror:\u{1b}[0m a\tb\n\\x1b[8mhidden \\x1b[2J \u{1b}[m\\x1b",
            ),
        ] {
            assert_eq!(plain(text, how), expected);
        }
        assert!(matches!(
            plain("as it is", allowed(false, false)),
            Cow::Borrowed(_)
        ));
    }
}
