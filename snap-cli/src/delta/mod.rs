//! Differences between states: comparing, patches, merging layers, and restoring what changed.
//!
//! Works on states (stacks of layers, read through `cowl_layers::view`). Never prints, and never writes to a layer that it
//! reads.

pub mod compare;
pub mod diff;
pub mod flatten;
pub mod patch;
pub mod put_back;
mod put_back_work;
pub mod scope;

pub use compare::What;
pub use diff::{Change, Status, Wish, diff, diff_of};
pub use flatten::flatten;

#[cfg(test)]
mod compare_tests;
#[cfg(test)]
pub(crate) mod stack_tests;
