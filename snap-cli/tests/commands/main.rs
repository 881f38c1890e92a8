//! Commands and library of `cowl`, without containers that run.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod archive_cases;
mod archive_images;
mod archive_limits;
mod archive_more;
mod archive_odd;
mod archive_programs;
mod archive_readers;
mod archive_unsupported;
mod archives;
mod cli_errors;
#[path = "../../../fs/overlay/tests/overlay/common/mod.rs"]
mod common;
mod depth;
mod diff;
mod fake_registry;
mod golden;
mod hooks;
mod image;
mod image_import;
mod image_limits;
#[path = "../shared/library.rs"]
mod library;
mod look;
mod lxc_snapshot;
mod meta;
#[path = "../../../fs/overlay/tests/overlay/model_tree/mod.rs"]
mod model_tree;
mod registry;
mod registry_access;
mod registry_push;
mod registry_retries;
mod registry_update;
mod sending;
mod sending_again;
mod sending_cuts;
mod sending_hostile;
mod sending_parallel;
mod undo;
mod undo_paths;
mod undo_world;
mod verbs_model;
