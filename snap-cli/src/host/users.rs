//! Who uses a mounted file system, for messages.

use std::path::Path;

pub use cowl_layers::sys::users::{Device, Hold, User};

use super::mountinfo;
use crate::error::{Error, Result};

/// Lists all processes but `except` that use the file system `dev`. Processes that end meanwhile, or that
/// this one may not inspect, are left out.
pub fn list(dev: Device, except: &[u32]) -> Result<Vec<User>> {
    cowl_layers::sys::users::list(dev, except)
        .map_err(|error| Error::at("list", Path::new("/proc"), error))
}

/// Lists users for a message, a few of many.
pub fn describe(users: &[User]) -> String {
    const SHOWN: usize = 8;
    let mut all: Vec<_> = users.iter().take(SHOWN).map(User::describe).collect();
    if users.len() > SHOWN {
        all.push(format!("and {} more", users.len() - SHOWN));
    }
    all.join(", ")
}

/// Returns the device number of the topmost mount at `at`, according to mountinfo.
pub fn device_at(at: &Path) -> Result<Option<Device>> {
    let mounts = mountinfo::read()?;
    Ok(mountinfo::topmost(&mounts, at).map(|mount| mount.device))
}
