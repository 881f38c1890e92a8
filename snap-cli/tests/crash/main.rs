//! Commands that are killed at every system call.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod archive;
mod kill;
#[path = "../shared/library.rs"]
mod library;
mod lxc;
mod outside;
mod remains;
mod snapshots;
mod undo;
mod upkeep;
mod web;
