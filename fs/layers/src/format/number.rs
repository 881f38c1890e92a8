//! The xattr `cowl.ino`: the inode number that an object retains across its copy-up.
//!
//! The number belongs to an inode of a lower layer, so the xattr names that layer. A reader whose stack does not
//! contain the layer must ignore the xattr, because the number may belong to another object by now.

use crate::error::{Error, Result};

/// The value of the xattr `cowl.ino`: a version byte, the layer's id and the inode number, both little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeNumberXattr {
    /// The id of the layer that contains the inode.
    pub layer: u64,
    /// The inode number in that layer.
    pub ino: u64,
}

const VERSION: u8 = 1;
const LEN: usize = 17;

impl InodeNumberXattr {
    /// Parses a value; `None` if its version is unknown.
    pub fn parse(value: &[u8]) -> Result<Option<Self>> {
        let Some((&version, rest)) = value.split_first() else {
            return Err(Error::Damaged("the xattr cowl.ino is empty"));
        };
        if version != VERSION {
            return Ok(None);
        }
        let (Some(layer), Some(ino), LEN) =
            (rest.first_chunk::<8>(), rest.last_chunk::<8>(), value.len())
        else {
            return Err(Error::Damaged("the xattr cowl.ino has the wrong length"));
        };
        Ok(Some(Self {
            layer: u64::from_le_bytes(*layer),
            ino: u64::from_le_bytes(*ino),
        }))
    }

    /// Returns the value to store.
    pub fn to_value(self) -> Vec<u8> {
        let mut value = Vec::with_capacity(LEN);
        value.push(VERSION);
        value.extend_from_slice(&self.layer.to_le_bytes());
        value.extend_from_slice(&self.ino.to_le_bytes());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_round_trip() {
        let number = InodeNumberXattr {
            layer: 0x0123_4567_89ab_cdef,
            ino: u64::MAX,
        };
        assert_eq!(
            InodeNumberXattr::parse(&number.to_value()).unwrap(),
            Some(number)
        );
    }

    #[test]
    fn unknown_versions_are_ignored_and_damage_is_an_error() {
        assert_eq!(InodeNumberXattr::parse(&[2, 1, 2, 3]).unwrap(), None);
        assert!(InodeNumberXattr::parse(&[]).is_err());
        assert!(InodeNumberXattr::parse(&[1, 2, 3]).is_err());
        assert!(InodeNumberXattr::parse(&[1; 18]).is_err());
    }
}
