//! What every operation starts from: the stack of layers, held still, the mount's behavior, the caller's
//! ids, and the way from an inode to its object on disk.

mod behaviour;
mod caller;
mod context;
mod object;
mod stack;

pub use behaviour::Behaviour;
pub use caller::Caller;
pub(crate) use caller::is_capable;
pub(crate) use context::Context;
pub(crate) use object::{
    Attempt, access_path, access_path_and_stat, open_content, retry_while_moved, stat_on_disk,
};
pub(crate) use stack::Stack;
