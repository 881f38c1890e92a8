//! Owner, mode, size, times and xattrs of objects.

mod acl;
mod capability;
mod read;
mod set;
mod xattr;

pub use read::Attr;
pub(crate) use read::Attributes;
pub use set::SetAttr;
pub(crate) use set::SetAttributes;
pub(crate) use xattr::Xattrs;
