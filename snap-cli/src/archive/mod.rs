//! Root filesystems in and out: tar archives and plain folders.
//!
//! `import` fills the tree of a new layer, `export` writes a state as a tar that GNU tar unpacks to
//! the same tree. Nothing here prints, and nothing here knows stores, containers or manifests.

mod acl;
pub mod bundle;
mod compress;
pub mod delta;
mod directories;
mod dirs;
pub mod export;
mod extended;
pub mod folder;
pub mod image;
pub mod import;
pub mod input;
mod limits;
mod marks;
mod member;
pub mod oci;
mod pax;
mod place;
mod sparse;
mod stream;
mod tree;
pub mod unfinished;
mod unpack;
mod writer;

pub use compress::Compression;
pub use export::Exported;
pub use import::Imported;
#[cfg(test)]
mod bundle_tests;
#[cfg(test)]
mod delta_tests;
#[cfg(test)]
mod export_tests;
#[cfg(test)]
mod import_tests;
#[cfg(test)]
mod odd_tests;
