//! Creates the objects of an archive, entry by entry.
//!
//! The entries are a tree of files, an exported layer that is recreated exactly, or the changes of an image layer to the
//! layers below.
//!
//! Symbolic links in the directories of a path are resolved within the target first. The result is opened component by
//! component without following symbolic links, so that an entry cannot escape from the target.

use std::io::Read;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::{InodeNumberXattr, XattrSpace, foreign};
use cowl_layers::sys::stat::{self, FileKind};
use cowl_layers::sys::{attr, copy, dir, remove, xattr};
use cowl_layers::view::View;

use super::below::{Hidden, LayersBelow};
use super::dir_attrs::DirAttrs;
use super::dir_map::DirMap;
use super::entry_path::{self, Existing, NewEntry, PathRole, TreePath};
use super::marker_xattrs;
use super::member::{EntryKind, Member};
use super::named_acls::NamedAcls;
use super::report::TransferReport;
use super::stream::Members;
use super::unpack_mode::{UnpackMode, duplicate_entry};
use crate::tree::attrs::{self, Attrs};
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Result, TreeError};
use crate::tree::in_root::{self, Resolved};
use crate::tree::omissions::{OBJECT_UNSUPPORTED, Omissions, Unsupported};
use crate::tree::{create, path};

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
    /// The layers that the entries change. Only with [`UnpackMode::Changeset`].
    below: LayersBelow,
    numbers: NumberReferences,
    named_acls: NamedAcls,
    omissions: Omissions,
    /// The number of entries that were skipped entirely.
    skipped: u64,
    progress: OnProgress<'a>,
    out: TransferReport,
    buffer: Vec<u8>,
}

impl<'a> Unpacker<'a> {
    /// Creates an unpacker for the empty directory `target`.
    pub(super) fn new(
        target: &Path,
        mode: UnpackMode,
        unsupported: Unsupported,
        progress: OnProgress<'a>,
    ) -> Result<Self> {
        let root = dir::open_root(target).context(
            "cannot open the target directory",
            target.as_os_str().as_bytes(),
        )?;
        create::prepare_root(root.as_fd())?;
        let second_root = root
            .try_clone()
            .context("cannot open the target directory", b".")?;
        Ok(Self {
            dirs: DirCursor::new(root),
            link_dirs: DirCursor::new(second_root),
            dir_attrs: DirAttrs::default(),
            has_root: false,
            mode,
            below: LayersBelow::new(None, mode.space()),
            numbers: NumberReferences::default(),
            named_acls: NamedAcls::default(),
            omissions: mode.omissions(unsupported),
            skipped: 0,
            progress,
            out: TransferReport::default(),
            buffer: vec![0; 256 << 10],
        })
    }

    /// Makes the entries changes of the state `below`, of which the root has the attributes until an entry follows.
    pub(super) fn over(mut self, below: Option<View>) -> Result<Self> {
        self.below = LayersBelow::new(below, self.mode.space());
        let root = self.dirs.root();
        let attrs = self.below.root_attrs()?;
        (self.dir_attrs).set(root, b"", attrs, &mut Omissions::none())?;
        Ok(self)
    }

    /// Sets the attributes of the directories, and returns the results.
    ///
    /// An archive of which nothing can be imported is refused: an empty tree would look like a success.
    pub(super) fn finish(mut self) -> Result<(TransferReport, NumberReferences)> {
        if let (UnpackMode::Tree(_), true) = (self.mode, self.skipped == self.out.done.entries) {
            return Err(self.without_entries());
        }
        self.below
            .write_markers((&mut self.dirs, &mut self.dir_attrs))?;
        let (dir_attrs, omissions) = (&mut self.dir_attrs, &mut self.omissions);
        self.named_acls
            .finish(&mut self.dirs, dir_attrs, omissions)?;
        self.dir_attrs
            .finish(self.dirs.root(), &mut self.omissions)?;
        // Without an entry in the archive, the root gets the mode of any other implied directory.
        if let (UnpackMode::Tree(_), false) = (self.mode, self.has_root) {
            attr::chmod(self.dirs.root(), create::IMPLIED_PERM)
                .context("cannot set the mode", b".")?;
        }
        (self.progress)(self.out.done);
        self.out.is_incomplete |= self.omissions.is_incomplete();
        self.out.notes.append(self.omissions.notes);
        Ok((self.out, self.numbers))
    }

    fn without_entries(&self) -> TreeError {
        if self.skipped == 0 {
            return TreeError::new(ErrorKind::Empty, "the archive has no entries");
        }
        let notes = self.omissions.notes.lines();
        let first = notes.first().map(String::as_str).unwrap_or_default();
        let what = format!("no entry of the archive can be imported: {first}");
        TreeError::new(ErrorKind::Refused, what)
    }

