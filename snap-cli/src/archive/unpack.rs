//! Creates the objects of an archive, entry by entry.
//!
//! The entries are a tree of files, an exported layer that is recreated exactly, or the changes of an image layer, which
//! are applied to a tree.
//!
//! Paths are resolved component by component without following symbolic links, so that an entry cannot escape from the
//! target.

use std::io::Read;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::{InodeNumberXattr, XattrSpace, foreign};
use cowl_layers::sys::stat::{self, FileKind};
use cowl_layers::sys::{attr, copy, dir, node, remove, xattr};

use super::dir_attrs::DirAttrs;
use super::dir_map::DirMap;
use super::entry_path::{self, NewEntry};
use super::marker_xattrs;
use super::member::{EntryKind, Member};
use super::report::TransferReport;
use super::stream::Members;
use crate::tree::attrs::{self, Attrs};
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::path_map::PathMap;
use crate::tree::{create, path};
use cowl_layers::shown::Show as _;

/// The interpretation of the entries of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnpackMode {
    /// A tree of files, unpacked into a layer with markers in this xattr namespace.
    Tree(XattrSpace),
    /// An exported layer with its markers, converted from the first xattr namespace to the second.
    Raw(XattrSpace, XattrSpace),
    /// An image layer, whose whiteouts are file names, applied to an existing tree.
    Changeset(XattrSpace),
}

/// The inode numbers of a layer to which marker xattrs refer, and the references in its own markers.
#[derive(Debug, Default)]
pub(super) struct NumberReferences {
    /// The id of the layer when it was exported.
    pub(super) layer: Option<u64>,
    /// The inodes to whose numbers markers refer: the exported number and the new one.
    pub(super) lent: Vec<(u64, u64)>,
    /// The objects with a borrowed number, by directory: their names, or an empty name for the directory itself.
    pub(super) borrowed: DirMap<Vec<(Box<[u8]>, InodeNumberXattr)>>,
}

/// A tree that is being filled from an archive.
pub(super) struct Unpacker<'a> {
    dirs: DirCursor,
    /// Opens the parent directories of the targets of hard links.
    link_dirs: DirCursor,
    dir_attrs: DirAttrs,
    has_root: bool,
    mode: UnpackMode,
    /// The paths that these entries created, which are not affected by whiteouts of the same archive. Only with
    /// [`UnpackMode::Changeset`].
    created: PathMap<()>,
    /// The paths at or below which only objects remain that these entries created.
    cleared: PathMap<()>,
    numbers: NumberReferences,
    progress: OnProgress<'a>,
    out: TransferReport,
    buffer: Vec<u8>,
}

impl<'a> Unpacker<'a> {
    /// Creates an unpacker for the directory `target`, which must be empty except with [`UnpackMode::Changeset`].
    pub(super) fn new(target: &Path, mode: UnpackMode, progress: OnProgress<'a>) -> Result<Self> {
        let root = dir::open_root(target).context(
            "cannot open the target directory",
            target.as_os_str().as_bytes(),
        )?;
        if !matches!(mode, UnpackMode::Changeset(_)) {
            create::prepare_root(root.as_fd())?;
        }
        let second_root = root
            .try_clone()
            .context("cannot open the target directory", b".")?;
        Ok(Self {
            dirs: DirCursor::new(root),
            link_dirs: DirCursor::new(second_root),
            dir_attrs: DirAttrs::default(),
            has_root: false,
            mode,
            created: PathMap::default(),
            cleared: PathMap::default(),
            numbers: NumberReferences::default(),
            progress,
            out: TransferReport::default(),
            buffer: vec![0; 256 << 10],
        })
    }

    /// Sets the attributes of the directories, and returns the results.
    pub(super) fn finish(self) -> Result<(TransferReport, NumberReferences)> {
        self.dir_attrs.finish(self.dirs.root())?;
        // Without an entry in the archive, the root gets the mode of any other implied directory.
        if let (UnpackMode::Tree(_), false) = (self.mode, self.has_root) {
            attr::chmod(self.dirs.root(), create::IMPLIED_PERM)
                .context("cannot set the mode", b".")?;
        }
        (self.progress)(self.out.done);
        Ok((self.out, self.numbers))
    }

