//! Digests of blobs and of uncompressed layers.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::archive::checksum::hex;

/// A SHA-256 digest in the form `sha256:<64 hexadecimal digits>`.
///
/// The image specification also permits SHA-512, which no known program uses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

const PREFIX: &str = "sha256:";

impl Digest {
    /// Returns the digest of some bytes.
    pub fn of(data: &[u8]) -> Self {
        Self::from_hex(&hex(Sha256::new_with_prefix(data)))
    }

    /// Creates a digest from its hexadecimal digits.
    pub(in crate::archive) fn from_hex(digits: &str) -> Self {
        Self(format!("{PREFIX}{digits}"))
    }

    /// Returns the digest that a computation results in.
    pub(crate) fn of_sum(sum: Sha256) -> Self {
        Self::from_hex(&hex(sum))
    }

    /// Returns the hexadecimal digits, which are the name of the blob.
    pub fn hex(&self) -> &str {
        self.0.strip_prefix(PREFIX).unwrap_or_default()
    }

    /// Returns the whole digest.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the chain id of a layer with this diff id over the layers with the chain id `below`: it identifies the
    /// content of the layer together with that of all layers below it.
    pub fn chain(&self, below: Option<&Self>) -> Self {
        match below {
            None => self.clone(),
            Some(below) => Self::of(format!("{below} {self}").as_bytes()),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        match text.strip_prefix(PREFIX) {
            Some(digits) if digits.len() == 64 && digits.bytes().all(is_digit) => Ok(Self(text)),
            _ => Err("a digest that is not sha256 with 64 hexadecimal digits".to_owned()),
        }
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_digests_are_accepted() {
        let parse = |text: &str| Digest::try_from(text.to_owned());
        let own = Digest::of(b"x");
        assert_eq!(parse(own.as_str()), Ok(own.clone()));
        let path = format!("sha256:../../{}", &own.hex()[6..]);
        let upper = own.as_str().to_ascii_uppercase();
        for bad in ["", "sha256:", "sha256:00", &path, &upper, own.hex()] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_chain_id_depends_on_all_layers_below() {
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        assert_eq!(one.chain(None), one);
        let both = two.chain(Some(&one));
        assert_eq!(both, Digest::of(format!("{one} {two}").as_bytes()));
        assert_ne!(both, one.chain(Some(&two)));
    }
}
