//! cowlfs as the `mount_program` of podman and buildah, compared with fuse-overlayfs and with plain directories.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod containers;
mod images;
mod registry;
mod registry_hosts;
mod skopeo;
