//! What one layer says of one name.

use std::os::fd::AsFd;

use super::{LayerDir, foreign, zero_device};
use crate::error::Result;
use crate::format::foreign::is_mark;
use crate::format::{NumberMark, OPAQUE, Redirect, XattrSpace};
use crate::sys;
use crate::sys::stat::{FileKind, Stat};

/// What one layer says of one name, for [`crate::view::resolve`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing: the layers below decide.
    Absent,
    /// The name is hidden: the layers below are not asked.
    Whiteout,
    /// A folder.
    Dir {
        /// It hides what lies below.
        opaque: bool,
        /// The layers below know it under this name.
        redirect: Option<Redirect>,
    },
    /// Anything else.
    File {
        /// Its content lies below.
        metacopy: bool,
        /// Where.
        redirect: Option<Redirect>,
    },
}

/// [`Seen`] with what was read beside it; for a present name only.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The meaning.
    pub seen: Seen,
    /// lstat of the object.
    pub stat: Stat,
    /// The number that it keeps from before its copy-up.
    pub number: Option<NumberMark>,
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
    let marks = markers == Markers::Read;
    if dir.layer().is_foreign() && is_mark(name) {
        return Ok(None);
    }
    let fd = dir.fd()?;
    let stat = match sys::stat::stat_at((*fd).as_fd(), name) {
        Ok(stat) => stat,
        Err(error) if error.is_absent() && dir.layer().is_foreign() => {
            let hidden = foreign::whiteout_of((*fd).as_fd(), name)?;
            return Ok(hidden.map(|stat| Probe {
                seen: Seen::Whiteout,
                stat,
                number: None,
            }));
        }
        Err(error) if error.is_absent() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut found = Probe {
        seen: Seen::plain(stat.kind()),
        stat,
        number: None,
    };
    let empty = zero_device::may_be(stat.kind(), stat.size);
    if stat.is_whiteout_device() {
        found.seen = Seen::Whiteout;
    } else if marks || empty {
        let space = dir.layer().space();
        let names = sys::xattr::list_at((*fd).as_fd(), name)?;
        let has = |mark: &str| names.iter().any(|name| **name == *mark.as_bytes());
        if empty && has(space.node()) && zero_device::is_at((*fd).as_fd(), name, space)? {
            found.stat = zero_device::shown(stat);
        }
        if marks {
            let get = |mark: &str| sys::xattr::get_at((*fd).as_fd(), name, mark.as_bytes());
            read_marks(space, &names, get, &mut found)?;
        }
    }
    if let Seen::Dir { opaque, .. } = &mut found.seen
        && marks
        && dir.layer().is_foreign()
    {
        *opaque = *opaque || foreign::is_opaque((*fd).as_fd(), name)?;
    }
    Ok(Some(found))
}

impl Seen {
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

fn read_marks(
    space: XattrSpace,
    names: &[Box<[u8]>],
    get: impl Fn(&str) -> Result<Option<Vec<u8>>>,
    found: &mut Probe,
) -> Result<()> {
    let prefix = space.prefix().as_bytes();
    if !names.iter().any(|name| name.starts_with(prefix)) {
        return Ok(());
    }
    let has = |mark: &str| names.iter().any(|name| **name == *mark.as_bytes());
    let value = |mark: &str| if has(mark) { get(mark) } else { Ok(None) };
    if let Some(raw) = value(space.ino())? {
        found.number = NumberMark::parse(&raw)?;
    }
    if found.stat.kind() == FileKind::Regular && found.stat.size == 0 && has(space.whiteout()) {
        found.seen = Seen::Whiteout;
        return Ok(());
    }
    let redirect_mark = match value(space.redirect())? {
        Some(raw) => Some(Redirect::parse(&raw)?),
        None => None,
    };
    match &mut found.seen {
        Seen::Dir { opaque, redirect } => {
            *opaque = value(space.opaque())?.is_some_and(|raw| raw == OPAQUE);
            *redirect = redirect_mark;
        }
        Seen::File { metacopy, redirect } => {
            *metacopy = found.stat.kind() == FileKind::Regular && has(space.metacopy());
            if *metacopy {
                *redirect = redirect_mark;
            }
        }
        Seen::Absent | Seen::Whiteout => {}
    }
    Ok(())
}
