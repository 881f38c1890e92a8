//! Random file operations, the same on two trees, compared one by one.

mod generate;
mod looking;
mod mapping;
mod operation;
mod perform;
mod rng;
mod story;

pub use generate::{Generator, acl};
pub use operation::{MAPS, Op, RelPath, SLOTS, Who};
pub use perform::{Held, Outcome, Side};
pub use rng::Rng;
