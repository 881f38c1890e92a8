//! Lookup of the requested LXC container in cowl's stores, and its adoption.

use std::path::Path;

use super::front::Front;
use crate::error::{Error, Kind, Result};
use crate::lifecycle::adopt::{AdoptSource, Candidate, adopt};
use crate::recover;
use crate::store::manifest::ContainerManifest;
use crate::store::name::ContainerName;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// An adopted container, with its store.
#[derive(Debug)]
pub(super) struct ManagedContainer {
    pub(super) store: Store,
    pub(super) manifest: ContainerManifest,
}

impl Front<'_> {
    /// Returns the container if cowl manages it. An interrupted adoption is completed or rolled back first.
    pub(super) fn find_managed(&self) -> Result<Option<ManagedContainer>> {
        match self.search_stores()? {
            Some(managed) if managed.manifest.moving.is_some() => {
                match recover::open(&managed.store, &managed.manifest.name) {
                    Ok(container) => drop(container),
                    Err(error) if error.kind == Kind::NotFound => {}
                    Err(error) => return Err(error),
                }
                self.search_stores()
            }
            found => Ok(found),
        }
    }

    fn search_stores(&self) -> Result<Option<ManagedContainer>> {
        if !disk::exists(&self.context.root.join("store.json"))? {
            return Ok(None);
        }
        let mut unreadable = None;
        for store in self.context.stores()? {
            for (_, record) in store.containers()? {
                match record {
                    Ok(record) if self.is_requested(&record.body) => {
                        return Ok(Some(ManagedContainer {
                            store,
                            manifest: record.body,
                        }));
                    }
                    Ok(_) => {}
                    Err(error) => unreadable = Some(error),
                }
            }
        }
        // The unreadable manifest may be that of the requested container.
        unreadable.map_or(Ok(None), Err)
    }

    fn is_requested(&self, manifest: &ContainerManifest) -> bool {
        let requested = &self.container;
        manifest.lxc.as_ref().is_some_and(|lxc| {
            lxc.name == requested.name && is_same_dir(&lxc.lxcpath, &requested.lxcpath)
        })
    }

    /// Returns the container, and adopts it if cowl does not manage it yet.
    pub(super) fn find_or_adopt(&self) -> Result<ManagedContainer> {
        if let Some(managed) = self.find_managed()? {
            return Ok(managed);
        }
        // If several processes get here at the same time, the lock lets only one adopt the container.
        let locked = self.lock()?;
        if let Some(managed) = self.find_managed()? {
            return Ok(managed);
        }
        let home = self.context.open_or_create_store()?;
        let candidate = Candidate::inspect(&home, &AdoptSource::Lxc(self.container.clone()))?;
        let name = ContainerName::parse(&self.container.name)?;
        let store = candidate.store(&home, None)?;
        adopt(&store, &candidate, &name).map_err(|error| match store.find_id(&name) {
            Ok(_) => error.hint(format!(
                "choose another name in cowl: cowl adopt {name} -P {} --name OTHER",
                self.container.lxcpath.shown()
            )),
            Err(_) => error,
        })?;
        drop(locked);
        self.print_notes(candidate.notes.clone());
        self.messages.note(&format!(
            "adopted {name} into the store {}; to revert this: cowl release {name}",
            store.root().shown()
        ));
        self.find_managed()?.ok_or_else(|| {
            Error::failed(format!("{name} no longer exists"))
                .hint("another command has just released or destroyed it; run this command again")
        })
    }
}

/// Returns whether two paths lead to the same directory.
fn is_same_dir(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path);
    one == other
        || real(one)
            .ok()
            .zip(real(other).ok())
            .is_some_and(|(a, b)| a == b)
}
