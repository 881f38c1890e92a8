//! What every operation starts from: the stack of layers, held still, the mount's behavior, the caller's
//! ids, and the way from an inode to its object on disk.

mod caller;
mod context;
mod object;
mod options;
mod stack;

pub use caller::Caller;
pub(crate) use caller::has_capability;
pub(crate) use context::Context;
pub(crate) use object::{
    Attempt, access_path, access_path_and_stat, open_content, retry_while_moved, stat_on_disk,
};
pub use options::OverlayOptions;
pub(crate) use stack::Stack;