    /// Creates the object of an entry.
    pub(super) fn unpack_entry<R: Read>(
        &mut self,
        mut member: Member,
        members: &mut Members<R>,
    ) -> Result<()> {
        let path = entry_path::normalize(&member.path)?;
        self.convert_xattrs(&mut member, &path)?;
        self.out.done.entries += 1;
        if self.out.done.entries.is_multiple_of(64) {
            (self.progress)(self.out.done);
        }
        if let UnpackMode::Changeset(_) = self.mode
            && self.apply_marker(&member, &path)?
        {
            return Ok(());
        }
        if path.is_empty() {
            if member.kind != EntryKind::Directory {
                let what = "the archive replaces its root by something that is not a directory";
                return Err(TreeError::new(ErrorKind::Refused, what).at(member.path));
            }
            if let UnpackMode::Changeset(_) = self.mode {
                remove_other_xattrs(self.dirs.root(), &member.attrs, b".")?;
            }
            if std::mem::replace(&mut self.has_root, true)
                && matches!(self.mode, UnpackMode::Raw(..))
            {
                return Err(duplicate_entry(b"."));
            }
            return self.dir_attrs.set(self.dirs.root(), b"", member.attrs);
        }
        if let EntryKind::HardLink(target) = &member.kind {
            return self.hard_link(&path, target);
        }
        let (parent, name) = path::split(&path);
        if member.kind != EntryKind::Directory {
            self.forget(&path)?;
        }
        let parent = self.dirs.open_or_create(parent)?;
        let is_dir = member.kind == EntryKind::Directory;
        let new = match is_dir {
            true => NewEntry::Directory,
            false => NewEntry::Other,
        };
        self.mode.refuse_duplicate(parent, name, &path)?;
        if entry_path::remove_existing(parent, name, new, &path)? {
            let dir = dir::open_dir(parent, name).context("cannot open the directory", &path)?;
            if let UnpackMode::Changeset(_) = self.mode {
                remove_other_xattrs(dir.as_fd(), &member.attrs, &path)?;
            }
            return self.dir_attrs.set(dir.as_fd(), &path, member.attrs);
        }
        self.create(&member, &path, members)?;
        if member.cowl.ino.is_none() && !is_dir {
            return Ok(());
        }
        let (parent, name) = path::split(&path);
        let parent = self.dirs.open(parent)?;
        let numbers = exported_and_new_number(parent, name, &member, &path)?;
        self.numbers.lent.extend(numbers);
        if is_dir {
            let dir = dir::open_dir(parent, name).context("cannot open the directory", &path)?;
            self.dir_attrs.set(dir.as_fd(), &path, member.attrs)?;
        }
        Ok(())
    }

    /// Creates the object of an entry whose name does not exist yet.
    fn create<R: Read>(
        &mut self,
        member: &Member,
        path: &[u8],
        members: &mut Members<R>,
    ) -> Result<()> {
        let (parent, name) = path::split(path);
        let parent = self.dirs.open(parent)?;
        let device = |kind, rdev| {
            self.mode
                .create_node(parent, name, (kind, rdev), &member.attrs, path)
        };
        match &member.kind {
            EntryKind::Symlink(target) if target.is_empty() || target.contains(&0) => {
                let what = "the archive has a symbolic link with an empty or invalid target";
                Err(TreeError::new(ErrorKind::Refused, what).at(path))
            }
            EntryKind::Symlink(target) => {
                create::symlink(parent, name, target, &member.attrs, path)
            }
            EntryKind::CharDevice(rdev) => device(FileKind::CharDevice, *rdev),
            EntryKind::BlockDevice(rdev) => device(FileKind::BlockDevice, *rdev),
            EntryKind::Fifo => device(FileKind::Fifo, 0),
            EntryKind::HardLink(_) => Ok(()),
            EntryKind::Socket => device(FileKind::Socket, 0),
            EntryKind::Directory => create::dir(parent, name, path).map(drop),
            EntryKind::File => {
                let fd = create::file(parent, name, path)?;
                self.write_content(&fd, member, path, members)?;
                attrs::apply(fd.as_fd(), FileKind::Regular, &member.attrs, path)
            }
        }
    }

