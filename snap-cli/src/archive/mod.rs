//! Root filesystems in and out: tar archives and plain folders.
//!
//! `import` fills the tree of a new layer, `export` writes a state as a tar that GNU tar unpacks to
//! the same tree. Nothing here prints, and nothing here knows stores, containers or manifests.

mod acl;
pub mod bundle;
pub mod changeset;
mod checksum;
mod compress;
mod copy_dir;
mod dir_attrs;
mod dir_map;
pub mod export;
pub mod export_dir;
mod extended;
pub mod image;
pub mod import;
pub mod input;
mod limits;
mod marks;
mod member;
pub mod oci;
mod pax;
mod place;
mod report;
mod sparse;
mod stream;
pub mod unfinished;
mod unpack;
mod writer;

pub use compress::Compression;
pub use report::Report;
#[cfg(test)]
mod bundle_tests;
#[cfg(test)]
mod changeset_tests;
#[cfg(test)]
mod export_tests;
#[cfg(test)]
mod import_tests;
#[cfg(test)]
mod odd_tests;
