//! Differences between states: comparison, patches, merging of layers, and reverting of changes.
//!
//! Works on states (stacks of layers, read through `cowl_layers::view`). Never prints, and never writes to a layer that it
//! reads.

pub mod compare;
pub mod diff;
pub mod flatten;
pub mod patch;
pub mod revert;
mod revert_records;
mod revert_work;
pub mod scope;

pub use compare::Differences;
pub use diff::{Change, DiffOptions, Status, diff, diff_with};
pub use flatten::flatten;
pub use revert_records::TargetLayer;

#[cfg(test)]
mod compare_tests;
#[cfg(test)]
pub(crate) mod stack_tests;
