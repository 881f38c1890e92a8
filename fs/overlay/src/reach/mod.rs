//! The basis of every operation: its context (the locked stack of layers, the options of the mount), its caller, and
//! access from an inode to its object on disk.

mod caller;
mod capabilities;
mod context;
mod object;
mod options;
mod stack;

pub use caller::Caller;
pub(crate) use caller::has_capability;
pub(crate) use capabilities::{lock_capabilities, restore_capabilities};
pub(crate) use context::Context;
pub(crate) use object::{
    Attempt, access_path, access_path_and_stat, open_content, retry_while_moved, stat_on_disk,
};
pub use options::OverlayOptions;
pub(crate) use stack::Stack;
