//! Copy-up of a lower file with several hard links.
//!
//! All visible names are copied up together, so that they stay links to one file, also after a remount and when this
//! upper layer has become a lower one. A journal entry makes the operation atomic across a crash.

use std::os::fd::AsFd;
use std::sync::Arc;

use cowl_layers::locks::MutexGuard;

use super::commit::{Commit, CopiedFile};
use super::dirs::parent_in_upper;
use super::stage::StagedFile;
use super::times::preserve_times;
use super::zero_device::prepare_dir_for;
use crate::inode::{Alias, FileState, Inode};
use crate::names::{Names, path_below};
use cowl_layers::error::{Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::layer::{LayerDir, WorkDir, journal};
use cowl_layers::sys;
use cowl_layers::sys::order::Order;
use cowl_layers::view::Loc;
use cowl_layers::view::resolve::join;

/// The final step of the copy-up of a file with several names.
#[derive(Clone, Copy)]
pub(super) struct GroupCommit<'o> {
    pub(super) commit: Commit<'o>,
    pub(super) names: Names<'o>,
}

impl GroupCommit<'_> {
    /// Links a staged copy under all names of the file, whose directories must be in the upper layer.
    ///
    /// The intermediate steps are not visible through the mount. After a crash between them, the next mount completes
    /// them from the journal.
    pub(super) fn commit(
        &self,
        inode: &Arc<Inode>,
        file: &FileState,
        copy: StagedFile,
        aliases: &[Alias],
    ) -> Result<()> {
        let cx = self.commit.cx;
        let upper = cx.stack.upper()?;
        let redirect = match (copy.metacopy, aliases.first()) {
            (true, Some(first)) => Some(self.set_redirect(&copy, first)?),
            _ => None,
        };
        let mut locations = Vec::new();
        for alias in aliases {
            locations.push((parent_in_upper(&cx.stack, alias)?, alias));
        }
        let mut paths = Vec::new();
        for (parent, alias) in &locations {
            paths.push(join(&parent.path_in_layer()?, &alias.name));
        }
        let entry = journal::write(&upper.work, copy.staged, &paths, cx.order()?)?;
        let mut linked = Vec::new();
        // Hold the locks until the inode has its new location. Otherwise a concurrent lookup of a linked name would
        // take the copy for another file.
        let _names = lock_all(aliases)?;
        for (parent, alias) in &locations {
            if let Err(error) = self.link_one(inode, alias, parent, &entry, &mut linked) {
                self.roll_back(&linked, entry, &upper.work);
                return Err(error);
            }
        }
        if let Err(error) = cx.order().and_then(|order| sync_dirs(&linked, order)) {
            self.roll_back(&linked, entry, &upper.work);
            return Err(error);
        }
        // Remove the entry before the copy becomes visible: its name in the journal counts as a link on disk.
        if let Err(error) = entry.remove(&upper.work) {
            // Not an error of the operation: the copy-up is complete.
            log::warn!("cannot remove a journal entry: {error} (the next mount removes it)");
        }
        let Some((loc, _)) = linked.into_iter().next() else {
            return Err(Error::NOT_FOUND);
        };
        let to = CopiedFile {
            loc,
            metacopy: copy.metacopy,
            stat: copy.stat,
            redirect,
            orphan: None,
        };
        self.commit.record_copy(inode, file, to)?;
        for alias in aliases {
            alias.parent.advance_generation();
        }
        Ok(())
    }

    /// Sets the redirect of a metacopy with several names.
    ///
    /// Without a redirect, a lookup searches for the content under the name that it was called with.
    fn set_redirect(&self, copy: &StagedFile, first: &Alias) -> Result<Redirect> {
        let stack = &self.commit.cx.stack;
        let path = join(&path_below(stack, &first.parent)?, &first.name);
        let redirect = Redirect::Path(path.into());
        let fd = copy.staged.open_path()?;
        let marker = stack.upper()?.layer.space().redirect().as_bytes();
        sys::xattr::set(fd.as_fd(), marker, &redirect.to_value())?;
        Ok(redirect)
    }

    /// Links the staged file under one of its names, unless that name now belongs to another file.
    fn link_one(
        &self,
        inode: &Arc<Inode>,
        alias: &Alias,
        parent: &Arc<LayerDir>,
        entry: &journal::JournalEntry,
        linked: &mut Vec<(Loc, Arc<Inode>)>,
    ) -> Result<()> {
        // Look the name up again: after the names were collected, it may have been removed or replaced.
        let found = self.names.lookup_locked(&alias.parent, &alias.name)?;
        if !found.is_some_and(|hit| Arc::ptr_eq(&hit.inode, inode)) {
            return Ok(());
        }
        let Commit { cx, inodes } = self.commit;
        let work = &cx.stack.upper()?.work;
        preserve_times(cx, inodes, &alias.parent, parent, |fd| {
            prepare_dir_for(cx, inode, fd)?;
            sys::node::link(work.fd(), entry.inode_name(), fd, &alias.name)
        })?;
        let loc = Loc {
            dir: parent.clone(),
            name: alias.name.clone(),
        };
        linked.push((loc, alias.parent.clone()));
        inode.add_alias(alias.clone());
        Ok(())
    }

    /// Removes the links that a failed copy-up created.
    ///
    /// If the rollback fails, too, the journal entry remains, and the next mount completes the copy-up.
    fn roll_back(
        &self,
        linked: &[(Loc, Arc<Inode>)],
        entry: journal::JournalEntry,
        work: &WorkDir,
    ) {
        let Commit { cx, inodes } = self.commit;
        let names = linked.iter().try_for_each(|(loc, parent)| {
            preserve_times(cx, inodes, parent, &loc.dir, |fd| {
                sys::node::unlink(fd, &loc.name)
            })
        });
        if let Err(error) = names.and_then(|()| entry.remove(work)) {
            log::warn!(
                "cannot roll back the copy-up of a file with several names: {error} (the next mount completes it)"
            );
        }
    }
}

/// Ensures that the links are durable no later than the removal of the journal entry.
fn sync_dirs(linked: &[(Loc, Arc<Inode>)], order: Order) -> Result<()> {
    let mut synced = Vec::new();
    for (loc, _) in linked {
        if !synced.contains(&Arc::as_ptr(&loc.dir)) {
            synced.push(Arc::as_ptr(&loc.dir));
            order.name_first((*loc.dir.fd()?).as_fd())?;
        }
    }
    Ok(())
}

/// Locks the `names` of all parents of these aliases in order of their inode numbers, to prevent a deadlock.
fn lock_all(aliases: &[Alias]) -> Result<Vec<MutexGuard<'_, ()>>> {
    let mut parents: Vec<&Arc<Inode>> = aliases.iter().map(|alias| &alias.parent).collect();
    parents.sort_by_key(|parent| parent.ino());
    parents.dedup_by_key(|parent| parent.ino());
    parents
        .iter()
        .map(|parent| Ok(parent.names()?.lock()))
        .collect()
}
