//! Import and export of root filesystems: tar archives, image layers, images, plain directories.
//!
//! `import` fills the tree of a new layer. `export` writes a state as a tar archive that GNU tar unpacks to the same
//! tree. The module does not print, and does not depend on stores, containers or manifests.

mod acl;
mod below;
pub mod bundle;
pub mod changeset;
mod checksum;
mod compress;
mod copy_dir;
mod dir_attrs;
mod dir_map;
mod entry_path;
pub mod export;
pub mod export_dir;
mod extended;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod image;
pub mod image_source;
pub mod import;
pub mod input;
mod limits;
mod marker_xattrs;
mod member;
mod named_acls;
mod numbers;
pub mod oci;
mod pax;
mod report;
mod rest;
mod sparse;
mod stream;
pub mod unfinished;
mod unpack;
mod unpack_mode;
mod writer;

pub use compress::Compression;
pub use report::TransferReport;
pub use writer::Holes;
#[cfg(test)]
mod below_tests;
#[cfg(test)]
mod bundle_tests;
#[cfg(test)]
mod changeset_tests;
#[cfg(test)]
mod escape_tests;
#[cfg(test)]
mod export_tests;
#[cfg(test)]
mod foreign_tests;
#[cfg(test)]
mod import_tests;
#[cfg(test)]
mod odd_tests;
#[cfg(test)]
mod recorded_tests;
