//! File names, which are bytes and not text.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;

use triomphe::ThinArc;

use crate::error::{Errno, Error, Result};
use crate::shown::Show as _;

/// The maximum length of a name in bytes, on every Linux file system that can hold a layer.
pub const NAME_MAX: usize = 255;

/// Returns the parent and the last name of a path without a leading slash. The path of the root is empty.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (
            path.get(..at).unwrap_or_default(),
            path.get(at + 1..).unwrap_or_default(),
        ),
        None => (b"", path),
    }
}

/// A path component: 1 to 255 bytes without `/` and NUL, neither `.` nor `..`.
///
/// Clones share the bytes. The type is one word wide, because millions of names are cached.
#[derive(Clone)]
pub struct Name(ThinArc<(), u8>);

impl Name {
    /// Validates a name. Fails with ENAMETOOLONG above 255 bytes, and with EINVAL if it is not a path component.
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Self> {
        let bytes = bytes.as_ref();
        if bytes.len() > NAME_MAX {
            return Err(Error::Errno(Errno::NAMETOOLONG));
        }
        if bytes.is_empty()
            || bytes == b"."
            || bytes == b".."
            || bytes.contains(&b'/')
            || bytes.contains(&0)
        {
            return Err(Error::Errno(Errno::INVAL));
        }
        Ok(Self(ThinArc::from_header_and_slice((), bytes)))
    }

    /// Returns `.` for 1 and `..` for 2. Only directory listings contain these names.
    pub fn dots(count: usize) -> Self {
        let dots = b"..".get(..count).unwrap_or(b"..");
        Self(ThinArc::from_header_and_slice((), dots))
    }

    /// Returns the bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0.slice
    }
}

impl Deref for Name {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl AsRef<[u8]> for Name {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl std::borrow::Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        self.as_bytes()
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Name {}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl Hash for Name {
    /// Hashes as `[u8]` does, which [`std::borrow::Borrow`] requires of map keys.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.as_bytes().escape_ascii())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().shown().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_invalid_names() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0b"] {
            assert_eq!(Name::new(bad).unwrap_err().errno(), Errno::INVAL);
        }
        assert_eq!(
            Name::new([b'x'; 256]).unwrap_err().errno(),
            Errno::NAMETOOLONG
        );
    }

    #[test]
    fn accepts_any_other_bytes() {
        for good in [&b"..."[..], b"\xff\xfe", b"a\nb", &[b'x'; 255], b" "] {
            assert_eq!(Name::new(good).unwrap().as_bytes(), good);
        }
    }
}
