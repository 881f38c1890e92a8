//! The container that is asked for, as cowl keeps it; and having cowl keep one.

use std::path::Path;

use super::front::Front;
use crate::error::{Error, Kind, Result};
use crate::lifecycle::adopt::{AdoptSource, Candidate, adopt};
use crate::recover;
use crate::store::manifest::ContainerManifest;
use crate::store::name::ContainerName;
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// A container that cowl keeps.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) store: Store,
    pub(super) manifest: ContainerManifest,
}

impl Front<'_> {
    /// The container as cowl keeps it, if it does. What a killed adoption left is finished or taken back
    /// first.
    pub(super) fn kept(&self) -> Result<Option<Kept>> {
        match self.look()? {
            Some(kept) if kept.manifest.moving.is_some() => {
                match recover::open(&kept.store, &kept.manifest.name) {
                    Ok(container) => drop(container),
                    Err(error) if error.kind == Kind::NotFound => {}
                    Err(error) => return Err(error),
                }
                self.look()
            }
            found => Ok(found),
        }
    }

    fn look(&self) -> Result<Option<Kept>> {
        if !disk::exists(&self.context.root.join("store.json"))? {
            return Ok(None);
        }
        let mut unreadable = None;
        for store in self.context.stores()? {
            for (_, record) in store.containers()? {
                match record {
                    Ok(record) if self.is_it(&record.body) => {
                        return Ok(Some(Kept {
                            store,
                            manifest: record.body,
                        }));
                    }
                    Ok(_) => {}
                    Err(error) => unreadable = Some(error),
                }
            }
        }
        // It may have been this one.
        unreadable.map_or(Ok(None), Err)
    }

    fn is_it(&self, manifest: &ContainerManifest) -> bool {
        let wanted = &self.container;
        manifest
            .lxc
            .as_ref()
            .is_some_and(|lxc| lxc.name == wanted.name && same(&lxc.lxcpath, &wanted.lxcpath))
    }

    /// The container as cowl keeps it, from now on if it did not until now.
    pub(super) fn kept_from_now(&self) -> Result<Kept> {
        if let Some(kept) = self.kept()? {
            return Ok(kept);
        }
        // Of several at once, one adopts.
        let place = self.place()?;
        if let Some(kept) = self.kept()? {
            return Ok(kept);
        }
        let home = self.context.store_or_new()?;
        let candidate = Candidate::inspect(&home, &AdoptSource::Lxc(self.container.clone()))?;
        let name = ContainerName::parse(&self.container.name)?;
        let store = candidate.store(&home, None)?;
        adopt(&store, &candidate, &name).map_err(|error| match store.find_id(&name) {
            Ok(_) => error.hint(format!(
                "give this one another name in cowl: cowl adopt {name} -P {} --name OTHER",
                self.container.lxcpath.shown()
            )),
            Err(_) => error,
        })?;
        drop(place);
        self.notes(candidate.notes.clone());
        self.said.note(&format!(
            "{name} is kept by cowl from now on, in the store {}; to take it back: cowl release {name}",
            store.root().shown()
        ));
        self.kept()?.ok_or_else(|| {
            Error::failed(format!("{name} went away a moment ago"))
                .hint("somebody gave it back, or destroyed it")
        })
    }
}

/// Whether two paths lead to one folder.
fn same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path);
    one == other
        || real(one)
            .ok()
            .zip(real(other).ok())
            .is_some_and(|(a, b)| a == b)
}
