//! Containers of `cowl`, mounted and used.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod bad_input;
mod browse;
mod check;
mod collect_race;
mod completion;
mod daemon_life;
mod daemon_limits;
mod damage;
mod databases;
mod deep_trees;
mod diff;
mod doctor;
mod durability;
mod durability_disks;
mod ephemeral;
mod exchange;
mod exec;
mod full_disk;
mod hostile_tree;
mod hosts;
mod in_use;
mod keepers;
mod kernel_driver;
mod kernel_switching;
mod kernel_user;
mod live_flatten;
mod main_job;
mod many_snapshots;
mod mount_helper;
mod moving_blocked;
mod moving_differential;
mod moving_files;
mod moving_frozen;
mod moving_full;
mod moving_projects;
mod moving_undone;
mod moving_upgrades;
mod namespaces;
mod output;
mod overlays_above;
mod passthrough_choice;
mod plain_text;
mod plain_user;
mod plain_user_end;
mod prune;
mod reach;
mod recorded;
mod run_files;
mod sending;
mod transcripts;
mod trash;
mod upgrade;
