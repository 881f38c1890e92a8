//! Restores destroyed containers.

use crate::container::lxc;
use crate::error::{Error, Result};
use crate::recover;
use crate::store::deleted;
use crate::store::deleted::Deleted;
use crate::store::family;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::ContainerName;
use crate::store::{Store, disk};

/// Restores a destroyed container, under a new name if one is given.
///
/// `deleted` was looked up without a lock, so it is looked up again.
pub fn undelete(store: &Store, deleted: &Deleted, new: Option<&ContainerName>) -> Result<()> {
    let name = match new {
        Some(new) => new.clone(),
        None => deleted::manifest(store, deleted)?.body.name,
    };
    let claim = family::claim(store, &name).map_err(|error| match new {
        Some(_) => error,
        None => error.hint(format!(
            "restore it under another name: cowl undelete {name} NEW"
        )),
    })?;
    let done = undelete_claimed(store, deleted.id, &name);
    claim.remove()?;
    done
}

fn undelete_claimed(store: &Store, id: ContainerId, name: &ContainerName) -> Result<()> {
    // The locks prevent garbage collection and other commands that restore the same container.
    let reading = store.lock_shared()?;
    let lock = store.lock_container(id)?;
    let found = deleted::list(store)?.into_iter().find(|one| one.id == id);
    let Some(deleted) = found else {
        lock.remove()?;
        return Err(
            Error::not_found(format!("{name} is no longer in the trash"))
                .hint("list the trash: cowl undelete --list"),
        );
    };
    let record = deleted::manifest(store, &deleted)?;
    store.open_layers(&record.body.stack)?;
    let moving = lxc::begin_recreation(store, id, &record.body)?;
    // An ephemeral container is restored as a permanent one.
    let was_permanent = record.body.ephemeral.is_none();
    if record.body.name != *name || moving.is_some() || !was_permanent {
        let renamed = ContainerManifest {
            name: name.clone(),
            moving,
            ephemeral: None,
            ..record.body.clone()
        };
        disk::replace(&deleted.dir.join("container.json"), &record.next(renamed))?;
    }
    deleted::undelete(store, &deleted)?;
    drop((lock, reading));
    // Opening the container restores its files outside the store.
    recover::open(store, name).map(drop)
}
