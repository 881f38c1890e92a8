//! One file name: bytes, never text.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::error::{Errno, Error, Result};

/// The longest name in bytes (NAME_MAX of every Linux file system that can be a layer).
pub const NAME_MAX: usize = 255;

/// One component of a path: 1 to 255 bytes without `/` and NUL, neither `.` nor `..`. Copies share them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<[u8]>);

impl Name {
    /// Checks and takes a name. ENAMETOOLONG above 255 bytes; EINVAL for what is no name.
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
        Ok(Self(bytes.into()))
    }

    /// `.` and `..`, which only listings have.
    pub(crate) fn dots(number: usize) -> Self {
        Self(Arc::from(&b".."[..number.min(2)]))
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Deref for Name {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Name {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl std::borrow::Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_no_name() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0b"] {
            assert_eq!(Name::new(bad).unwrap_err().errno(), Errno::INVAL);
        }
        assert_eq!(
            Name::new([b'x'; 256]).unwrap_err().errno(),
            Errno::NAMETOOLONG
        );
    }

    #[test]
    fn takes_any_other_bytes() {
        for good in [&b"..."[..], b"\xff\xfe", b"a\nb", &[b'x'; 255], b" "] {
            assert_eq!(Name::new(good).unwrap().as_bytes(), good);
        }
    }
}
