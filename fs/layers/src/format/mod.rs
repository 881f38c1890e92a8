//! What the marks of kernel overlayfs look like on disk. Pure: no system calls, no paths.
//!
//! The source of every rule is the kernel's Documentation/filesystems/overlayfs.rst; docs/format.md
//! has the table of what each reader understands.

pub mod foreign;
pub mod number;
pub mod origin;
pub mod redirect;
pub mod xattr_names;
pub mod zero_device;

pub use number::NumberMark;
pub use redirect::Redirect;
pub use xattr_names::{ACL_ACCESS, ACL_DEFAULT, CAPABILITY, XattrSpace};

/// The value of the opaque mark: the folder hides what lies below it.
pub const OPAQUE: &[u8] = b"y";
/// The value of the opaque mark of a folder that holds whiteouts in the form of marked files.
pub const OPAQUE_XATTR_WHITEOUTS: &[u8] = b"x";
