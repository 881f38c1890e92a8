//! Names: from a name to an inode, from an inode to all its names, and caches for both.

pub(crate) mod absent;
pub(crate) mod deep;
mod intern;
pub(crate) mod links;
mod locate;
mod lookup;
mod path_below;
pub(crate) mod prefetched;
mod resolve;

pub(crate) use intern::{intern_dir, intern_file};
pub(crate) use links::{LinkIndex, Links};
pub(crate) use locate::{dir_state, found_state};
pub(crate) use lookup::{Hit, Names, UNCOUNTED};
pub(crate) use path_below::path_below;
