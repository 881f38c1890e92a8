//! Making the objects of an archive, one entry after another: in a tree that shows them, in a layer that
//! is to lie on the disk as another one lay, or over a tree that they change (a layer of an image).
//!
//! The target is never left: paths are followed component by component and through no link.

use std::io::Read;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::{NumberMark, XattrSpace, foreign};
use cowl_layers::sys::stat::{self, FileKind};
use cowl_layers::sys::{attr, copy, dir, node, remove, xattr};

use super::dir_attrs::DirAttrs;
use super::dir_map::DirMap;
use super::marks;
use super::member::{Member, What};
use super::place::{self, NewEntry};
use super::report::Report;
use super::stream::Members;
use crate::tree::attrs::{self, Attrs};
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::path_map::PathMap;
use crate::tree::{create, path};

/// What the entries are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    /// Objects as they show; in a layer with the marks of this space.
    Shown(XattrSpace),
    /// Objects of a layer with its marks, from one space to another.
    Raw(XattrSpace, XattrSpace),
    /// Changes of what is there: marks are names, as in layers of images.
    Changes(XattrSpace),
}

/// What the marks of a layer say of numbers: who lends one, who borrowed one.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// The number that the layer had.
    pub(super) layer: Option<u64>,
    /// Inodes whose numbers others borrow: as they were, as they are.
    pub(super) lent: Vec<(u64, u64)>,
    /// What borrows, by directory: names in it, and an empty one for the directory itself.
    pub(super) borrowed: DirMap<Vec<(Box<[u8]>, NumberMark)>>,
}

/// A tree that is being filled.
pub(super) struct Unpack<'a> {
    places: DirCursor,
    /// Where the targets of hard links are looked for.
    targets: DirCursor,
    directories: DirAttrs,
    has_root: bool,
    how: How,
    /// With [`How::Changes`]: what these entries made, which their own marks don't hide.
    made: PathMap<()>,
    /// Where nothing is any more but what these entries made.
    cleared: PathMap<()>,
    numbers: Numbers,
    progress: OnProgress<'a>,
    out: Report,
    buffer: Vec<u8>,
}

impl<'a> Unpack<'a> {
    /// Begins in the folder `target`, which is empty but for [`How::Changes`].
    pub(super) fn new(target: &Path, how: How, progress: OnProgress<'a>) -> Result<Self> {
        let root = dir::open_root(target).context(
            "can't open the target folder",
            target.as_os_str().as_bytes(),
        )?;
        if !matches!(how, How::Changes(_)) {
            create::ready_root(root.as_fd())?;
        }
        let again = root
            .try_clone()
            .context("can't keep the target folder open", b".")?;
        Ok(Self {
            places: DirCursor::new(root),
            targets: DirCursor::new(again),
            directories: DirAttrs::default(),
            has_root: false,
            how,
            made: PathMap::default(),
            cleared: PathMap::default(),
            numbers: Numbers::default(),
            progress,
            out: Report::default(),
            buffer: vec![0; 256 << 10],
        })
    }

    /// Gives the directories their attributes. Nothing comes after this.
    pub(super) fn finish(self) -> Result<(Report, Numbers)> {
        self.directories.finish(self.places.root())?;
        // As any other directory that the archive leaves out.
        if let (How::Shown(_), false) = (self.how, self.has_root) {
            attr::chmod(self.places.root(), create::IMPLIED_PERM)
                .context("can't set the mode", b".")?;
        }
        (self.progress)(self.out.done);
        Ok((self.out, self.numbers))
    }

    /// Makes what one entry says.
    pub(super) fn entry<R: Read>(
        &mut self,
        mut member: Member,
        members: &mut Members<R>,
    ) -> Result<()> {
        let path = place::clean(&member.path)?;
        self.attributes(&mut member, &path)?;
        self.out.done.entries += 1;
        if self.out.done.entries.is_multiple_of(64) {
            (self.progress)(self.out.done);
        }
        if let How::Changes(_) = self.how
            && self.apply_marker(&member, &path)?
        {
            return Ok(());
        }
        if path.is_empty() {
            if member.what != What::Folder {
                let what = "the archive replaces its root by something that is no folder";
                return Err(TreeError::new(ErrorKind::Refused, what).at(member.path));
            }
            if let How::Changes(_) = self.how {
                only(self.places.root(), &member.attrs, b".")?;
            }
            if std::mem::replace(&mut self.has_root, true) && matches!(self.how, How::Raw(..)) {
                return Err(second(b"."));
            }
            return self.directories.set(self.places.root(), b"", member.attrs);
        }
        if let What::HardLink(target) = &member.what {
            return self.hard_link(&path, target);
        }
        let (parent, name) = path::split(&path);
        if member.what != What::Folder {
            self.forget(&path)?;
        }
        let parent = self.places.open_or_create(parent)?;
        let is_folder = member.what == What::Folder;
        let new = match is_folder {
            true => NewEntry::Directory,
            false => NewEntry::Other,
        };
        self.how.refuse_second(parent, name, &path)?;
        if place::make_room(parent, name, new, &path)? {
            let folder = dir::open_dir(parent, name).context("can't open the folder", &path)?;
            if let How::Changes(_) = self.how {
                only(folder.as_fd(), &member.attrs, &path)?;
            }
            return self.directories.set(folder.as_fd(), &path, member.attrs);
        }
        self.create(&member, &path, members)?;
        if member.own.ino.is_none() && !is_folder {
            return Ok(());
        }
        let (parent, name) = path::split(&path);
        let place = self.places.open(parent)?;
        let number = number(place, name, &member, &path)?;
        self.numbers.lent.extend(number);
        if is_folder {
            let folder = dir::open_dir(place, name).context("can't open the folder", &path)?;
            self.directories.set(folder.as_fd(), &path, member.attrs)?;
        }
        Ok(())
    }

