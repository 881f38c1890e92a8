//! Tests of a cowlfs mount: the view of programs on it, and its effects outside.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod attributes;
mod bytes_written;
mod cached_attributes;
mod copying;
mod cowlfs_cli;
mod differential;
mod directories;
mod early_write_back;
mod failed_calls;
mod faults;
mod first_opens;
mod foreign_layers;
mod found;
mod full_mount;
mod fuse_limits;
mod hostile_content;
mod id_options;
mod kernel_interop;
mod kill_points;
mod killed_daemon;
mod links;
mod live_layers;
mod locks;
mod mount_options;
mod nested;
mod new_files;
mod numbers;
mod open_files;
mod open_requests;
mod passthrough;
mod paths;
mod peer_failures;
mod permissions;
mod privileges;
mod programs;
mod read_only_disk;
mod removal;
mod replaced_daemon;
mod requests;
mod running_program;
mod scale;
mod stacking;
mod syscalls;
mod threads;
mod times;
mod user_namespace;
mod whiteouts;
mod xattrs;
