//! Names in the upper layer: availability, and registration of new objects.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::dirs::{refuse_marker_name, require_live_dir};
use crate::inode::{DirState, Inode, OnConflict};
use crate::ledger::Change;
use crate::names::{Names, intern_dir, intern_file};
use crate::plan::{NameState, UpperEntry};
use crate::reach::Context;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::{LayerDir, LayerObject, Markers, probe, zero_device};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::view::{DirNode, FileNode, Loc};

/// Access to the names in directories of the upper layer.
#[derive(Clone, Copy)]
pub(crate) struct UpperNames<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) names: Names<'o>,
}

/// The representation of a new object in the upper layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NewObject {
    /// The type on disk is the type that the mount reports.
    AsStored,
    /// A regular file on disk that the mount reports as a device 0:0.
    ZeroDevice,
}

impl UpperNames<'_> {
    /// Returns the type of the upper layer's entry under a name.
    pub(super) fn upper_entry(&self, upper_dir: &LayerDir, name: &Name) -> Result<UpperEntry> {
        if upper_dir.may_have_foreign_markers() {
            self.cx.stack.upper()?.settle(upper_dir, name)?;
        }
        Ok(match probe(upper_dir, name, Markers::Read)? {
            None => UpperEntry::Nothing,
            Some(found) if found.object == LayerObject::Whiteout => UpperEntry::Whiteout,
            Some(_) => UpperEntry::Object,
        })
    }

    /// Returns the state of a name in all layers.
    pub(super) fn name_state(
        &self,
        dir: &DirState,
        upper_dir: &LayerDir,
        name: &Name,
    ) -> Result<NameState> {
        Ok(NameState {
            upper: self.upper_entry(upper_dir, name)?,
            below: self.names.is_visible_below(dir, name)?,
        })
    }

    /// Returns the error of creating `name` in `parent`: EEXIST, ENOENT if the directory was removed, or EINVAL for a
    /// reserved name.
    ///
    /// It is called before anything is copied up for the new object, without the directory's `names`. Therefore the
    /// name must be checked again later.
    pub(super) fn refuse_new_name(&self, parent: &Arc<Inode>, name: &Name) -> Result<()> {
        let dir = require_live_dir(parent)?;
        refuse_marker_name(&self.cx.stack.upper()?.layer, name)?;
        if self.names.absent.matches(&dir.locs, name) {
            return Ok(());
        }
        match self.names.lookup(parent, name)? {
            Some(_) => Err(Error::Errno(Errno::EXIST)),
            None => Ok(()),
        }
    }

    /// Returns EEXIST if only a lower layer has the name.
    ///
    /// If the upper layer has it, the system call that creates the object fails by itself.
    pub(super) fn require_free(
        &self,
        dir: &DirState,
        upper_dir: &LayerDir,
        name: &Name,
    ) -> Result<()> {
        let known = self.names.absent.matches(&dir.locs, name);
        if dir.locs.len() > 1 && !known && self.upper_entry(upper_dir, name)? == UpperEntry::Nothing
        {
            self.require_free_below(dir, name)?;
        }
        Ok(())
    }

    /// Returns the object that a predecessor created in the request of this operation, with its attributes.
    ///
    /// The kernel locks the directory until the request is answered, so an object that exists now is that one.
    pub(super) fn resumed(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<(Arc<Inode>, Stat)>> {
        if !self.cx.is_resumed(Change::Add) {
            return Ok(None);
        }
        let hit = self.names.lookup_locked(parent, name)?;
        Ok(hit.map(|hit| (hit.inode, hit.stat)))
    }

    /// Returns EEXIST if the name exists in the merged lower layers.
    pub(super) fn require_free_below(&self, dir: &DirState, name: &Name) -> Result<()> {
        match self.names.is_visible_below(dir, name)? {
            true => Err(Error::Errno(Errno::EXIST)),
            false => Ok(()),
        }
    }

    /// Adds a new object of the upper layer to the inode table.
    pub(super) fn intern_new(
        &self,
        parent: &Arc<Inode>,
        upper_dir: &Arc<LayerDir>,
        name: &Name,
        new: NewObject,
    ) -> Result<(Arc<Inode>, Stat)> {
        let mut stat = sys::stat::stat_at((*upper_dir.fd()?).as_fd(), name)?;
        if new == NewObject::ZeroDevice {
            stat = zero_device::device_stat(stat);
        }
        let ino = self.cx.stack.view().number(upper_dir.layer(), &stat, None);
        let locator = self.names.locator();
        let inode = if stat.kind() == FileKind::Directory {
            let location = LayerDir::child(upper_dir, name.clone(), stat.ino);
            location.note_no_foreign_markers();
            let node = DirNode {
                locs: vec![location],
                below: None,
                redirect: None,
                stat,
                ino,
            };
            intern_dir(&locator, (parent, name), node, OnConflict::Renumber)?
        } else {
            let node = FileNode {
                loc: Loc {
                    dir: upper_dir.clone(),
                    name: name.clone(),
                },
                data: None,
                data_missing: false,
                below: None,
                redirect: None,
                stat,
                ino,
            };
            intern_file(&locator, (parent, name), node, OnConflict::Renumber)?
        };
        Ok((inode.ok_or(Error::Errno(Errno::STALE))?, stat))
    }
}
