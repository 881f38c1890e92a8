//! The on-disk encoding of overlayfs's markers, and of cowl's own. Pure: no system calls, no paths.
//!
//! The rules are those of the kernel's Documentation/filesystems/overlayfs.rst. docs/format.md lists which markers
//! each reader understands.

pub mod foreign;
pub mod number;
pub mod origin;
pub mod redirect;
pub mod xattr_names;
pub mod zero_device;

pub use number::InodeNumberXattr;
pub use redirect::Redirect;
pub use xattr_names::{ACL_ACCESS, ACL_DEFAULT, CAPABILITY, XattrSpace};

/// The value of the opaque xattr of a directory that hides the layers below.
pub const OPAQUE: &[u8] = b"y";
/// The value of the opaque xattr of a directory that contains xattr whiteouts.
pub const OPAQUE_XATTR_WHITEOUTS: &[u8] = b"x";
