//! Lookup of a name in one layer, with its markers.

use std::os::fd::AsFd;

use super::{LayerDir, foreign, zero_device};
use crate::error::Result;
use crate::format::foreign::is_marker;
use crate::format::{InodeNumberXattr, OPAQUE, Redirect, XattrSpace};
use crate::sys;
use crate::sys::stat::{FileKind, Stat};

/// The meaning of a name in one layer, for [`crate::view::resolve`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerObject {
    /// The layer does not contain the name; the lookup continues below.
    Absent,
    /// The name is hidden; the lookup ends.
    Whiteout,
    /// A directory.
    Dir {
        /// Whether it hides the layers below.
        opaque: bool,
        /// Its path in the layers below, if different.
        redirect: Option<Redirect>,
    },
    /// An object of any other type.
    File {
        /// Whether its content is in a lower layer.
        metacopy: bool,
        /// The path of the content, if different.
        redirect: Option<Redirect>,
    },
}

/// The result of a lookup in one layer that found an object.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The object, as its markers define it.
    pub object: LayerObject,
    /// The object's attributes.
    pub stat: Stat,
    /// The inode number that it retains from before its copy-up.
    pub number: Option<InodeNumberXattr>,
}

/// Whether marker xattrs count. In the bottom layer of a stack they mean nothing, except for the one that
/// makes a file a device 0:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Markers {
    /// They count.
    Read,
    /// They do not, and are not read.
    Ignored,
}

/// Looks `name` up in the directory `dir` of a layer; `None` if it is absent.
pub fn probe(dir: &LayerDir, name: &[u8], markers: Markers) -> Result<Option<Probe>> {
    let reads_markers = markers == Markers::Read;
    if dir.layer().is_foreign() && is_marker(name) {
        return Ok(None);
    }
    let fd = dir.fd()?;
    let stat = match sys::stat::stat_at((*fd).as_fd(), name) {
        Ok(stat) => stat,
        Err(error) if error.is_absent() && dir.may_have_foreign_markers() => {
            let hidden = foreign::stat_whiteout((*fd).as_fd(), name)?;
            return Ok(hidden.map(|stat| Probe {
                object: LayerObject::Whiteout,
                stat,
                number: None,
            }));
        }
        Err(error) if error.is_absent() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut found = Probe {
        object: LayerObject::plain(stat.kind()),
        stat,
        number: None,
    };
    let empty = zero_device::may_be(stat.kind(), stat.size);
    if stat.is_whiteout_device() {
        found.object = LayerObject::Whiteout;
    } else if reads_markers || empty {
        let space = dir.layer().space();
        let names = sys::xattr::list_at((*fd).as_fd(), name)?;
        let has = |marker: &str| names.iter().any(|name| **name == *marker.as_bytes());
        if empty && has(space.node()) && zero_device::is_at((*fd).as_fd(), name, space)? {
            found.stat = zero_device::device_stat(stat);
        }
        if reads_markers {
            let get = |marker: &str| sys::xattr::get_at((*fd).as_fd(), name, marker.as_bytes());
            read_markers(space, &names, get, &mut found)?;
        }
    }
    if let LayerObject::Dir { opaque, .. } = &mut found.object
        && reads_markers
        && dir.layer().is_foreign()
    {
        *opaque = *opaque || foreign::is_opaque(dir, name)?;
    }
    Ok(Some(found))
}

impl LayerObject {
    fn plain(kind: FileKind) -> Self {
        match kind {
            FileKind::Directory => Self::Dir {
                opaque: false,
                redirect: None,
            },
            _ => Self::File {
                metacopy: false,
                redirect: None,
            },
        }
    }
}

fn read_markers(
    space: XattrSpace,
    names: &[Box<[u8]>],
    get: impl Fn(&str) -> Result<Option<Vec<u8>>>,
    found: &mut Probe,
) -> Result<()> {
    let prefix = space.prefix().as_bytes();
    if !names.iter().any(|name| name.starts_with(prefix)) {
        return Ok(());
    }
    let has = |marker: &str| names.iter().any(|name| **name == *marker.as_bytes());
    let value = |marker: &str| if has(marker) { get(marker) } else { Ok(None) };
    if let Some(raw) = value(space.ino())? {
        found.number = InodeNumberXattr::parse(&raw)?;
    }
    if found.stat.kind() == FileKind::Regular && found.stat.size == 0 && has(space.whiteout()) {
        found.object = LayerObject::Whiteout;
        return Ok(());
    }
    let found_redirect = match value(space.redirect())? {
        Some(raw) => Some(Redirect::parse(&raw)?),
        None => None,
    };
    match &mut found.object {
        LayerObject::Dir { opaque, redirect } => {
            *opaque = value(space.opaque())?.is_some_and(|raw| raw == OPAQUE);
            *redirect = found_redirect;
        }
        LayerObject::File { metacopy, redirect } => {
            *metacopy = found.stat.kind() == FileKind::Regular && has(space.metacopy());
            if *metacopy {
                *redirect = found_redirect;
            }
        }
        LayerObject::Absent | LayerObject::Whiteout => {}
    }
    Ok(())
}
