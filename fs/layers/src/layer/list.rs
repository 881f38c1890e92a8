//! What one layer's folder holds.

use std::os::fd::AsFd;

use super::{LayerDir, Markers, foreign, zero_device};
use crate::error::Result;
use crate::format::foreign::is_mark;
use crate::format::{NumberMark, OPAQUE_XATTR_WHITEOUTS};
use crate::name::Name;
use crate::sys;
use crate::sys::stat::FileKind;

/// One name in one layer's folder.
#[derive(Clone, Debug)]
pub struct LayerEntry {
    /// The name.
    pub name: Name,
    /// Its type.
    pub kind: FileKind,
    /// Inode number on disk.
    pub ino: u64,
    /// It hides the name in the layers below and is nothing itself.
    pub whiteout: bool,
}

/// Reads a directory of a layer, whiteouts included; those that are marked files only if markers count.
pub fn list(dir: &LayerDir, markers: Markers) -> Result<Vec<LayerEntry>> {
    let open = dir.readable()?;
    let fd = (*open).as_fd();
    let space = dir.layer().space();
    let marks_here = sys::xattr::list_open(fd)?;
    let has = |mark: &str| marks_here.iter().any(|name| **name == *mark.as_bytes());
    let marked_files = markers == Markers::Read
        && has(space.opaque())
        && sys::xattr::get(fd, space.opaque().as_bytes())?
            .is_some_and(|value| value == OPAQUE_XATTR_WHITEOUTS);
    let devices = has(space.nodes());
    let mut raw = sys::dir::read(&open)?;
    let hidden = if dir.layer().is_foreign() {
        foreign::take_marks(&mut raw)
    } else {
        Vec::new()
    };
    let mut found = Vec::with_capacity(raw.len() + hidden.len());
    for name in hidden {
        found.push(LayerEntry {
            name: Name::new(&name)?,
            kind: FileKind::CharDevice,
            ino: 0,
            whiteout: true,
        });
    }
    for entry in raw {
        if is_mark(&entry.name) {
            dir.layer().note_likely_mark(&entry.name);
        }
        let mut kind = match entry.kind {
            Some(kind) => kind,
            None => sys::stat::stat_at(fd, &entry.name)?.kind(),
        };
        let whiteout = match kind {
            FileKind::CharDevice => sys::stat::stat_at(fd, &entry.name)?.is_whiteout_device(),
            FileKind::Regular if marked_files => {
                sys::xattr::get_at(fd, &entry.name, space.whiteout().as_bytes())?.is_some()
            }
            _ => false,
        };
        if devices
            && kind == FileKind::Regular
            && !whiteout
            && zero_device::is_at(fd, &entry.name, space)?
        {
            kind = FileKind::CharDevice;
        }
        found.push(LayerEntry {
            name: Name::new(&entry.name)?,
            kind,
            ino: entry.ino,
            whiteout,
        });
    }
    Ok(found)
}

/// The number that `name` keeps from before its copy-up; `None` also when it is gone by now.
pub fn number_at(dir: &LayerDir, name: &[u8]) -> Result<Option<NumberMark>> {
    let mark = dir.layer().space().ino();
    match sys::xattr::get_at((*dir.fd()?).as_fd(), name, mark.as_bytes()) {
        Ok(Some(raw)) => NumberMark::parse(&raw),
        Ok(None) => Ok(None),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}
