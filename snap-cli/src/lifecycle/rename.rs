//! Giving a container another name. Everything of it is found by its id, so that a mount stays as it is.

use crate::container::Swap;
use crate::error::{Error, Result};
use crate::recover;
use crate::store::Store;
use crate::store::family;
use crate::store::manifest::ContainerManifest;
use crate::store::name::ContainerName;

/// Renames the container `old`.
pub fn rename(store: &Store, old: &ContainerName, new: &ContainerName) -> Result<()> {
    if old == new {
        return Err(Error::usage(format!("{old} has that name already")));
    }
    // What is wrong with the old name is told before anything about the new one.
    store.find_id(old)?;
    let claim = family::claim(store, new)?;
    let done = claimed(store, old, new);
    claim.remove()?;
    done
}

fn claimed(store: &Store, old: &ContainerName, new: &ContainerName) -> Result<()> {
    let mut container = recover::open(store, old)?;
    let next = ContainerManifest {
        name: new.clone(),
        ..container.manifest().clone()
    };
    container.commit(next, None, |_| Ok(Swap::Done))
}
