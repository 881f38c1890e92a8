//! Bytes in JSON: a string if they are valid UTF-8, otherwise an array of numbers. Used for paths and for files of
//! other programs.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// The form of bytes in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum BytesOrText {
    Text(String),
    Bytes(Vec<u8>),
}

impl BytesOrText {
    fn from_bytes(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Bytes(bytes.to_vec()),
        }
    }

    fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Text(text) => text.into_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// Returns bytes as a JSON value: a string, or an array of numbers if they are not UTF-8.
pub fn to_value(bytes: &[u8]) -> Value {
    match BytesOrText::from_bytes(bytes) {
        BytesOrText::Text(text) => text.into(),
        BytesOrText::Bytes(bytes) => bytes.into(),
    }
}

/// The content of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        BytesOrText::from_bytes(&self.0).serialize(out)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        BytesOrText::deserialize(input).map(|json| Self(json.into_bytes()))
    }
}

/// Serde functions for fields that are paths: `#[serde(with = "bytes::path")]`.
pub mod path {
    use super::{
        BytesOrText, Deserialize, Deserializer, OsStrExt, OsString, OsStringExt, Path, PathBuf,
        Serialize, Serializer,
    };

    /// Serializes a path.
    pub fn serialize<S: Serializer>(path: &Path, out: S) -> Result<S::Ok, S::Error> {
        BytesOrText::from_bytes(path.as_os_str().as_bytes()).serialize(out)
    }

    /// Deserializes a path.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
        let bytes = BytesOrText::deserialize(input)?.into_bytes();
        Ok(PathBuf::from(OsString::from_vec(bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arbitrary_bytes_round_trip() {
        for bytes in [&b""[..], b"text\n", b"\xff\0\xfe"] {
            let blob = Blob(bytes.to_vec());
            let json = serde_json::to_string(&blob).unwrap();
            assert_eq!(serde_json::from_str::<Blob>(&json).unwrap(), blob);
        }
        assert_eq!(
            serde_json::to_string(&Blob(b"x".to_vec())).unwrap(),
            "\"x\""
        );
    }
}
