//! Trees as values: walking, reading, creating, measuring and hashing them.
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
mod hints;
pub mod inspect;
pub(crate) mod linked;
pub mod measure;
pub(crate) mod path;
pub(crate) mod path_map;
pub(crate) mod position;
pub(crate) mod target;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod walk;

pub use digest::{TreeDigest, digest, digest_dir, digest_layer};
pub use error::{ErrorKind, OnProgress, Progress, TreeError};
pub use measure::{measure, measure_like};
