//! Files with several names in a tree that is being made: the second name is linked to the first, wherever
//! that lies.
//!
//! A first name that lies deep is expensive to find again, and there may be one in every directory of a deep
//! tree. Those files get one more name meanwhile, in a directory of their own in the tree's root.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use cowl_fs::error::Errno;
use cowl_fs::sys::stat::{FileKind, Stat};
use cowl_fs::sys::{dir, node};
use uuid::Uuid;

use super::error::{Context as _, Result};
use super::make::{self, split};
use super::places::Places;

/// How deep a first name may lie to be found by its path. Only who may enter every directory, whatever its
/// mode, finds any so.
const NEAR: usize = 64;

/// Where the first name of a file is.
enum First {
    Path(Vec<u8>),
    Aside(u64),
}

/// The files with several names that were made.
pub(crate) struct Linked {
    places: Places,
    /// By device and inode of what they were made from.
    known: HashMap<(u64, u64), First>,
    aside: Option<(Vec<u8>, OwnedFd)>,
    next: u64,
}

impl Linked {
    /// For the tree with this root.
    pub(crate) fn new(root: BorrowedFd<'_>) -> Result<Self> {
        let root = root.try_clone_to_owned();
        let root = root.context("can't keep the target folder open", b".")?;
        Ok(Self {
            places: Places::new(root),
            known: HashMap::new(),
            aside: None,
            next: 0,
        })
    }

    /// The file that was made from this one under another name.
    pub(crate) fn find(&mut self, stat: &Stat) -> Result<Option<OwnedFd>> {
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return Ok(None);
        }
        let found = match self.known.get(&(stat.dev, stat.ino)) {
            None => return Ok(None),
            Some(First::Path(path)) => {
                let (parent, name) = split(path);
                let place = self.places.folder(parent, false)?;
                dir::open_path(place, name).context("can't open", path)?
            }
            Some(First::Aside(number)) => {
                let name = number.to_string().into_bytes();
                let aside = self.aside.as_ref().map(|(_, fd)| fd.as_fd());
                let place = aside.unwrap_or(self.places.root());
                dir::open_path(place, &name).context("can't open", &name)?
            }
        };
        Ok(Some(found))
    }

    /// Notes the first name of a file: `name` in `parent`, with this path, so many directories deep.
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
        let what = "can't make the hard link";
        let aside = match self.aside.take() {
            Some(aside) => aside,
            None => {
                let own = format!(".cowl-links-{}", Uuid::new_v4()).into_bytes();
                let fd = make::folder(self.places.root(), &own, &own)?;
                (own, fd)
            }
        };
        let (_, fd) = self.aside.insert(aside);
        let number = self.next;
        self.next += 1;
        match node::link(parent, name, fd.as_fd(), number.to_string().as_bytes()) {
            Ok(()) => Ok(First::Aside(number)),
            // It has as many names as its file system allows.
            Err(error) if error.errno() == Errno::MLINK => Ok(First::Path(path.to_vec())),
            Err(error) => Err(error).context(what, path),
        }
    }

    /// Removes what was put aside. To be called when everything is made, before the root gets its attributes: it
    /// changes the root's times, and the root may be one that its owner cannot write to.
    pub(crate) fn finish(&mut self) -> Result<()> {
        match self.aside.take() {
            Some((name, _)) => {
                node::remove_tree(self.places.root(), &name).context("can't remove", &name)
            }
            None => Ok(()),
        }
    }
}
