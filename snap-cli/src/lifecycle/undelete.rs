//! Bringing destroyed containers back.

use crate::container::lxc;
use crate::error::{Error, Result};
use crate::recover;
use crate::store::deleted;
use crate::store::deleted::Deleted;
use crate::store::family;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::ContainerName;
use crate::store::{Store, disk};

/// Brings a destroyed container back, under a new name if one is given. `deleted` was looked up without any
/// lock.
pub fn undelete(store: &Store, deleted: &Deleted, new: Option<&ContainerName>) -> Result<()> {
    let name = match new {
        Some(new) => new.clone(),
        None => deleted::manifest(store, deleted)?.body.name,
    };
    let claim = family::claim(store, &name).map_err(|error| match new {
        Some(_) => error,
        None => error.hint(format!(
            "bring it back under another name: cowl undelete {name} NEW"
        )),
    })?;
    let done = claimed(store, deleted.id, &name);
    claim.remove()?;
    done
}

fn claimed(store: &Store, id: ContainerId, name: &ContainerName) -> Result<()> {
    // Keeps collection away, and anybody else who brings it back.
    let reading = store.lock_shared()?;
    let lock = store.lock_container(id)?;
    let found = deleted::list(store)?.into_iter().find(|one| one.id == id);
    let Some(deleted) = found else {
        lock.remove()?;
        return Err(
            Error::not_found(format!("{name} is not in the trash any more"))
                .hint("`cowl undelete --list` shows what is"),
        );
    };
    let record = deleted::manifest(store, &deleted)?;
    store.open_layers(&record.body.stack)?;
    let moving = lxc::begin_recreation(store, id, &record.body)?;
    // What was there for one mount is brought back to stay.
    let stays = record.body.ephemeral.is_none();
    if record.body.name != *name || moving.is_some() || !stays {
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
    // What is outside the store comes back with it.
    recover::open(store, name).map(drop)
}
