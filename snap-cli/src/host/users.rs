//! The processes that use a mounted file system, for messages.

use std::path::Path;

pub use cowl_layers::sys::users::{Device, Hold, User};

use super::mountinfo;
use crate::error::{Error, Result};

/// Lists all processes except `except` that use the file system `dev`.
///
/// Processes that end in the meantime, or that this one may not inspect, are omitted.
pub fn list(dev: Device, except: &[u32]) -> Result<Vec<User>> {
    cowl_layers::sys::users::list(dev, except)
        .map_err(|error| Error::at("list", Path::new("/proc"), error))
}

/// Formats the list of processes for a message, which is limited to a few of them.
pub fn describe(users: &[User]) -> String {
    const MAX_SHOWN: usize = 8;
    let mut all: Vec<_> = users.iter().take(MAX_SHOWN).map(User::describe).collect();
    if users.len() > MAX_SHOWN {
        all.push(format!("and {} more", users.len() - MAX_SHOWN));
    }
    all.join(", ")
}

/// Returns the device number of the topmost mount at `at`, according to mountinfo.
pub fn device_at(at: &Path) -> Result<Option<Device>> {
    let mounts = mountinfo::read()?;
    Ok(mountinfo::topmost(&mounts, at).map(|mount| mount.device))
}
