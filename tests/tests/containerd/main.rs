//! containerd on a store of cowl: `cowl-snapshotter`, and cowl's commands on containers of containerd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod addresses;
mod conformance;
mod containers;
mod kills;
mod layers;
mod registry;
mod replaced;
mod unanswered;
