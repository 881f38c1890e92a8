//! Quotes words for a shell.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

/// Quotes a word of a command in a message.
///
/// The result is ASCII, in the form with which bash and zsh accept any byte.
pub fn quoted(word: impl AsRef<OsStr>) -> String {
    let bytes = word.as_ref().as_bytes();
    if is_plain(bytes) {
        bytes.escape_ascii().to_string()
    } else {
        format!("$'{}'", bytes.escape_ascii())
    }
}

/// Quotes a word for a command that a POSIX shell executes. Any byte except NUL is preserved.
pub fn posix_quoted(word: &[u8]) -> Vec<u8> {
    if is_plain(word) {
        return word.to_vec();
    }
    let mut out = vec![b'\''];
    for &byte in word {
        match byte {
            b'\'' => out.extend_from_slice(b"'\\''"),
            other => out.push(other),
        }
    }
    out.push(b'\'');
    out
}

/// Returns whether a shell reads the word without quotes as it is.
fn is_plain(word: &[u8]) -> bool {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-+=:@%,".contains(b);
    !word.is_empty() && word.iter().all(plain)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn quotes_words_for_messages() {
        assert_eq!(quoted(Path::new("/a/b-c")), "/a/b-c");
        assert_eq!(quoted(Path::new("/a b")), "$'/a b'");
        assert_eq!(quoted(Path::new("/it's\n")), "$'/it\\'s\\n'");
    }

    #[test]
    fn quotes_words_for_a_posix_shell() {
        assert_eq!(posix_quoted(b"/a/b-c"), b"/a/b-c");
        assert_eq!(posix_quoted(b"/a b"), b"'/a b'");
        assert_eq!(posix_quoted(b"it's"), b"'it'\\''s'");
    }
}
