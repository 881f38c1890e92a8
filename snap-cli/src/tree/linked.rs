//! Hard links in a tree that is being created: later names of a file are linked to its first name.
//!
//! Reopening a first name at a great depth is expensive, and every directory of a deep tree may have one. Files at a
//! great depth get a temporary additional name in a directory in the root of the tree.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_layers::error::Errno;
use cowl_layers::sys::stat::{FileKind, Stat};
use cowl_layers::sys::{dir, node, remove};
use uuid::Uuid;

use super::create;
use super::dir_cursor::DirCursor;
use super::error::{Context as _, Result};
use super::path::split;

/// The depth up to which a first name is reopened by its path. This needs the privilege to search every directory
/// regardless of its mode.
const NEAR: usize = 64;

/// The location of the first name of a file.
enum First {
    Path(Vec<u8>),
    Aside(u64),
}

/// The files with several names that were created.
pub(crate) struct Linked {
    places: DirCursor,
    /// By device and inode of the source.
    known: HashMap<(u64, u64), First>,
    aside: Option<(Vec<u8>, OwnedFd)>,
    next: u64,
}

impl Linked {
    /// Creates the record for the tree with this root.
    pub(crate) fn new(root: BorrowedFd<'_>) -> Result<Self> {
        let root = root.try_clone_to_owned();
        let root = root.context("cannot hold the target directory open", b".")?;
        Ok(Self {
            places: DirCursor::new(root),
            known: HashMap::new(),
            aside: None,
            next: 0,
        })
    }

    /// Returns the file that was created for another name of this source.
    pub(crate) fn find(&mut self, stat: &Stat) -> Result<Option<OwnedFd>> {
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return Ok(None);
        }
        let found = match self.known.get(&(stat.dev, stat.ino)) {
            None => return Ok(None),
            Some(First::Path(path)) => {
                let (parent, name) = split(path);
                let place = self.places.open(parent)?;
                dir::open_path(place, name).context("cannot open", path)?
            }
            Some(First::Aside(number)) => {
                let name = number.to_string().into_bytes();
                let aside = self.aside.as_ref().map(|(_, fd)| fd.as_fd());
                let place = aside.unwrap_or(self.places.root());
                dir::open_path(place, &name).context("cannot open", &name)?
            }
        };
        Ok(Some(found))
    }

    /// Records the first name of a file: `name` in `parent`, its path, and its depth.
    pub(crate) fn note(
        &mut self,
        stat: &Stat,
        (parent, name): (BorrowedFd<'_>, &[u8]),
        path: &[u8],
        depth: usize,
    ) -> Result<()> {
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return Ok(());
        }
        let near = match rustix::process::geteuid().is_root() {
            true => NEAR,
            false => 0,
        };
        let first = match depth > near {
            true => self.put_aside(parent, name, path)?,
            false => First::Path(path.to_vec()),
        };
        self.known.insert((stat.dev, stat.ino), first);
        Ok(())
    }

    fn put_aside(&mut self, parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<First> {
        let what = "cannot make the hard link";
        let aside = match self.aside.take() {
            Some(aside) => aside,
            None => {
                let own = format!(".cowl-links-{}", Uuid::new_v4()).into_bytes();
                let fd = create::dir(self.places.root(), &own, &own)?;
                (own, fd)
            }
        };
        let (_, fd) = self.aside.insert(aside);
        let number = self.next;
        self.next += 1;
        match node::link(parent, name, fd.as_fd(), number.to_string().as_bytes()) {
            Ok(()) => Ok(First::Aside(number)),
            // The file has reached the link limit of its file system.
            Err(error) if error.errno() == Errno::MLINK => Ok(First::Path(path.to_vec())),
            Err(error) => Err(error).context(what, path),
        }
    }

    /// Removes the temporary names. Must be called when the tree is complete, before the root gets its attributes: it
    /// changes the times of the root, and the root's owner may not be allowed to write to it.
    pub(crate) fn finish(&mut self) -> Result<()> {
        match self.aside.take() {
            Some((name, _)) => {
                remove::remove_tree(self.places.root(), &name).context("cannot remove", &name)
            }
            None => Ok(()),
        }
    }
}
