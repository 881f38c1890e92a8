//! Programs on a mount with a keeper while its daemon is killed again and again (docs/decisions/0035). Each program must
//! do what it does in a plain directory.
//!
//! `COWL_UNDER_FIRE=1` repeats each one until the daemon has been killed 200 times.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod databases;
mod debian;
mod field;
mod files;
mod programs;