    /// Creates the object of an entry, or skips it if it cannot be stored.
    pub(super) fn unpack_entry<R: Read>(
        &mut self,
        mut member: Member,
        members: &mut Members<R>,
    ) -> Result<()> {
        self.out.done.entries += 1;
        if self.out.done.entries.is_multiple_of(64) {
            (self.progress)(self.out.done);
        }
        for (reason, part) in std::mem::take(&mut member.omitted) {
            let path = member.path.as_slice();
            let error = inexact(reason, path);
            self.omissions.never_stored(error, reason, path, &part)?;
        }
        let Some(path) = self.entry_path(&member.path, PathRole::Name)? else {
            self.skipped += 1;
            return Ok(());
        };
        let path = match self.resolve(path)? {
            Resolved::Path(path) => path,
            Resolved::NotADirectory(path) => {
                return self.skip(
                    "skipped an entry below a file that is not a directory",
                    &path,
                );
            }
            Resolved::TooManyLinks => {
                let reason = "skipped an entry below too many symbolic links";
                return self.skip(reason, &member.path);
            }
        };
        if let Some(reason) = why_unstorable(&member, &path) {
            return self.skip(reason, &path);
        }
        match self.unpack_at(member, &path, members) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.omissions
                    .unsupported(error, OBJECT_UNSUPPORTED, &path, b"")?;
                self.skipped += 1;
                self.remove_partial(&path)
            }
            done => done,
        }
    }

    /// Returns the normalized form of a path of the archive; `None` if the entry is skipped because of it. For a name
    /// there is a note on that.
    fn entry_path(&mut self, path: &[u8], role: PathRole) -> Result<Option<Vec<u8>>> {
        let (converted, reason) = match entry_path::convert(path, role) {
            TreePath::Same(converted) => return Ok(Some(converted)),
            TreePath::Changed(converted, reason) => (Some(converted), reason),
            TreePath::Unstorable(_) if role == PathRole::LinkTarget => return Ok(None),
            TreePath::Unstorable(reason) => (None, reason),
        };
        let error = inexact(reason, path);
        self.omissions.never_stored(error, reason, path, b"")?;
        Ok(converted)
    }

    /// Resolves symbolic links in the directories of a path, which are not permitted in an exported layer.
    fn resolve(&mut self, path: Vec<u8>) -> Result<Resolved> {
        match self.mode {
            UnpackMode::Raw(..) => Ok(Resolved::Path(path)),
            UnpackMode::Tree(_) => in_root::resolve(&mut self.dirs, &path),
            UnpackMode::Changeset(_) => {
                let (below, attrs) = (&mut self.below, &mut self.dir_attrs);
                in_root::resolve_with(&mut self.dirs, &path, &mut |dirs, missing| {
                    below.copy_dirs(missing, (dirs, &mut *attrs))
                })
            }
        }
    }

    /// Skips an entry that cannot be stored anywhere.
    fn skip(&mut self, reason: &'static str, path: &[u8]) -> Result<()> {
        self.skip_part(reason, path, b"")
    }

    /// Skips an entry because of a part of it.
    fn skip_part(&mut self, reason: &'static str, path: &[u8], part: &[u8]) -> Result<()> {
        let error = inexact(reason, path);
        self.omissions.never_stored(error, reason, path, part)?;
        self.skipped += 1;
        Ok(())
    }

    /// Removes what was created of an object that is skipped.
    fn remove_partial(&mut self, path: &[u8]) -> Result<()> {
        let (parent, name) = path::split(path);
        match self.dirs.open(parent) {
            Ok(parent) => create::remove_partial(parent, name, path),
            // A parent directory cannot be stored either.
            Err(_) => Ok(()),
        }
    }

    /// Creates the object of an entry at a normalized path.
    fn unpack_at<R: Read>(
        &mut self,
        mut member: Member,
        path: &[u8],
        members: &mut Members<R>,
    ) -> Result<()> {
        self.convert_xattrs(&mut member, path)?;
        if let UnpackMode::Changeset(_) = self.mode
            && self.apply_marker(&member, path)?
        {
            return Ok(());
        }
        let named_acls = std::mem::take(&mut member.named_acls);
        if path.is_empty() {
            if let UnpackMode::Changeset(space) = self.mode {
                remove_other_xattrs(self.dirs.root(), &member.attrs, (space, b"."))?;
            }
            if std::mem::replace(&mut self.has_root, true)
                && matches!(self.mode, UnpackMode::Raw(..))
            {
                return Err(duplicate_entry(b"."));
            }
            self.named_acls.set(path, named_acls)?;
            let root = self.dirs.root();
            return (self.dir_attrs).set(root, b"", member.attrs, &mut self.omissions);
        }
        if let EntryKind::HardLink(target) = &member.kind {
            return self.hard_link(path, target);
        }
        let is_dir = member.kind == EntryKind::Directory;
        let new = match is_dir {
            true => NewEntry::Directory,
            false => NewEntry::Other,
        };
        match self.replace(path, new)? {
            Existing::None => {}
            Existing::FullDirectory => return self.skip(OVER_DIRECTORY, path),
            Existing::Directory => {
                let (parent, name) = path::split(path);
                let parent = self.dirs.open(parent)?;
                let dir = dir::open_dir(parent, name).context("cannot open the directory", path)?;
                if let UnpackMode::Changeset(space) = self.mode {
                    remove_other_xattrs(dir.as_fd(), &member.attrs, (space, path))?;
                }
                self.named_acls.set(path, named_acls)?;
                return (self.dir_attrs).set(dir.as_fd(), path, member.attrs, &mut self.omissions);
            }
        }
        self.create(&member, path, members)?;
        self.named_acls.set(path, named_acls)?;
        if member.cowl.ino.is_none() && !is_dir {
            return Ok(());
        }
        let (parent, name) = path::split(path);
        let parent = self.dirs.open(parent)?;
        let numbers = exported_and_new_number(parent, name, &member, path)?;
        self.numbers.lent.extend(numbers);
        if is_dir {
            let dir = dir::open_dir(parent, name).context("cannot open the directory", path)?;
            (self.dir_attrs).set(dir.as_fd(), path, member.attrs, &mut self.omissions)?;
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
        let attrs = (&member.attrs, &mut self.omissions);
        let node = match &member.kind {
            EntryKind::Symlink(target) => {
                return create::symlink(parent, name, target, attrs, path);
            }
            EntryKind::CharDevice(rdev) => (FileKind::CharDevice, *rdev),
            EntryKind::BlockDevice(rdev) => (FileKind::BlockDevice, *rdev),
            EntryKind::Fifo => (FileKind::Fifo, 0),
            EntryKind::Socket => (FileKind::Socket, 0),
            EntryKind::HardLink(_) | EntryKind::Continuation | EntryKind::Unstorable(_) => {
                return Ok(());
            }
            EntryKind::Directory => return create::dir(parent, name, path).map(drop),
            EntryKind::File => {
                let fd = create::file(parent, name, path)?;
                self.write_content(&fd, member, path, members)?;
                let (kind, omissions) = (FileKind::Regular, &mut self.omissions);
                return attrs::apply_except(fd.as_fd(), kind, &member.attrs, path, omissions);
            }
        };
        self.mode.create_node(parent, name, node, attrs, path)
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
            self.below.note_entry(path);
            // A hard link to itself retains the file.
            if !matches!(member.kind, EntryKind::Directory | EntryKind::HardLink(_)) {
                self.remove(path)?;
            }
            return Ok(false);
        }
        let (hidden, what) = if name == foreign::OPAQUE_NAME {
            (parent.to_vec(), Hidden::Content)
        } else if let Some(hidden) = foreign::hidden_name(name) {
            (path::join(parent, hidden), Hidden::Object)
        } else {
            return Ok(true);
        };
        self.link_dirs.forget(&hidden)?;
        let target = (&mut self.dirs, &mut self.dir_attrs);
        self.below.hide(&hidden, what, target)?;
        Ok(true)
    }

    /// Removes the object at a path recursively, if it exists.
    fn remove(&mut self, path: &[u8]) -> Result<()> {
        self.close(path)?;
        self.forget_attrs(path);
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

    /// Prepares the creation of an object: creates its parent directory, and removes an existing object that the new
    /// one replaces.
    fn replace(&mut self, path: &[u8], new: NewEntry) -> Result<Existing> {
        if new == NewEntry::Other {
            self.close(path)?;
        }
        let (parent, name) = path::split(path);
        if let (UnpackMode::Changeset(_), NewEntry::Directory) = (self.mode, new)
            && is_another_kind(self.dirs.open_or_create(parent)?, name, path)?
        {
            // It has replaced a directory of the layers below, so the new one is not merged with that.
            let target = (&mut self.dirs, &mut self.dir_attrs);
            self.below.hide(path, Hidden::Object, target)?;
        }
        let parent = self.dirs.open_or_create(parent)?;
        self.mode.refuse_duplicate(parent, name, path)?;
        let existing = entry_path::remove_existing(parent, name, new, path)?;
        if existing == Existing::None {
            self.forget_attrs(path);
        }
        Ok(existing)
    }

    /// Closes cached descriptors at or below a path that may be replaced.
    fn close(&mut self, path: &[u8]) -> Result<()> {
        self.dirs.forget(path)?;
        self.link_dirs.forget(path)
    }

    /// Discards the recorded attributes at or below a path that was replaced.
    fn forget_attrs(&mut self, path: &[u8]) {
        self.dir_attrs.forget(path);
        self.named_acls.forget(path);
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
            create::created(attr::truncate(fd, size), "cannot set the size", path)?;
        }
        for &(start, length) in segments {
            let mut done = 0;
            while done < length {
                let want = usize::try_from(length - done).unwrap_or(usize::MAX);
                let want = want.min(self.buffer.len());
                let chunk = self.buffer.get_mut(..want).unwrap_or_default();
                members.read_data(chunk)?;
                let written = copy::write_all(fd, chunk, start + done);
                create::created(written, "cannot write", path)?;
                done += want as u64;
                self.out.done.bytes += want as u64;
                (self.progress)(self.out.done);
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let Some(target_path) = self.entry_path(target, PathRole::LinkTarget)? else {
            return self.skip_part(TO_UNSTORABLE, path, target);
        };
        let Resolved::Path(target_path) = self.resolve(target_path)? else {
            return self.skip_part(TO_MISSING, path, target);
        };
        let to_directory = "skipped a hard link to a directory";
        if target_path.is_empty() {
            return self.skip(to_directory, path);
        }
        if let UnpackMode::Changeset(_) = self.mode {
            self.below.copy_file(&target_path, &mut self.dirs)?;
        }
        let (parent, name) = path::split(&target_path);
        let source = match self.link_dirs.open(parent) {
            Ok(dir) => dir::open_path(dir, name),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return self.skip_part(TO_MISSING, path, target);
            }
            Err(error) => return Err(error),
        };
        let source = match source {
            Ok(source) => source,
            Err(error) if error.errno() == Errno::NOENT => {
                return self.skip_part(TO_MISSING, path, target);
            }
            Err(error) => return Err(error).context("cannot open a hard link's target", path),
        };
        let kind = stat::stat_fd(&source).context("cannot read", path)?.kind();
        if kind == FileKind::Directory {
            return self.skip(to_directory, path);
        }
        // tar writes such a link for a file that is specified twice.
        if target_path == path {
            return Ok(());
        }
        if self.replace(path, NewEntry::Other)? == Existing::FullDirectory {
            return self.skip(OVER_DIRECTORY, path);
        }
        let (parent, name) = path::split(path);
        let parent = self.dirs.open(parent)?;
        self.mode.create_link(source.as_fd(), parent, name, path)
    }
}

