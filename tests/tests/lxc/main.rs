//! Containers of LXC.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod adopt;
mod backup;
mod confined;
mod driver;
mod example;
mod freezing;
mod front;
mod mapped_exec;
mod rootless;
mod stock;
mod systemd;
mod transfers;
mod under_fire;
mod verbs;
