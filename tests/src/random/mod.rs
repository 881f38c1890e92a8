//! Random file operations that are performed on two trees and compared one by one.

mod generate;
mod looking;
mod mapping;
mod operation;
mod perform;
pub mod rng;
mod story;
mod values;

pub use generate::Generator;
pub use operation::{Caller, MAPS, Op, RelPath, SLOTS};
pub use perform::{Held, Outcome, Side};
pub use rng::Rng;
pub use values::acl;
