//! Directory listings of one layer.

use std::os::fd::AsFd;

use super::{LayerDir, Markers, foreign, zero_device};
use crate::error::Result;
use crate::format::foreign::is_marker;
use crate::format::{InodeNumberXattr, OPAQUE_XATTR_WHITEOUTS};
use crate::name::Name;
use crate::sys;
use crate::sys::stat::FileKind;

/// An entry of a directory in one layer.
#[derive(Clone, Debug)]
pub struct LayerEntry {
    /// The name.
    pub name: Name,
    /// The type of the object.
    pub kind: FileKind,
    /// The inode number on disk.
    pub ino: u64,
    /// Whether the entry is a whiteout, which hides the name in the layers below.
    pub whiteout: bool,
}

/// Lists a directory of a layer, including whiteouts. Xattr whiteouts are recognized only with `Markers::Read`.
pub fn list(dir: &LayerDir, markers: Markers) -> Result<Vec<LayerEntry>> {
    let open = dir.readable()?;
    let fd = (*open).as_fd();
    let space = dir.layer().space();
    let xattrs = sys::xattr::list_open(fd)?;
    let has = |marker: &str| xattrs.iter().any(|name| **name == *marker.as_bytes());
    let has_xattr_whiteouts = markers == Markers::Read
        && has(space.opaque())
        && sys::xattr::get(fd, space.opaque().as_bytes())?
            .is_some_and(|value| value == OPAQUE_XATTR_WHITEOUTS);
    let has_devices = has(space.nodes());
    let mut raw = sys::dir::read(&open)?;
    let hidden = if dir.may_have_foreign_markers() {
        let all = raw.len();
        let hidden = foreign::remove_markers(&mut raw);
        if raw.len() == all {
            dir.note_no_foreign_markers();
        }
        hidden
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
        if is_marker(&entry.name) {
            dir.layer().warn_of_likely_marker(&entry.name);
        }
        let mut kind = match entry.kind {
            Some(kind) => kind,
            None => sys::stat::stat_at(fd, &entry.name)?.kind(),
        };
        let whiteout = match kind {
            FileKind::CharDevice => sys::stat::stat_at(fd, &entry.name)?.is_whiteout_device(),
            FileKind::Regular if has_xattr_whiteouts => {
                sys::xattr::get_at(fd, &entry.name, space.whiteout().as_bytes())?.is_some()
            }
            _ => false,
        };
        if has_devices
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

/// Returns the inode number that `name` retains from before its copy-up; `None` if it has none or does not exist.
pub fn number_at(dir: &LayerDir, name: &[u8]) -> Result<Option<InodeNumberXattr>> {
    let xattr = dir.layer().space().ino();
    match sys::xattr::get_at((*dir.fd()?).as_fd(), name, xattr.as_bytes()) {
        Ok(Some(raw)) => InodeNumberXattr::parse(&raw),
        Ok(None) => Ok(None),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error),
    }
}
