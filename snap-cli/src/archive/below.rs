//! The layers below a layer that is unpacked from a layer of an image.
//!
//! A layer of an image changes the merged state of the layers below it. In the new layer, this needs copies from them: of
//! directories for which the image has no entry, of symbolic links that lead to entries, and of files to which entries
//! are hard links. Its whiteouts become those of an overlay at the end, because an entry for the same name may follow.

use std::os::fd::AsFd as _;

use cowl_layers::error::Errno;
use cowl_layers::format::{OPAQUE, XattrSpace};
use cowl_layers::name::Name;
use cowl_layers::sys::attr::SetTime;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_layers::sys::{copy, dir, node, stat, xattr};
use cowl_layers::view::{DirNode, FileNode, Found, View, Xattrs};

use super::dir_attrs::DirAttrs;
use crate::tree::attrs::{self, Attrs};
use crate::tree::create;
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::in_root::Created;
use crate::tree::omissions::Omissions;
use crate::tree::path::{join, split};
use crate::tree::path_map::PathMap;
use crate::tree::walk::open_content;

/// The part of the layers below that a whiteout of an image layer hides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hidden {
    /// The object of this path.
    Object,
    /// The content of the directory of this path.
    Content,
}

/// The new layer, as far as it depends on the layers below: a cursor, and the attributes of its directories.
pub(super) type Target<'t> = (&'t mut DirCursor, &'t mut DirAttrs);

/// The layers below a layer that is being filled.
pub(super) struct LayersBelow {
    /// Their state; `None` for the bottom layer.
    view: Option<View>,
    space: XattrSpace,
    /// The paths of copies; `false` once an entry has replaced the copy.
    copied: PathMap<bool>,
    /// The hidden objects. Contains only paths that exist below, so that it is bounded by what is on disk.
    hidden: PathMap<Hidden>,
    /// Whether the content of the root is among them.
    is_root_hidden: bool,
}

const READ: &str = "cannot read the layers below";

impl LayersBelow {
    /// Creates the record for a layer over this state.
    pub(super) fn new(view: Option<View>, space: XattrSpace) -> Self {
        Self {
            view,
            space,
            copied: PathMap::default(),
            hidden: PathMap::default(),
            is_root_hidden: false,
        }
    }

    /// Returns the attributes that the root has without an entry: those of the root below. The bottom layer gets constant
    /// ones, so that the same image results in the same layer.
    pub(super) fn root_attrs(&self) -> Result<Attrs> {
        let Some(view) = &self.view else {
            return Ok(Attrs {
                perm: create::IMPLIED_PERM,
                uid: 0,
                gid: 0,
                atime: SetTime::At(Time::default()),
                mtime: SetTime::At(Time::default()),
                xattrs: Vec::new(),
            });
        };
        let root = view.root().context(READ, b".")?;
        let xattrs = root.xattrs().context(READ, b".")?;
        Ok(Attrs::from_stat(&root.stat, self.copied_xattrs(xattrs)))
    }

    /// Returns the xattrs of a copy: all but the markers. A record of attributes remains.
    fn copied_xattrs(&self, on_disk: Xattrs) -> Xattrs {
        let is_kept = |name: &[u8]| {
            self.space.to_mount(name).is_some() || name == self.space.recorded().as_bytes()
        };
        let kept = on_disk.into_iter().filter(|(name, _)| is_kept(name));
        kept.collect()
    }

    /// Records that an entry has created the object of this path.
    pub(super) fn note_entry(&mut self, path: &[u8]) {
        if self.is_copy(path) {
            self.copied.insert(path, false);
        }
    }

    fn is_copy(&self, path: &[u8]) -> bool {
        self.copied.get(path) == Some(&true)
    }

    /// Looks up a path in the layers below, except for hidden objects.
    fn find(&self, path: &[u8]) -> Result<Found> {
        let is_gone = self.hidden.get(path) == Some(&Hidden::Object);
        if is_gone || is_hidden_above(&self.hidden, path) {
            return Ok(Found::Absent);
        }
        self.find_any(path)
    }

