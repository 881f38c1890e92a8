//! Redirect xattrs, which name the path of an object in the layers below.

use std::fmt;

use crate::error::{Error, Result};
use crate::name::Name;

/// The parsed value of a redirect xattr.
#[derive(Clone, PartialEq, Eq)]
pub enum Redirect {
    /// Another name in the same directory.
    Sibling(Name),
    /// A path from the root of the layers below. Never empty; stored here without the leading slash.
    Path(Box<[u8]>),
}

impl Redirect {
    /// Parses a value. A value that contains a slash must begin with one; no component may be empty, `.` or `..`.
    pub fn parse(value: &[u8]) -> Result<Self> {
        // podman and older kernels write a trailing NUL.
        let value = value.strip_suffix(b"\0").unwrap_or(value);
        let damaged = |_| Error::Damaged("the value of a redirect xattr is not a valid path");
        match value.strip_prefix(b"/") {
            Some(path) => {
                for part in path.split(|&byte| byte == b'/') {
                    Name::new(part).map_err(damaged)?;
                }
                Ok(Self::Path(path.into()))
            }
            None => Ok(Self::Sibling(Name::new(value).map_err(damaged)?)),
        }
    }

    /// Returns the value to store.
    pub fn to_value(&self) -> Vec<u8> {
        match self {
            Self::Sibling(name) => name.as_bytes().to_vec(),
            Self::Path(path) => [b"/", &path[..]].concat(),
        }
    }
}

impl fmt::Debug for Redirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redirect({})", self.to_value().escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip() {
        for value in [&b"name"[..], b"/a", b"/a/b/c", b"/\xff", b"..."] {
            assert_eq!(Redirect::parse(value).unwrap().to_value(), value);
        }
        assert_eq!(Redirect::parse(b"/a\0").unwrap().to_value(), b"/a");
    }

    #[test]
    fn refuses_paths_out_of_the_layer() {
        for value in [
            &b""[..],
            b"/",
            b"a/b",
            b"/a/../b",
            b"/a//b",
            b"..",
            b"/..",
            b"/a/",
            b"./a",
            b"a\0b",
        ] {
            assert!(Redirect::parse(value).is_err(), "{value:?}");
        }
    }
}