    /// Creates the object of an entry whose name is free.
    fn create<R: Read>(
        &mut self,
        member: &Member,
        path: &[u8],
        members: &mut Members<R>,
    ) -> Result<()> {
        let (parent, name) = path::split(path);
        let parent = self.places.open(parent)?;
        let device = |kind, rdev| {
            self.how
                .node(parent, name, (kind, rdev), &member.attrs, path)
        };
        match &member.what {
            What::Symlink(target) if target.is_empty() || target.contains(&0) => {
                let what = "the archive has a symbolic link that points nowhere";
                Err(TreeError::new(ErrorKind::Refused, what).at(path))
            }
            What::Symlink(target) => create::symlink(parent, name, target, &member.attrs, path),
            What::CharDevice(rdev) => device(FileKind::CharDevice, *rdev),
            What::BlockDevice(rdev) => device(FileKind::BlockDevice, *rdev),
            What::Fifo => device(FileKind::Fifo, 0),
            What::HardLink(_) => Ok(()),
            What::Socket => device(FileKind::Socket, 0),
            What::Folder => create::dir(parent, name, path).map(drop),
            What::File => {
                let fd = create::file(parent, name, path)?;
                self.content(&fd, member, path, members)?;
                attrs::apply(fd.as_fd(), FileKind::Regular, &member.attrs, path)
            }
        }
    }

    /// Puts the attributes into the form that they have on the disk.
    fn attributes(&mut self, member: &mut Member, path: &[u8]) -> Result<()> {
        let xattrs = std::mem::take(&mut member.attrs.xattrs);
        let (xattrs, borrowed) = match self.how {
            How::Shown(space) | How::Changes(space) => (attrs::escaped(space, xattrs), None),
            How::Raw(from, to) => marks::converted(from, to, member, xattrs)?,
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
            self.numbers.layer = member.own.layer;
        }
        Ok(())
    }

