//! Trees as values: making, walking, comparing, merging and measuring them.
//!
//! Works on states (stacks of layers seen through `cowl_layers::view`) and on plain folders. Never
//! prints and never writes to a layer that it reads.

pub mod compare;
pub(crate) mod content;
pub mod diff;
pub mod digest;
pub mod error;
pub mod find;
pub mod flatten;
pub(crate) mod linked;
pub mod look;
pub(crate) mod make;
pub mod measure;
pub mod patch;
pub(crate) mod path_map;
pub(crate) mod places;
pub mod put_back;
mod put_back_work;
pub mod scope;
pub(crate) mod target;
pub(crate) mod walk;
mod way;

pub use compare::What;
pub use diff::{Change, Status, Wish, diff, diff_of};
pub use digest::{TreeDigest, digest, digest_dir, digest_layer};
pub use error::{ErrorKind, OnProgress, Progress, TreeError};
pub use flatten::flatten;
pub use measure::{measure, measure_like};

#[cfg(test)]
mod compare_tests;
#[cfg(test)]
pub(crate) mod stack_tests;
#[cfg(test)]
pub(crate) mod testing;
