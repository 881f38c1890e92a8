//! What the front does: each task a few lines over the library.

use std::ffi::OsStr;
use std::path::Path;

use super::front::Front;
use super::kept::Kept;
use super::list::{self, One};
use crate::cli::output;
use crate::cli::text::read_text;
use crate::container::Container;
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::lifecycle::clone::clone;
use crate::lxc::locked::LockedSnapshots;
use crate::lxc::snapshots::{self, LxcSnapshot};
use crate::recover;
use crate::snapshot::lxc_import;
use crate::snapshot::remove::{Protected, plan, remove};
use crate::snapshot::restore::restore;
use crate::snapshot::take::{SnapshotRequest, take};
use crate::snapshot::{Losses, resolve};
use crate::store::Store;
use crate::store::manifest::SnapshotRef;
use crate::store::name::{Address, ContainerName};

impl Front<'_> {
    pub(super) fn take(&self, comment: Option<&Path>) -> Result<()> {
        // Before anything is made.
        let comment = comment.map(read_text).transpose()?.unwrap_or_default();
        let wish = SnapshotRequest {
            comment,
            ..SnapshotRequest::default()
        };
        let Kept { store, manifest } = self.kept_from_now()?;
        let name = &manifest.name;
        self.context
            .hooked(Event::Snapshot, &store, name, None, |env| {
                let mut container = recover::open(&store, name)?;
                let taken = take(&mut container, &wish)?;
                env.set("COWL_SNAPSHOT", taken.as_str());
                self.context.keep_depth(&mut container);
                Ok(())
            })?;
        self.context.settle(&store, name);
        Ok(())
    }

    /// The container as cowl keeps it, when what killed commands left is put in order.
    fn kept_whole(&self) -> Result<Option<Kept>> {
        drop(self.place()?);
        let Some(kept) = self.kept()? else {
            return Ok(None);
        };
        for tree in snapshots::list(&snapshots::snapshots_dir(&self.container)?)? {
            if lxc_import::find_imported(&kept.manifest, &tree)?.is_some() {
                let container = recover::open(&kept.store, &kept.manifest.name)?;
                lxc_import::remove_imported(&container, &self.place()?)?;
                break;
            }
        }
        Ok(Some(kept))
    }

    pub(super) fn restore(&self, snapshot: &OsStr, new: Option<&OsStr>) -> Result<()> {
        let kept = self.kept_whole()?;
        match (list::find(self, kept.as_ref(), snapshot)?, kept, new) {
            (One::Cowls(found), Some(kept), None) => self.go_back(&kept, &found),
            (One::Cowls(found), Some(kept), Some(new)) => {
                let source = Address {
                    container: kept.manifest.name.clone(),
                    snapshot: Some(found.name),
                };
                refuse_loss(&kept.store, &source)?;
                let new = ContainerName::parse(new)?;
                let notes = clone(&kept.store, &source, &new)?;
                self.context.settle(&kept.store, &new);
                self.notes(notes);
                Ok(())
            }
            (One::Lxcs(tree), Some(kept), None) => {
                // It becomes cowl's first: then what is there now stays too.
                let mut container = recover::open(&kept.store, &kept.manifest.name)?;
                let brought = self.bring(&mut container, &self.place()?, &tree)?;
                drop(container);
                self.go_back(&kept, &brought)
            }
            (One::Lxcs(tree), _, Some(new)) => {
                let new = new
                    .to_str()
                    .ok_or_else(|| Error::usage("the new name is not valid UTF-8"))?;
                let place = self.place()?;
                let tree = place.find(&tree.name)?;
                let mut bar = output::Bar::new("restoring");
                let notes = place.restore_as(&tree, new, &mut |done| bar.tell(done))?;
                drop(bar);
                self.notes(notes);
                Ok(())
            }
            (One::Lxcs(tree), None, None) => {
                let place = self.place()?;
                // It may have changed while we waited.
                let tree = place.find(&tree.name)?;
                let mut bar = output::Bar::new("restoring");
                let notes = place.restore(&tree, &mut |done| bar.tell(done))?;
                drop(bar);
                self.notes(notes);
                Ok(())
            }
            (One::Cowls(_), None, _) => Err(Error::damaged("a snapshot of no container")),
        }
    }

    fn bring(
        &self,
        container: &mut Container<'_>,
        place: &LockedSnapshots,
        tree: &LxcSnapshot,
    ) -> Result<SnapshotRef> {
        let mut bar = output::Bar::new("importing");
        let brought =
            lxc_import::import_snapshot(container, place, tree, &mut |done| bar.tell(done))?;
        drop(bar);
        self.notes(brought.notes);
        container.snapshot(&brought.name).map(|(found, _)| found)
    }

    fn go_back(&self, kept: &Kept, found: &SnapshotRef) -> Result<()> {
        let (store, name) = (&kept.store, &kept.manifest.name);
        let target = Address {
            container: name.clone(),
            snapshot: Some(found.name.clone()),
        };
        refuse_loss(store, &target)?;
        let to = Some(found.name.as_str());
        let done = self.context.hooked(Event::Restore, store, name, to, |_| {
            let mut container = recover::open(store, name)?;
            let restored = restore(&mut container, &found.name)?;
            recover::complete_outside(container)?;
            Ok(restored)
        })?;
        self.context.settle(store, name);
        if let Some(auto) = done.auto_snapshot {
            self.said.note(&format!(
                "what {name} was until now stays as {auto}: cowl restore {name} {auto} undoes this"
            ));
        }
        Ok(())
    }

    pub(super) fn destroy(&self, snapshot: &OsStr) -> Result<()> {
        let kept = self.kept_whole()?;
        match (list::find(self, kept.as_ref(), snapshot)?, kept) {
            (One::Cowls(found), Some(kept)) => self.remove(&kept, &[found]),
            (One::Lxcs(tree), _) => {
                let place = self.place()?;
                let tree = place.find(&tree.name)?;
                place.remove(&[tree])
            }
            (One::Cowls(_), None) => Err(Error::damaged("a snapshot of no container")),
        }
    }

    pub(super) fn destroy_all(&self) -> Result<()> {
        let kept = self.kept_whole()?;
        let trees = snapshots::list(&snapshots::snapshots_dir(&self.container)?)?;
        if !trees.is_empty() {
            let place = self.place()?;
            place.remove(&place.list()?)?;
        }
        match kept {
            Some(kept) => self.remove(&kept, &kept.manifest.snapshots),
            None => Ok(()),
        }
    }

    fn remove(&self, kept: &Kept, snapshots: &[SnapshotRef]) -> Result<()> {
        let (store, name) = (&kept.store, &kept.manifest.name);
        if snapshots.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = snapshots.iter().map(|s| s.name.as_str()).collect();
        let names = names.join(" ");
        let ids: Vec<_> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        self.context
            .hooked(Event::Rm, store, name, Some(&names), |_| {
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

/// Refuses a snapshot of which a part may be lost: LXC's command line has no word for taking it as it is.
fn refuse_loss(store: &Store, source: &Address) -> Result<()> {
    let refused = resolve(store, source)?.refuse_loss(store, Losses::Refuse);
    refused.map_err(|error| {
        let hint = "inspect it (cowl mount, ls, diff); cowl restore and cowl clone take it as it is with --force";
        error.hint(hint)
    })
}
