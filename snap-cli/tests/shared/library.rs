//! The store of a test, as the library sees it.

use std::path::Path;
use std::time::Duration;

use cowl::store::{Session, Store};

/// Opens the store, as a command does.
pub(crate) fn open(path: &Path) -> cowl::error::Result<Store> {
    let session = Session {
        command: "test".to_owned(),
        patience: Duration::from_secs(5),
        mounts: Default::default(),
        program: None,
    };
    Store::open(path, session)
}
