//! The content of files: reads and writes through handles that stay valid across a copy-up.

mod descriptors;
mod examine;
mod handle;
mod open;
mod privileges;
mod record;
mod sync;
mod transfer;

pub(crate) use descriptors::{ContentDescriptors, InodeKey};
pub use examine::UsualChange;
pub(crate) use handle::OpenCounts;
pub use handle::{FileHandle, Opened, VersionedDescriptor, Writer};
pub(crate) use open::Content;
pub use privileges::SETID;
pub(crate) use privileges::{change_for_caller, truncate};
pub(crate) use record::FileRecord;
pub use sync::Close;
pub use transfer::SeekTo;
