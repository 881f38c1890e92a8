//! Inodes: the objects that were looked up, with their locations, their known names, and their open
//! descriptors. No system calls.
//!
//! Locks, in the order in which they may be taken: an inode's `copying` (long), a directory's `names`
//! (one change of names), any inode's `state`, two of them by their numbers (over no system call but the
//! one that changes the object's own name).

#[cfg(test)]
pub(crate) mod fixture;
mod flags;
mod identity;
mod object;
mod renewed;
mod state;
mod table;
mod times;

pub use flags::{Facts, FactsSnapshot, Flags};
pub(crate) use flags::{NO_CAPABILITIES, PLAIN_DATA};
pub use identity::Identity;
pub(crate) use object::{Alias, DirState, FileState, InodeState};
pub use object::{Inode, OpenOptions};
pub use table::InodeTable;
pub(crate) use table::{NumberMarker, OnConflict};
