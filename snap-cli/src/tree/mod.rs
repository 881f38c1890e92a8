//! A toolkit for directory trees: walking, reading, creating, measuring and hashing them.
//!
//! Works on states (stacks of layers, read through `cowl_layers::view`) and on plain directories. Never prints, and never
//! writes to a layer that it reads.

pub(crate) mod attrs;
pub(crate) mod content;
pub(crate) mod create;
pub mod digest;
mod digest_form;
pub(crate) mod dir_cursor;
pub mod error;
pub mod find;
pub(crate) mod hard_links;
mod hints;
pub(crate) mod in_root;
pub mod inspect;
pub mod measure;
pub mod notes;
pub mod omissions;
pub(crate) mod path;
pub(crate) mod path_map;
pub(crate) mod portable;
pub(crate) mod position;
pub(crate) mod recording;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod walk;
pub(crate) mod writable;
mod xattr_values;

pub use digest::{TreeDigest, digest, digest_dir, digest_layer};
pub use error::{ErrorKind, OnProgress, Progress, TreeError};
pub use measure::{measure, measure_like};
pub use portable::{PortableDigest, digest_portable};
