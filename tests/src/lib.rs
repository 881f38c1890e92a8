//! Shared code of the end-to-end tests: the programs under test, a Debian root filesystem, mounts that are removed at
//! the end of a test, reading and comparison of trees, random operations.
//!
//! This package does not depend on cowl's crates and tests only externally visible behavior, so that a wrong assumption
//! is not shared between code and test.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "everything here runs in tests, where a panic reports the failure"
)]

pub mod beside;
pub mod command;
pub mod conditions;
pub mod containerd;
pub mod cowl;
pub mod disk;
pub mod engine;
pub mod holes;
pub mod hosts;
pub mod identity;
pub mod images;
pub mod killer;
pub mod layers;
pub mod layout;
pub mod lxc;
pub mod lxc_stub;
pub mod mount;
pub mod noise;
pub mod pair;
pub mod plain_user;
pub mod podman;
pub mod postgres;
pub mod power_cut;
pub mod process;
pub mod programs;
pub mod random;
pub mod registry;
pub mod requests;
pub mod rootfs;
pub mod run;
pub mod samples;
pub mod scratch;
pub mod tree;
pub mod two_hosts;
pub mod workload;
