//! The generated server of the snapshots service (`build.rs`).
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated code"
)]

include!(concat!(
    env!("OUT_DIR"),
    "/containerd.services.snapshots.v1.Snapshots.rs"
));
