//! A copy-on-write overlay in process: its operations run without a mount and without root privileges.
//!
//! The crate does not implement the FUSE protocol (the daemon `cowlfs` does) and makes system calls only through
//! [`cowl_layers::sys`]. Each operation runs on an [`Op`], which holds a shared lock on the stack of layers;
//! [`Overlay::push_layer`] takes the exclusive lock, and so waits for all operations.
//!
//! Modules, each of which uses only those above it (docs/decisions/0024):
//!
//! - [`inode`]: the table of known inodes and their state, without system calls; [`idmap`] and [`plan`]: pure
//!   functions;
//! - `reach`: the context of an operation; from an inode to its object on disk;
//! - `names`: lookup, and all names of a file; `listing`: readdir;
//! - `copy_up`: copies of lower objects in the upper layer;
//! - `content`: open files;
//! - `metadata`: attributes and xattrs;
//! - `change`: creation, hard links, removal, rename;
//! - `overlay`, `services`, `op`: the state of a mount, the assembly of the modules above, and the public operations;
//!   `unopened`: mounts without open requests; `push`, `replace_layers`, `record`, `kernel_index`: a new top layer, other lower layers, the state for a successor, and adoption of layers that the
//!   kernel's overlayfs wrote.

mod change;
mod content;
mod copy_up;
pub mod idmap;
pub mod inode;
mod kernel_index;
mod ledger;
mod listing;
mod metadata;
mod names;
mod op;
mod overlay;
pub mod plan;
mod push;
mod reach;
mod record;
mod replace_layers;
mod services;
pub mod unopened;

pub use change::RenameFlags;
pub use content::{
    Close, FileHandle, Opened, SETID, SeekTo, UsualChange, VersionedDescriptor, Writer,
};
pub use inode::OpenOptions;
pub use ledger::{Change, Custodian, Kind, Ledger, LedgerError, RESENT, RequestSlot, StackIds};
pub use listing::{DirEntry, END, Listing};
pub use metadata::{Attr, SetAttr};
pub use op::Op;
pub use overlay::Overlay;
pub use push::{
    PassthroughFile, PushError, PushRequest, Pushed, Unattended, UnattendedCause, Writers,
    prepare_push,
};
pub use reach::{Caller, OverlayOptions};
pub use record::{Estate, Handover, HandoverRecord, Inheritance, Rebuilt, RecordError, Recovered};
pub use replace_layers::{Difference, ReplaceError, Replaced};
