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
mod driver;
mod example;
mod front;
mod stock;
mod systemd;
mod under_fire;
mod verbs;
