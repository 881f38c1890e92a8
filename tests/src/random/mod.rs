//! Random file operations, the same on two trees, compared one by one.

mod generate;
mod operation;
mod perform;

pub use generate::{Generator, Rng};
pub use operation::{Op, RelPath, SLOTS};
pub use perform::{Outcome, Side};
