//! LXC: its containers, their config files, and the snapshots that LXC's own tools made.
//!
//! From the bottom up: [`config`] and [`layout`] read and write the text of files; [`command`] runs LXC's
//! tools; [`mounts`] makes targets of mounts relative; [`own_files`] finds the files of a config; [`binding`] connects a
//! container of a store to LXC's; [`trust`] checks who can change a config; [`passing`] passes a mount from LXC's
//! namespaces to its daemon; [`snapshots`] lists LXC's snapshots; [`locked`] and `restore` change them. Operations on an
//! open container are in `container::lxc` and `snapshot::lxc_import`.

pub mod binding;
pub mod command;
pub mod config;
pub mod copy;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod layout;
pub mod locked;
pub mod mounts;
pub mod own_files;
pub mod passing;
mod restore;
pub mod snapshots;
mod staging;
pub mod trust;

pub use command::{LxcContainer, LxcState, lxcpath, random_address};
