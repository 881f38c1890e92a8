//! Operations that create, rename and remove containers, and the processes that serve a mount or run a command
//! in it.
//!
//! These operations open containers by name ([`crate::recover::open`]) or create new ones. Operations on an
//! open container are in [`crate::container`] and [`crate::snapshot`].

pub mod adopt;
pub mod clone;
pub mod containerd;
pub mod create;
pub mod enter;
pub mod exec;
mod foreign;
pub mod hook;
mod identity;
pub mod image;
mod image_layers;
mod image_snapshots;
pub mod mapping;
pub mod program;
pub mod push;
pub mod release;
pub mod rename;
pub mod serve;
mod terminal;
pub mod undelete;
pub mod update;
pub mod whole;