const OVER_DIRECTORY: &str = "skipped a file with the name of a directory that is not empty";

const TO_UNSTORABLE: &str = "skipped a hard link to a name that Linux cannot store";

const TO_MISSING: &str = "skipped a hard link to a file that no earlier entry contains";

/// Returns why Linux cannot store an entry, if that is so.
fn why_unstorable(member: &Member, path: &[u8]) -> Option<&'static str> {
    match member.kind {
        EntryKind::Unstorable(reason) => Some(reason),
        EntryKind::Continuation => Some("skipped the rest of a file that began in another volume"),
        EntryKind::Directory => None,
        _ if path.is_empty() => Some("skipped a root that is not a directory"),
        _ => None,
    }
}

/// Returns the error for an entry that an exported layer cannot contain, because it would be imported differently.
fn inexact(reason: &str, path: &[u8]) -> TreeError {
    let what = format!("the archive has an entry that cowl does not write ({reason})");
    TreeError::new(ErrorKind::Refused, what).at(path)
}

/// Returns whether an object of this name exists that is not a directory.
fn is_another_kind(parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<bool> {
    match stat::stat_at(parent, name) {
        Ok(found) => Ok(found.kind() != FileKind::Directory),
        Err(error) if error.errno() == Errno::NOENT => Ok(false),
        Err(error) => Err(error).context("cannot read", path),
    }
}

/// Removes the xattrs of an existing directory that its new entry does not have, except for markers.
fn remove_other_xattrs(
    dir: BorrowedFd<'_>,
    attrs: &Attrs,
    (space, path): (XattrSpace, &[u8]),
) -> Result<()> {
    let what = "cannot change the xattrs";
    for (name, _) in xattr::all(dir).context(what, path)? {
        if space.to_mount(&name).is_some() && !attrs.xattrs.iter().any(|(new, _)| *new == name) {
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