    /// Looks up a path in the layers below.
    fn find_any(&self, path: &[u8]) -> Result<Found> {
        let Some(view) = &self.view else {
            return Ok(Found::Absent);
        };
        let mut found = Found::Dir(view.root().context(READ, b".")?);
        for part in path.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            // A target of a symbolic link may have a longer name.
            let (Found::Dir(dir), Ok(name)) = (&found, Name::new(part)) else {
                return Ok(Found::Absent);
            };
            found = view.lookup(dir, &name).context(READ, path)?;
        }
        Ok(found)
    }

    /// Copies the directory of this path and those above it, where the new layer does not have them.
    pub(super) fn copy_dirs(&mut self, path: &[u8], target: Target<'_>) -> Result<Created> {
        let (dirs, attrs) = target;
        if self.view.is_none() || dirs.reach(path)?.is_none() {
            return Ok(Created::Directories);
        }
        let ends = (0..path.len()).filter(|at| path.get(*at) == Some(&b'/'));
        for end in ends.chain([path.len()]) {
            let one = path.get(..end).unwrap_or_default();
            let (above, name) = split(one);
            if Name::new(name).is_err() {
                return Ok(Created::Directories);
            }
            let parent = match dirs.open(above) {
                Ok(parent) => parent,
                Err(error) if is_not_a_dir(&error) => return Ok(Created::NotADirectory),
                Err(error) => return Err(error),
            };
            match stat::stat_at(parent, name) {
                Ok(_) => continue,
                Err(error) if error.errno() == Errno::NOENT => {}
                Err(error) => return Err(error).context("cannot read", one),
            }
            match self.find(one)? {
                Found::Dir(node) => self.copy_dir(one, &node, (&mut *dirs, &mut *attrs))?,
                Found::File(file) if file.stat.kind() == FileKind::Symlink => {
                    self.copy_file_to(one, &file, dirs)?;
                    return Ok(Created::Link);
                }
                Found::File(_) => return Ok(Created::NotADirectory),
                Found::Absent | Found::Whiteout => return Ok(Created::Directories),
            }
        }
        Ok(Created::Directories)
    }

    fn copy_dir(&mut self, path: &[u8], node: &DirNode, (dirs, attrs): Target<'_>) -> Result<()> {
        let (above, name) = split(path);
        let made = create::dir(dirs.open(above)?, name, path)?;
        let xattrs = self.copied_xattrs(node.xattrs().context(READ, path)?);
        let copy = Attrs::from_stat(&node.stat, xattrs);
        attrs.set(made.as_fd(), path, copy, &mut Omissions::none())?;
        self.copied.insert(path, true);
        Ok(())
    }

    /// Copies the file of this path from the layers below, if the new layer has none, for a hard link to it.
    ///
    /// The directories of the path have been copied.
    pub(super) fn copy_file(&mut self, path: &[u8], dirs: &mut DirCursor) -> Result<()> {
        let (above, name) = split(path);
        let parent = match dirs.open(above) {
            Ok(parent) => parent,
            Err(error) if is_not_a_dir(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        match stat::stat_at(parent, name) {
            Ok(_) => return Ok(()),
            Err(error) if error.errno() == Errno::NOENT => {}
            Err(error) => return Err(error).context("cannot read", path),
        }
        match self.find(path)? {
            Found::File(file) => self.copy_file_to(path, &file, dirs),
            Found::Absent | Found::Whiteout | Found::Dir(_) => Ok(()),
        }
    }

    fn copy_file_to(&mut self, path: &[u8], file: &FileNode, dirs: &mut DirCursor) -> Result<()> {
        let (above, name) = split(path);
        let parent = dirs.open(above)?;
        let xattrs = self.copied_xattrs(file.loc.xattrs().context(READ, path)?);
        let attrs = Attrs::from_stat(&file.stat, xattrs);
        let with = (&attrs, &mut Omissions::none());
        match file.stat.kind() {
            FileKind::Regular => {
                let to = create::file(parent, name, path)?;
                let content = open_content(file.data_loc()).context(READ, path)?;
                copy::copy_data(content.as_fd(), to.as_fd(), file.stat.size)
                    .context("cannot copy the content", path)?;
                attrs::apply(to.as_fd(), FileKind::Regular, &attrs, path)?;
            }
            FileKind::Symlink => {
                let link = file.loc.readlink().context(READ, path)?;
                create::symlink(parent, name, &link, with, path)?;
            }
            kind => {
                let device = (kind, file.stat.rdev);
                create::special(parent, name, device, with, self.space, path)?;
            }
        }
        self.copied.insert(path, true);
        Ok(())
    }

    /// Hides an object of the layers below, or the content of a directory, and removes copies of it.
    pub(super) fn hide(&mut self, path: &[u8], what: Hidden, target: Target<'_>) -> Result<()> {
        // Nothing below is copied any more, so a repeated marker has no effect. It must not take long, either.
        let own = self.hidden.get(path);
        let is_root = path.is_empty() && self.is_root_hidden;
        if is_root
            || own == Some(&Hidden::Object)
            || own == Some(&what)
            || is_hidden_above(&self.hidden, path)
        {
            return Ok(());
        }
        self.remove_copies(path, what, target)?;
        match (self.find(path)?, what) {
            (Found::Absent | Found::Whiteout, _) | (Found::File(_), Hidden::Content) => Ok(()),
            // An opaque marker has no effect on the root of a layer.
            (Found::Dir(root), Hidden::Content) if path.is_empty() => {
                let Some(view) = &self.view else {
                    return Ok(());
                };
                for entry in view.list(&root).context(READ, b".")? {
                    self.hidden.insert(&entry.name, Hidden::Object);
                }
                self.is_root_hidden = true;
                Ok(())
            }
            (Found::Dir(_) | Found::File(_), what) => {
                self.hidden.insert(path, what);
                Ok(())
            }
        }
    }

    /// Removes copies at or below a path, except for directories that contain something else.
    fn remove_copies(&mut self, top: &[u8], what: Hidden, target: Target<'_>) -> Result<()> {
        let (dirs, attrs) = target;
        let mut todo = vec![(top.to_vec(), false)];
        while let Some((path, is_empty)) = todo.pop() {
            let is_inner = what == Hidden::Object || path != top;
            let is_copy = is_inner && self.is_copy(&path);
            let (above, name) = split(&path);
            if is_empty {
                dirs.forget(&path)?;
                match node::rmdir(dirs.open(above)?, name) {
                    Ok(()) => {
                        attrs.forget(&path);
                        self.copied.insert(&path, false);
                    }
                    Err(error) if matches!(error.errno(), Errno::NOTEMPTY | Errno::EXIST) => {}
                    Err(error) => return Err(error).context("cannot remove", &path),
                }
                continue;
            }
            if !(is_copy || self.copied.has_below(&path)) {
                continue;
            }
            match dirs.open(&path) {
                Ok(dir) => {
                    let names = dir::entries(dir).context("cannot read the directory", &path)?;
                    if is_copy {
                        todo.push((path.clone(), true));
                    }
                    let inner = names.iter().map(|entry| (join(&path, &entry.name), false));
                    todo.extend(inner);
                }
                Err(error) if is_not_a_dir(&error) => {
                    if is_copy {
                        node::unlink(dirs.open(above)?, name).context("cannot remove", &path)?;
                        self.copied.insert(&path, false);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Creates the whiteouts and opaque markers for what is hidden.
    pub(super) fn write_markers(&mut self, target: Target<'_>) -> Result<()> {
        let (dirs, attrs) = target;
        let hidden = std::mem::take(&mut self.hidden);
        hidden.each(|path, what| {
            if is_hidden_above(&hidden, path) {
                return Ok(());
            }
            let (above, name) = split(path);
            let needed = match what {
                Hidden::Object => above,
                Hidden::Content => path,
            };
            if self.copy_dirs(needed, (&mut *dirs, &mut *attrs))? != Created::Directories {
                return Ok(());
            }
            let parent = match dirs.open(above) {
                Ok(parent) => parent,
                Err(error) if is_not_a_dir(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            match stat::stat_at(parent, name) {
                Ok(own) if own.kind() == FileKind::Directory => {
                    let marked = dir::open_dir(parent, name).context("cannot open", path)?;
                    xattr::set(marked.as_fd(), self.space.opaque().as_bytes(), OPAQUE)
                        .context("cannot make the directory opaque", path)
                }
                Ok(_) => Ok(()),
                Err(error) if error.errno() == Errno::NOENT => match what {
                    Hidden::Object => node::mknod(parent, name, FileKind::CharDevice, 0, 0)
                        .context("cannot create the whiteout", path),
                    Hidden::Content => Ok(()),
                },
                Err(error) => Err(error).context("cannot read", path),
            }
        })
    }
}

/// Returns whether a directory above this path, or its content, is hidden.
fn is_hidden_above(hidden: &PathMap<Hidden>, path: &[u8]) -> bool {
    let ends = (0..path.len()).filter(|at| path.get(*at) == Some(&b'/'));
    let mut above = ends.filter_map(|end| path.get(..end));
    above.any(|above| hidden.has(above))
}

/// Returns whether an error means that a path is not a directory.
pub(super) fn is_not_a_dir(error: &TreeError) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Refused)
}
