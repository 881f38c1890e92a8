//! The file system itself: what every operation means, in process, without a mount and without root.
//!
//! It does not know the FUSE protocol (the daemon translates) and makes system calls through
//! [`cowl_layers::sys`] only. An operation runs on an [`Op`], which holds the stack still while it lasts;
//! [`Overlay::push_layer`] waits for all of them.
//!
//! The modules, each of which uses only those before it (docs/decisions/0024):
//!
//! - [`inode`]: the objects that are known, without system calls; [`idmap`] and [`plan`]: pure functions;
//! - `reach`: the context of an operation, and the way from an inode to its object on disk;
//! - `names`: lookup, and all names of a file; `listing`: reading directories;
//! - `copy_up`: moving an object into the layer that is written;
//! - `content`: open files;
//! - `metadata`: attributes and xattrs;
//! - `change`: creation, links, removal, rename;
//! - `overlay`, `services`, `op`: the mount's state, the assembly of the above, and the public operations;
//!   `push`, `kernel_index`: changes of the stack, and taking over layers of the kernel's overlayfs.

mod change;
mod content;
mod copy_up;
pub mod idmap;
pub mod inode;
mod kernel_index;
mod listing;
mod metadata;
mod names;
mod op;
mod overlay;
pub mod plan;
mod push;
mod reach;
mod services;

pub use change::RenameFlags;
pub use content::{Close, FileHandle, Opened, SETID, SeekTo, VersionedDescriptor, Writer};
pub use inode::OpenOptions;
pub use listing::{DirEntry, END, Listing};
pub use metadata::{Attr, SetAttr};
pub use op::Op;
pub use overlay::Overlay;
pub use push::PushError;
pub use reach::{Caller, OverlayOptions};
