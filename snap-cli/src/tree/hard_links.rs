//! Hard links in a tree that is being created: later names of a file are linked to its first name.
//!
//! Reopening a first name takes time in proportion to its depth. Therefore files at a great depth get a temporary
//! additional name in a directory below the root of the tree.

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

/// The depth up to which a first name is reopened by its path.
///
/// This requires the privilege to search every directory regardless of its mode.
const MAX_DEPTH_BY_PATH: usize = 64;

/// The location of the first name of a file.
enum FirstName {
    /// Its path.
    Path(Vec<u8>),
    /// The number that is the temporary additional name.
    Temporary(u64),
}

/// The first names of the created files that have several names.
pub(crate) struct HardLinks {
    cursor: DirCursor,
    /// By device and inode number of the source.
    first_names: HashMap<(u64, u64), FirstName>,
    /// The directory of the temporary names: its name and descriptor.
    temporary: Option<(Vec<u8>, OwnedFd)>,
    next_number: u64,
}

impl HardLinks {
    /// Creates an empty record for the tree with this root.
    pub(crate) fn new(root: BorrowedFd<'_>) -> Result<Self> {
        let root = root.try_clone_to_owned();
        let root = root.context("cannot hold the target directory open", b".")?;
        Ok(Self {
            cursor: DirCursor::new(root),
            first_names: HashMap::new(),
            temporary: None,
            next_number: 0,
        })
    }

    /// Opens the file that was created for an earlier name of this source; `None` if there is none.
    pub(crate) fn find(&mut self, stat: &Stat) -> Result<Option<OwnedFd>> {
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return Ok(None);
        }
        let found = match self.first_names.get(&(stat.dev, stat.ino)) {
            None => return Ok(None),
            Some(FirstName::Path(path)) => {
                let (parent, name) = split(path);
                let dir = self.cursor.open(parent)?;
                dir::open_path(dir, name).context("cannot open", path)?
            }
            Some(FirstName::Temporary(number)) => {
                let name = number.to_string().into_bytes();
                let dir = self.temporary.as_ref().map(|(_, fd)| fd.as_fd());
                let dir = dir.unwrap_or(self.cursor.root());
                dir::open_path(dir, &name).context("cannot open", &name)?
            }
        };
        Ok(Some(found))
    }

    /// Records the first name of a file: `name` in `parent`, its path, and its depth.
    pub(crate) fn record(
        &mut self,
        stat: &Stat,
        (parent, name): (BorrowedFd<'_>, &[u8]),
        path: &[u8],
        depth: usize,
    ) -> Result<()> {
        if stat.kind() == FileKind::Directory || stat.nlink < 2 {
            return Ok(());
        }
        let max_depth = match rustix::process::geteuid().is_root() {
            true => MAX_DEPTH_BY_PATH,
            false => 0,
        };
        let first = match depth > max_depth {
            true => self.add_temporary_name(parent, name, path)?,
            false => FirstName::Path(path.to_vec()),
        };
        self.first_names.insert((stat.dev, stat.ino), first);
        Ok(())
    }

    /// Links a file to a temporary name, and returns its location.
    fn add_temporary_name(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<FirstName> {
        let temporary = match self.temporary.take() {
            Some(temporary) => temporary,
            None => {
                let name = format!(".cowl-links-{}", Uuid::new_v4()).into_bytes();
                let fd = create::dir(self.cursor.root(), &name, &name)?;
                (name, fd)
            }
        };
        let (_, fd) = self.temporary.insert(temporary);
        let number = self.next_number;
        self.next_number += 1;
        match node::link(parent, name, fd.as_fd(), number.to_string().as_bytes()) {
            Ok(()) => Ok(FirstName::Temporary(number)),
            // The file has reached the link limit of its file system.
            Err(error) if error.errno() == Errno::MLINK => Ok(FirstName::Path(path.to_vec())),
            Err(error) => Err(error).context("cannot create the hard link", path),
        }
    }

    /// Removes the temporary names.
    ///
    /// To be called when the tree is complete, before the attributes of the root are set: the removal changes the times
    /// of the root, and the final mode of the root may deny its owner writing to it.
    pub(crate) fn finish(&mut self) -> Result<()> {
        match self.temporary.take() {
            Some((name, _)) => {
                remove::remove_tree(self.cursor.root(), &name).context("cannot remove", &name)
            }
            None => Ok(()),
        }
    }
}
