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
mod example;
mod front;
mod kernel_driver;
mod stock;
mod systemd;
mod under_fire;
mod verbs;
