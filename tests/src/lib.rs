//! What the end-to-end tests share: finding the programs, a real root filesystem, mounts that
//! clean up after themselves, reading and comparing whole trees, random operations.
//!
//! This package must not know how cowl works inside: it depends on none of its crates, and checks
//! only what a user could see. That keeps a wrong idea from being right on both sides.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "everything here runs in tests, where a panic with its place is the report"
)]

pub mod beside;
pub mod command;
pub mod conditions;
pub mod cowl;
pub mod disk;
pub mod identity;
pub mod images;
pub mod layers;
pub mod layout;
pub mod lxc;
pub mod mount;
pub mod noise;
pub mod pair;
pub mod power_cut;
pub mod programs;
pub mod random;
pub mod requests;
pub mod rootfs;
pub mod run;
pub mod scratch;
pub mod tree;
pub mod workload;
