//! Changes of names: creation, hard links, removal, rename.
//!
//! Each operation copies up the directories that it changes, locks their names, and then changes the upper layer.

mod create;
mod dirs;
mod link;
mod name_removal;
mod redirect;
mod remove;
mod rename;
mod upper_names;
mod zero_device;

pub(crate) use create::Create;
pub(crate) use link::Link;
pub(crate) use name_removal::NameRemoval;
pub(crate) use redirect::Redirects;
pub(crate) use remove::Remove;
pub(crate) use rename::Rename;
pub use rename::RenameFlags;
pub(crate) use upper_names::UpperNames;
