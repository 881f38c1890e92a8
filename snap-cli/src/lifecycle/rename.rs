//! Renames a container.
//!
//! All of its files are found by its id, so a mount is not affected.

use crate::container::Swap;
use crate::error::{Error, Result};
use crate::recover;
use crate::store::Store;
use crate::store::family;
use crate::store::manifest::ContainerManifest;
use crate::store::name::ContainerName;
use crate::store::ownership;

/// Renames the container `old`.
pub fn rename(store: &Store, old: &ContainerName, new: &ContainerName) -> Result<()> {
    if old == new {
        return Err(Error::usage(format!(
            "the container is already named {old}"
        )));
    }
    // Report errors of the old name before errors of the new one.
    store.find_id(old)?;
    let claim = family::claim(store, new)?;
    let done = rename_claimed(store, old, new);
    claim.remove()?;
    done
}

fn rename_claimed(store: &Store, old: &ContainerName, new: &ContainerName) -> Result<()> {
    let mut container = recover::open(store, old)?;
    ownership::refuse_owned(container.manifest(), "rename")?;
    let next = ContainerManifest {
        name: new.clone(),
        ..container.manifest().clone()
    };
    container.commit(next, None, |_| Ok(Swap::Done))
}
