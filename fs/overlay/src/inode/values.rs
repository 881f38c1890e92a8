//! The encoding of values in the ledger (docs/format.md).

use serde::{Deserialize, Serialize};

/// A number that is not on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NumberValue {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    pub(crate) number: u64,
}

/// A replacement node id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeIdValue {
    /// The inode number.
    pub(crate) ino: u64,
    pub(crate) lookups: u64,
    pub(crate) is_newest: bool,
}

/// Returns the encoding of a value; empty if it cannot be encoded, which does not happen with these types.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Most values are small, and a vector that grows is allocated several times.
    let mut small = [0; 256];
    match postcard::to_slice(value, &mut small) {
        Ok(bytes) => bytes.to_vec(),
        Err(_) => postcard::to_stdvec(value).unwrap_or_default(),
    }
}