    /// Applies a marker of an image layer. Returns whether the entry is one.
    fn apply_marker(&mut self, member: &Member, path: &[u8]) -> Result<bool> {
        let (parent, name) = path::split(path);
        if !foreign::is_marker(name) {
            self.made.insert(path, ());
            if member.what != What::Folder {
                self.remove(path)?;
            }
            return Ok(false);
        }
        if name == foreign::OPAQUE_NAME {
            if self.is_cleared(parent) {
                return Ok(true);
            }
            let names = match self.places.open(parent) {
                Ok(place) => dir::entries(place).context("can't read the folder", parent)?,
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

    /// Removes what was there before these entries.
    fn clear(&mut self, path: &[u8]) -> Result<()> {
        if self.is_cleared(path) {
            return Ok(());
        }
        let mut todo = vec![path.to_vec()];
        while let Some(path) = todo.pop() {
            if !(self.made.has(&path) || self.made.has_below(&path)) {
                self.remove(&path)?;
                continue;
            }
            // Only what is not of this layer goes.
            match self.places.open(&path) {
                Ok(place) => {
                    let names = dir::entries(place).context("can't read the folder", &path)?;
                    let inner = names.iter().map(|entry| path::join(&path, &entry.name));
                    todo.extend(inner);
                }
                Err(error) if is_no_folder(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.note_cleared(path);
        Ok(())
    }

    /// Whether nothing is at a path, or below it, but what these entries made: what they remove once more
    /// was removed before.
    fn is_cleared(&self, path: &[u8]) -> bool {
        self.cleared.has(b"") || self.cleared.covers(path)
    }

    fn note_cleared(&mut self, path: &[u8]) {
        self.cleared.remove_all(path);
        self.cleared.insert(path, ());
    }

    /// Removes what lies at a path, with everything below it.
    fn remove(&mut self, path: &[u8]) -> Result<()> {
        self.forget(path)?;
        let (parent, name) = path::split(path);
        let place = match self.places.open(parent) {
            Ok(place) => place,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        match remove::remove_tree(place, name) {
            Err(error) if error.errno() != Errno::NOENT => Err(error).context("can't remove", path),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Forgets what was known of a path that is about to be replaced.
    fn forget(&mut self, path: &[u8]) -> Result<()> {
        self.places.forget(path)?;
        self.targets.forget(path)?;
        self.directories.forget(path);
        Ok(())
    }

    /// Writes an entry's data: in one run, or in the parts that a sparse map names.
    fn content<R: Read>(
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
            attr::truncate(fd, size).context("can't set the size", path)?;
        }
        for &(start, length) in segments {
            let mut done = 0;
            while done < length {
                let want = usize::try_from(length - done).unwrap_or(usize::MAX);
                let want = want.min(self.buffer.len());
                let part = self.buffer.get_mut(..want).unwrap_or_default();
                members.read_data(part)?;
                copy::write_all(fd, part, start + done).context("can't write", path)?;
                done += want as u64;
                self.out.done.bytes += want as u64;
                (self.progress)(self.out.done);
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let refuse = |what: &str| {
            let what = format!("{what} (to '{}')", target.escape_ascii());
            Err(TreeError::new(ErrorKind::Refused, what).at(path))
        };
        let Ok(clean) = place::clean(target) else {
            return refuse("the archive has a hard link that points outside");
        };
        if clean.is_empty() {
            return refuse("the archive has a hard link to its root");
        }
        let (parent, name) = path::split(&clean);
        let missing = "the archive has a hard link to what is not in it, or comes later";
        let source = match self.targets.open(parent) {
            Ok(place) => dir::open_path(place, name),
            Err(error) if error.kind() == ErrorKind::NotFound => return refuse(missing),
            Err(error) => return Err(error),
        };
        let source = match source {
            Ok(source) => source,
            Err(error) if error.errno() == Errno::NOENT => return refuse(missing),
            Err(error) => return Err(error).context("can't open a hard link's target", path),
        };
        let kind = stat::stat_fd(&source).context("can't read", path)?.kind();
        if kind == FileKind::Directory {
            return refuse("the archive has a hard link to a folder");
        }
        // As tar writes it for a file that it is given twice.
        if clean == path {
            return Ok(());
        }
        self.forget(path)?;
        let (parent, name) = path::split(path);
        let place = self.places.open_or_create(parent)?;
        self.how.refuse_second(place, name, path)?;
        place::make_room(place, name, NewEntry::Other, path)?;
        self.how.link(source.as_fd(), place, name, path)
    }
}

/// Whether an error says that a path leads to no directory.
fn is_no_folder(error: &TreeError) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Refused)
}

impl How {
    /// Makes what is neither file nor folder nor link.
    fn node(
        self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        what: (FileKind, u64),
        attrs: &Attrs,
        path: &[u8],
    ) -> Result<()> {
        match self {
            Self::Shown(space) | Self::Changes(space) => {
                create::special(parent, name, what, attrs, space, path)
            }
            Self::Raw(..) => create::node(parent, name, what, attrs, path),
        }
    }

    /// Refuses a second entry for what is there in a layer: none has one, and what is remembered for each
    /// entry must not grow while the layer does not.
    fn refuse_second(self, parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<()> {
        if !matches!(self, Self::Raw(..)) {
            return Ok(());
        }
        match stat::stat_at(parent, name) {
            Err(error) if error.errno() == Errno::NOENT => Ok(()),
            Err(error) => Err(error).context("can't read", path),
            Ok(_) => Err(second(path)),
        }
    }

    fn link(
        self,
        source: BorrowedFd<'_>,
        parent: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<()> {
        match self {
            Self::Shown(space) | Self::Changes(space) => {
                create::link(source, parent, name, space, path)
            }
            Self::Raw(..) => {
                node::link_fd(source, parent, name).context("can't make the hard link", path)
            }
        }
    }
}

fn second(path: &[u8]) -> TreeError {
    let what = "the archive has two entries for the same object of a layer";
    TreeError::new(ErrorKind::Refused, what).at(path)
}

/// Takes the attributes away that a folder is not to have any more.
fn only(folder: BorrowedFd<'_>, attrs: &Attrs, path: &[u8]) -> Result<()> {
    let what = "can't change the attributes";
    for (name, _) in xattr::all(folder).context(what, path)? {
        if !attrs.xattrs.iter().any(|(kept, _)| *kept == name) {
            xattr::remove(folder, &name).context(what, path)?;
        }
    }
    Ok(())
}

/// The inode number that an entry had, if marks name it, and the one that it has.
fn number(
    parent: BorrowedFd<'_>,
    name: &[u8],
    member: &Member,
    path: &[u8],
) -> Result<Option<(u64, u64)>> {
    let Some(was) = member.own.ino else {
        return Ok(None);
    };
    let now = stat::stat_at(parent, name).context("can't read", path)?.ino;
    Ok(Some((was, now)))
}