    /// Converts the xattrs to their on-disk form, and records references to inode numbers.
    fn convert_xattrs(&mut self, member: &mut Member, path: &[u8]) -> Result<()> {
        let xattrs = std::mem::take(&mut member.attrs.xattrs);
        let (xattrs, borrowed) = match self.mode {
            UnpackMode::Tree(space) | UnpackMode::Changeset(space) => {
                (attrs::escape_markers(space, xattrs), None)
            }
            UnpackMode::Raw(from, to) => marker_xattrs::convert(from, to, member, xattrs)?,
        };
        member.attrs.xattrs = xattrs;
        if let Some(mark) = borrowed {
            let (parent, name) = path::split(path);
            self.numbers.borrowed.change(parent, |names| {
                let names = names.get_or_insert_default();
                names.push((name.into(), mark));
            })?;
        }
        if path.is_empty() && self.numbers.layer.is_none() {
            self.numbers.layer = member.cowl.layer;
        }
        Ok(())
    }

    /// Applies the entry if it is a marker of an image layer, and returns whether it is one.
    fn apply_marker(&mut self, member: &Member, path: &[u8]) -> Result<bool> {
        let (parent, name) = path::split(path);
        if !foreign::is_marker(name) {
            self.created.insert(path, ());
            if member.kind != EntryKind::Directory {
                self.remove(path)?;
            }
            return Ok(false);
        }
        if name == foreign::OPAQUE_NAME {
            if self.is_cleared(parent) {
                return Ok(true);
            }
            let names = match self.dirs.open(parent) {
                Ok(dir) => dir::entries(dir).context("cannot read the directory", parent)?,
                Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
                Err(error) => return Err(error),
            };
            for entry in names {
                self.clear(&path::join(parent, &entry.name))?;
            }
            self.note_cleared(parent);
        } else if let Some(hidden) = foreign::hidden_name(name) {
            self.clear(&path::join(parent, hidden))?;
        }
        Ok(true)
    }

