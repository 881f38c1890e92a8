//! The power of a disk goes under a mount or a store.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod mount;
mod moving;
mod receiving;
mod store;
