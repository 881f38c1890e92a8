//! What begins and ends a container, and what runs in it: create, clone, adopt, import, rename, undelete,
//! and the processes that serve a mount or run a command in it. These open containers by name
//! ([`crate::recover::open`]) or make new ones; what works on an open container is in [`crate::container`] and
//! [`crate::snapshot`].

pub mod adopt;
pub mod clone;
pub mod create;
pub mod enter;
pub mod exec;
pub mod hook;
pub mod release;
pub mod rename;
pub mod serve;
pub mod undelete;
pub mod whole;