    /// Removes the objects at and below a path that these entries did not create.
    fn clear(&mut self, path: &[u8]) -> Result<()> {
        if self.is_cleared(path) {
            return Ok(());
        }
        let mut todo = vec![path.to_vec()];
        while let Some(path) = todo.pop() {
            if !(self.created.has(&path) || self.created.has_below(&path)) {
                self.remove(&path)?;
                continue;
            }
            // Objects that this layer created are retained.
            match self.dirs.open(&path) {
                Ok(dir) => {
                    let names = dir::entries(dir).context("cannot read the directory", &path)?;
                    let inner = names.iter().map(|entry| path::join(&path, &entry.name));
                    todo.extend(inner);
                }
                Err(error) if is_not_a_dir(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.note_cleared(path);
        Ok(())
    }

    /// Returns whether [`Self::clear`] has no effect on a path, because an earlier marker covers it.
    fn is_cleared(&self, path: &[u8]) -> bool {
        self.cleared.has(b"") || self.cleared.covers(path)
    }

    fn note_cleared(&mut self, path: &[u8]) {
        self.cleared.remove_all(path);
        self.cleared.insert(path, ());
    }

    /// Removes the object at a path recursively, if it exists.
    fn remove(&mut self, path: &[u8]) -> Result<()> {
        self.forget(path)?;
        let (parent, name) = path::split(path);
        let parent = match self.dirs.open(parent) {
            Ok(parent) => parent,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        match remove::remove_tree(parent, name) {
            Err(error) if error.errno() != Errno::NOENT => {
                Err(error).context("cannot remove", path)
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Discards cached descriptors and recorded attributes of a path that is about to be replaced.
    fn forget(&mut self, path: &[u8]) -> Result<()> {
        self.dirs.forget(path)?;
        self.link_dirs.forget(path)?;
        self.dir_attrs.forget(path);
        Ok(())
    }

    /// Writes an entry's data, either contiguously or into the segments of a sparse map.
    fn write_content<R: Read>(
        &mut self,
        fd: &impl std::os::fd::AsFd,
        member: &Member,
        path: &[u8],
        members: &mut Members<R>,
    ) -> Result<()> {
        let whole = [(0, member.stored)];
        let (size, segments) = match &member.sparse {
            Some(sparse) => (sparse.size, sparse.map.0.as_slice()),
            None => (member.stored, whole.as_slice()),
        };
        if member.sparse.is_some() {
            attr::truncate(fd, size).context("cannot set the size", path)?;
        }
        for &(start, length) in segments {
            let mut done = 0;
            while done < length {
                let want = usize::try_from(length - done).unwrap_or(usize::MAX);
                let want = want.min(self.buffer.len());
                let chunk = self.buffer.get_mut(..want).unwrap_or_default();
                members.read_data(chunk)?;
                copy::write_all(fd, chunk, start + done).context("cannot write", path)?;
                done += want as u64;
                self.out.done.bytes += want as u64;
                (self.progress)(self.out.done);
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let refuse = |what: &str| {
            let what = format!("{what} (to '{}')", target.shown());
            Err(TreeError::new(ErrorKind::Refused, what).at(path))
        };
        let Ok(target_path) = entry_path::normalize(target) else {
            return refuse("the archive has a hard link that points outside");
        };
        if target_path.is_empty() {
            return refuse("the archive has a hard link to its root");
        }
        let (parent, name) = path::split(&target_path);
        let missing = "the archive has a hard link to a file that no earlier entry contains";
        let source = match self.link_dirs.open(parent) {
            Ok(dir) => dir::open_path(dir, name),
            Err(error) if error.kind() == ErrorKind::NotFound => return refuse(missing),
            Err(error) => return Err(error),
        };
        let source = match source {
            Ok(source) => source,
            Err(error) if error.errno() == Errno::NOENT => return refuse(missing),
            Err(error) => return Err(error).context("cannot open a hard link's target", path),
        };
        let kind = stat::stat_fd(&source).context("cannot read", path)?.kind();
        if kind == FileKind::Directory {
            return refuse("the archive has a hard link to a directory");
        }
        // tar writes such a link for a file that is specified twice.
        if target_path == path {
            return Ok(());
        }
        self.forget(path)?;
        let (parent, name) = path::split(path);
        let parent = self.dirs.open_or_create(parent)?;
        self.mode.refuse_duplicate(parent, name, path)?;
        entry_path::remove_existing(parent, name, NewEntry::Other, path)?;
        self.mode.create_link(source.as_fd(), parent, name, path)
    }
}

/// Returns whether an error means that a path is not a directory.
fn is_not_a_dir(error: &TreeError) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Refused)
}

impl UnpackMode {
    /// Creates a device, a fifo or a socket.
    fn create_node(
        self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        node: (FileKind, u64),
        attrs: &Attrs,
        path: &[u8],
    ) -> Result<()> {
        match self {
            Self::Tree(space) | Self::Changeset(space) => {
                create::special(parent, name, node, attrs, space, path)
            }
            Self::Raw(..) => create::node(parent, name, node, attrs, path),
        }
    }

    /// Refuses a second entry for an existing object of a raw layer.
    ///
    /// An exported layer has no duplicates, and the memory that is used for each entry must be bounded by the objects
    /// on disk.
    fn refuse_duplicate(self, parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<()> {
        if !matches!(self, Self::Raw(..)) {
            return Ok(());
        }
        match stat::stat_at(parent, name) {
            Err(error) if error.errno() == Errno::NOENT => Ok(()),
            Err(error) => Err(error).context("cannot read", path),
            Ok(_) => Err(duplicate_entry(path)),
        }
    }

    fn create_link(
        self,
        source: BorrowedFd<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<()> {
        match self {
            Self::Tree(space) | Self::Changeset(space) => {
                create::link(source, parent, name, space, path)
            }
            Self::Raw(..) => {
                node::link_fd(source, parent, name).context("cannot create the hard link", path)
            }
        }
    }
}

fn duplicate_entry(path: &[u8]) -> TreeError {
    let what = "the archive has two entries for the same object of a layer";
    TreeError::new(ErrorKind::Refused, what).at(path)
}

/// Removes the xattrs of an existing directory that its new entry does not have.
fn remove_other_xattrs(dir: BorrowedFd<'_>, attrs: &Attrs, path: &[u8]) -> Result<()> {
    let what = "cannot change the xattrs";
    for (name, _) in xattr::all(dir).context(what, path)? {
        if !attrs.xattrs.iter().any(|(new, _)| *new == name) {
            xattr::remove(dir, &name).context(what, path)?;
        }
    }
    Ok(())
}

/// Returns the exported and the new inode number of an entry, if marker xattrs refer to it.
fn exported_and_new_number(
    parent: BorrowedFd<'_>,
    name: &[u8],
    member: &Member,
    path: &[u8],
) -> Result<Option<(u64, u64)>> {
    let Some(exported) = member.cowl.ino else {
        return Ok(None);
    };
    let new = stat::stat_at(parent, name)
        .context("cannot read", path)?
        .ino;
    Ok(Some((exported, new)))
}
