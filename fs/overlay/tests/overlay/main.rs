//! Tests of the overlay in process, without FUSE: layers, names, copy-up, redirects, races.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod bounded;
mod common;
mod copy_up;
mod data_only;
mod deep;
mod faults;
mod foreign;
mod found;
mod fuse_overlayfs;
mod hard_links;
mod layers;
mod live_layers;
mod model;
mod model_tree;
mod moving;
mod names;
mod open_files;
mod races;
mod read_ahead;
mod record;
mod recovered;
mod times;
mod unchanged;
mod xattr_whiteouts;
mod zero_device;
