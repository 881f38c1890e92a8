//! The operations of `lxc-snapshot`: each is a few lines over the library.

use std::ffi::OsStr;
use std::path::Path;

use super::front::Front;
use super::list::{self, AnySnapshot};
use super::managed::ManagedContainer;
use crate::cli::output;
use crate::cli::text::read_text;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::lifecycle::clone::clone;
use crate::lxc::locked::LockedSnapshots;
use crate::lxc::snapshots::{self, LxcSnapshot};
use crate::recover;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::lxc_import;
use crate::snapshot::remove::{Protected, plan, remove};
use crate::snapshot::restore::restore;
use crate::snapshot::take::{SnapshotRequest, take};
use crate::snapshot::{Losses, resolve};
use crate::store::Store;
use crate::store::manifest::SnapshotRef;
use crate::store::name::{Address, ContainerName};

impl Front<'_> {
    /// Takes a snapshot, with the comment from a file; adopts the container if necessary.
    pub(super) fn take(&self, comment: Option<&Path>) -> Result<()> {
        // The file is read first, so that an error in it changes nothing.
        let comment = comment.map(read_text).transpose()?.unwrap_or_default();
        let options = SnapshotRequest {
            comment,
            ..SnapshotRequest::default()
        };
        let ManagedContainer { store, manifest } = self.find_or_adopt()?;
        let name = &manifest.name;
        self.context
            .run_with_hooks(Event::Snapshot, &store, name, None, |env| {
                let mut container = recover::open(&store, name)?;
                let taken = take(&mut container, &options)?;
                env.set("COWL_SNAPSHOT", taken.as_str());
                self.context.limit_depth(&mut container, MergeScope::Any);
                Ok(())
            })?;
        self.context.settle(&store, name);
        Ok(())
    }

    /// Returns the container if cowl manages it, and completes interrupted imports of LXC's snapshots.
    fn find_recovered(&self) -> Result<Option<ManagedContainer>> {
        drop(self.lock()?);
        let Some(managed) = self.find_managed()? else {
            return Ok(None);
        };
        for tree in snapshots::list(&snapshots::snapshots_dir(&self.container)?)? {
            if lxc_import::find_imported(&managed.manifest, &tree)?.is_some() {
                let container = recover::open(&managed.store, &managed.manifest.name)?;
                lxc_import::remove_imported(&container, &self.lock()?)?;
                break;
            }
        }
        Ok(Some(managed))
    }

    /// Restores a snapshot of cowl or of LXC, to the same container or to a new one.
    pub(super) fn restore(&self, snapshot: &OsStr, new: Option<&OsStr>) -> Result<()> {
        let managed = self.find_recovered()?;
        match (list::find(self, managed.as_ref(), snapshot)?, managed, new) {
            (AnySnapshot::Cowl(found), Some(managed), None) => {
                self.restore_in_place(&managed, &found)
            }
            (AnySnapshot::Cowl(found), Some(managed), Some(new)) => {
                let source = Address {
                    container: managed.manifest.name.clone(),
                    snapshot: Some(found.name),
                };
                refuse_loss(&managed.store, &source)?;
                let new = ContainerName::parse(new)?;
                let notes = clone(&managed.store, &source, &new)?;
                self.context.settle(&managed.store, &new);
                self.print_notes(notes);
                Ok(())
            }
            (AnySnapshot::Lxc(tree), Some(managed), None) => {
                // Imported first, so that the restore retains the current state as a snapshot.
                let mut container = recover::open(&managed.store, &managed.manifest.name)?;
                let imported = self.import(&mut container, &self.lock()?, &tree)?;
                drop(container);
                self.restore_in_place(&managed, &imported)
            }
            (AnySnapshot::Lxc(tree), _, Some(new)) => {
                let new = new
                    .to_str()
                    .ok_or_else(|| Error::usage("the new name is not valid UTF-8"))?;
                let locked = self.lock()?;
                let tree = locked.find(&tree.name)?;
                let mut bar = output::Bar::new("restoring");
                let notes = locked.restore_as(&tree, new, &mut |done| bar.update(done))?;
                drop(bar);
                self.print_notes(notes);
                Ok(())
            }
            (AnySnapshot::Lxc(tree), None, None) => {
                let locked = self.lock()?;
                // Read again: it may have changed while this process waited for the lock.
                let tree = locked.find(&tree.name)?;
                let mut bar = output::Bar::new("restoring");
                let notes = locked.restore(&tree, &mut |done| bar.update(done))?;
                drop(bar);
                self.print_notes(notes);
                Ok(())
            }
            (AnySnapshot::Cowl(_), None, _) => {
                Err(Error::damaged("a snapshot belongs to no container"))
            }
        }
    }

    /// Imports a snapshot of LXC into the container's store.
    fn import(
        &self,
        container: &mut Container<'_>,
        locked: &LockedSnapshots,
        tree: &LxcSnapshot,
    ) -> Result<SnapshotRef> {
        let mut bar = output::Bar::new("importing");
        let imported =
            lxc_import::import_snapshot(container, locked, tree, &mut |done| bar.update(done))?;
        drop(bar);
        self.print_notes(imported.notes);
        container.snapshot(&imported.name).map(|(found, _)| found)
    }

    fn restore_in_place(&self, managed: &ManagedContainer, found: &SnapshotRef) -> Result<()> {
        let (store, name) = (&managed.store, &managed.manifest.name);
        let target = Address {
            container: name.clone(),
            snapshot: Some(found.name.clone()),
        };
        refuse_loss(store, &target)?;
        let to = Some(found.name.as_str());
        let done = self
            .context
            .run_with_hooks(Event::Restore, store, name, to, |_| {
                let mut container = recover::open(store, name)?;
                let restored = restore(&mut container, &found.name)?;
                recover::complete_outside(container)?;
                Ok(restored)
            })?;
        self.context.settle(store, name);
        if let Some(auto) = done.auto_snapshot {
            self.messages.note(&format!(
                "the previous state of {name} is retained as {auto}; to undo: cowl restore {name} {auto}"
            ));
        }
        Ok(())
    }

    /// Removes a snapshot of cowl or of LXC.
    pub(super) fn destroy(&self, snapshot: &OsStr) -> Result<()> {
        let managed = self.find_recovered()?;
        match (list::find(self, managed.as_ref(), snapshot)?, managed) {
            (AnySnapshot::Cowl(found), Some(managed)) => self.remove(&managed, &[found]),
            (AnySnapshot::Lxc(tree), _) => {
                let locked = self.lock()?;
                let tree = locked.find(&tree.name)?;
                locked.remove(&[tree])
            }
            (AnySnapshot::Cowl(_), None) => {
                Err(Error::damaged("a snapshot belongs to no container"))
            }
        }
    }

    /// Removes all snapshots of cowl and of LXC.
    pub(super) fn destroy_all(&self) -> Result<()> {
        let managed = self.find_recovered()?;
        let trees = snapshots::list(&snapshots::snapshots_dir(&self.container)?)?;
        if !trees.is_empty() {
            let locked = self.lock()?;
            locked.remove(&locked.list()?)?;
        }
        match managed {
            Some(managed) => self.remove(&managed, &managed.manifest.snapshots),
            None => Ok(()),
        }
    }

    fn remove(&self, managed: &ManagedContainer, snapshots: &[SnapshotRef]) -> Result<()> {
        let (store, name) = (&managed.store, &managed.manifest.name);
        if snapshots.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = snapshots.iter().map(|s| s.name.as_str()).collect();
        let names = names.join(" ");
        let ids: Vec<_> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        self.context
            .run_with_hooks(Event::Rm, store, name, Some(&names), |_| {
                let mut container = recover::open(store, name)?;
                let removal = plan(&container, &ids, Protected::Refuse)?;
                remove(&mut container, &removal.going)?;
                removal
                    .refused
                    .first()
                    .map_or(Ok(()), |refused| Err(refused.to_error()))
            })
    }
}

/// Fails if part of a snapshot may be lost. LXC's command line has no option to use it nevertheless.
fn refuse_loss(store: &Store, source: &Address) -> Result<()> {
    let refused = resolve(store, source)?.refuse_loss(store, Losses::Refuse);
    refused.map_err(|error| {
        let hint =
            "inspect it (cowl mount, ls, diff), and use it with --force: cowl restore, cowl clone";
        error.hint(hint)
    })
}
