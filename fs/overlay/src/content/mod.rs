//! The content of files: open descriptors that follow a file over its copy-up, reading and writing.

mod examine;
mod handle;
mod open;
mod privileges;
mod sync;
mod transfer;

pub(crate) use handle::OpenCounts;
pub use handle::{FileHandle, Writer};
pub(crate) use open::Content;
pub use privileges::SETID;
pub(crate) use privileges::{for_caller, truncate};
pub use sync::Close;
pub use transfer::SeekTo;
