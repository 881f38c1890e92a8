//! Merges a range of adjacent layers into one new layer that is equivalent above the layers below the range.
//!
//! The markers of the new layer follow from one path that the view returns for every object: the path at which the
//! layers below the range are searched for it (`below`). If the new layer's own directory would search at this path
//! anyway, no marker is needed. If it is another path, a redirect is needed. If there is none although the layers below
//! would be searched, an opaque marker or a whiteout is needed. A range that includes the bottom layer has nothing below
//! it, so its merged layer has no markers.
//!
//! The source layers are only read. Markers with inode numbers are copied. One that refers to a layer below the range
//! remains valid; one that refers to a layer of the range has no effect any more, because that layer ceases to exist.

use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::format::{OPAQUE, Redirect, XattrSpace};
use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{attr, copy, dir, node};
use cowl_layers::view::{DirNode, FileNode, Found, LayerPath, View, without_markers};

use crate::tree::attrs::{self, Attrs, Xattrs};
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::tree::hard_links::HardLinks;
use crate::tree::omissions::Omissions;
use crate::tree::walk::{Walk, WalkStep, WithWhiteouts, open_content};
use crate::tree::{create, path};

/// Merges the layers of a view into the empty directory `target`, the tree of a new layer.
///
/// The view defines whether there are layers below the range: `View::part` if there are, `View::new` if there are none.
/// `beneath` is the state of those layers, if it is known. With it, whiteouts that would hide nothing are omitted; the
/// kernel would list them in a directory that is not merged.
///
/// # Errors
///
/// On an error the target is incomplete, and the caller must remove it.
pub fn flatten(
    view: &View,
    beneath: Option<&View>,
    target: &Path,
    progress: OnProgress<'_>,
) -> Result<Progress> {
    let to = dir::open_root(target).context(
        "cannot open the target directory",
        target.as_os_str().as_bytes(),
    )?;
    create::prepare_root(to.as_fd())?;
    let top = view.layers().first();
    let space = top
        .map(|layer| layer.space())
        .ok_or_else(|| TreeError::new(ErrorKind::Damaged, "there are no layers to merge"))?;
    let mut flattener = Flattener {
        beneath,
        space,
        hard_links: HardLinks::new(to.as_fd())?,
        cursor: DirCursor::new(to),
        levels: Vec::new(),
        done: Progress::default(),
        progress,
    };
    let root = view
        .root()
        .context("cannot read the root directory", b".")?;
    let xattrs = flattener.retained_xattrs(root.xattrs().context("cannot read the xattrs", b".")?);
    let mut walk = Walk::new(WithWhiteouts(view), b"");
    flattener.push_dir(Attrs::from_stat(&root.stat, xattrs), root.below.clone());
    walk.enter(root)?;
    while let Some(step) = walk.next()? {
        match step {
            WalkStep::Entry(found) => flattener.add_entry(&mut walk, found)?,
            WalkStep::Leave(_) => flattener.leave(walk.path())?,
        }
    }
    (flattener.progress)(flattener.done);
    Ok(flattener.done)
}

/// The marker that an object of the new layer needs, so that the layers below are searched at the same path as before.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Marker {
    /// No marker: the path of the object suffices.
    None,
    /// An opaque marker: the layers below are not searched.
    Opaque,
    /// A redirect: the layers below are searched at this path.
    Redirect(Vec<u8>),
}

/// Returns the marker for the object `name`.
///
/// `above` is the path at which the layers below are searched for its parent directory, and `below` is the path at which
/// they must be searched for the object itself.
fn required_marker(above: Option<&LayerPath>, name: &[u8], below: Option<&LayerPath>) -> Marker {
    match (above, below) {
        (None, None) => Marker::None,
        (Some(_), None) => Marker::Opaque,
        (Some(above), Some(below)) if is_child(above, name, below) => Marker::None,
        (_, Some(below)) => Marker::Redirect(below.to_bytes()),
    }
}

/// Returns whether `below` is `above` joined with this name.
fn is_child(above: &LayerPath, name: &[u8], below: &LayerPath) -> bool {
    below
        .split_last()
        .is_some_and(|(before, last)| last == name && before == above)
}

/// The directory in the layers below the range with which a directory of the range is merged.
#[derive(Clone)]
enum LowerDir {
    /// The layers below are not known, so there may be a directory.
    Unknown,
    /// There is no directory.
    Absent,
    /// A directory.
    Present(Box<DirNode>),
}

impl LowerDir {
    /// Returns the subdirectory of this name.
    fn subdir(&self, view: &View, name: &[u8]) -> cowl_layers::Result<Self> {
        let Self::Present(dir) = self else {
            return Ok(self.clone());
        };
        Ok(match view.lookup(dir, &Name::new(name)?)? {
            Found::Dir(next) => Self::Present(Box::new(next)),
            Found::Absent | Found::Whiteout | Found::File(_) => Self::Absent,
        })
    }

    /// Returns whether it may contain this name.
    fn may_contain(&self, view: &View, name: &Name) -> cowl_layers::Result<bool> {
        Ok(match self {
            Self::Unknown => true,
            Self::Absent => false,
            Self::Present(dir) => {
                matches!(view.lookup(dir, name)?, Found::Dir(_) | Found::File(_))
            }
        })
    }
}

/// A directory that is being created.
struct OpenDir {
    /// Set when the directory is complete, because creating entries changes the times.
    attrs: Attrs,
    /// [`DirNode::below`].
    below: Option<LayerPath>,
    /// The directory of the layers below the range, once it was looked up.
    lower: Option<LowerDir>,
}

/// The state of a merge.
struct Flattener<'a> {
    beneath: Option<&'a View>,
    space: XattrSpace,
    cursor: DirCursor,
    /// The directories from the root to the current one.
    levels: Vec<OpenDir>,
    hard_links: HardLinks,
    done: Progress,
    progress: OnProgress<'a>,
}

impl Flattener<'_> {
    fn push_dir(&mut self, attrs: Attrs, below: Option<LayerPath>) {
        self.levels.push(OpenDir {
            attrs,
            below,
            lower: None,
        });
    }

    /// Returns the path at which the layers below the range are searched for the current directory.
    fn below(&self) -> Option<&LayerPath> {
        self.levels.last().and_then(|level| level.below.as_ref())
    }

    /// Creates one entry of the current directory.
    fn add_entry(&mut self, walk: &mut Walk<WithWhiteouts<'_>>, found: Found) -> Result<()> {
        let path = walk.path();
        let name = Name::new(path::split(path).1).context("cannot read", path)?;
        match found {
            Found::Absent => return Ok(()),
            Found::Whiteout => {
                if self.below().is_none() || !self.is_whiteout_needed(&name, path)? {
                    return Ok(());
                }
                node::mknod(self.cursor.here(), &name, FileKind::CharDevice, 0, 0)
                    .context("cannot create the whiteout", path)?;
            }
            Found::Dir(dir) => {
                create::dir(self.cursor.here(), &name, path)?;
                let attrs = self.dir_attrs(&name, &dir, path)?;
                self.push_dir(attrs, dir.below.clone());
                self.cursor.enter(&name, path)?;
                walk.enter(dir)?;
            }
            Found::File(file) => self.add_file(&name, &file, path, walk.depth())?,
        }
        self.done.entries += 1;
        (self.progress)(self.done);
        Ok(())
    }

    /// Completes the current directory.
    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let level = self.levels.pop();
        if self.levels.is_empty() {
            self.hard_links.finish()?;
        }
        self.cursor.leave(path, |fd| match &level {
            Some(level) => attrs::apply(fd, FileKind::Directory, &level.attrs, path),
            None => Ok(()),
        })
    }

    /// Returns whether a whiteout in the current directory hides anything.
    fn is_whiteout_needed(&mut self, name: &Name, path: &[u8]) -> Result<bool> {
        let Some(view) = self.beneath else {
            return Ok(true);
        };
        let message = "cannot read the layers below";
        let lower = self.lower_dir(view).context(message, path)?;
        lower.may_contain(view, name).context(message, path)
    }

    /// Returns the directory of the layers below the range with which the current directory is merged.
    ///
    /// The lookup begins at the nearest ancestor that was looked up before.
    fn lower_dir(&mut self, view: &View) -> cowl_layers::Result<&LowerDir> {
        let is_known = |level: &OpenDir| level.lower.is_some();
        let from = self
            .levels
            .iter()
            .rposition(is_known)
            .map_or(0, |at| at + 1);
        for at in from..self.levels.len() {
            let above = at.checked_sub(1).and_then(|above| self.levels.get(above));
            let Some(level) = self.levels.get(at) else {
                break;
            };
            let lower = match (above, &level.below) {
                (_, None) => LowerDir::Unknown,
                (Some(above), Some(below)) => {
                    match (&above.lower, &above.below, below.split_last()) {
                        (Some(lower), Some(path), Some((before, name)))
                            if !matches!(lower, LowerDir::Unknown) && before == path =>
                        {
                            lower.subdir(view, name)?
                        }
                        _ => Self::find_from_root(view, below)?,
                    }
                }
                (None, Some(below)) => Self::find_from_root(view, below)?,
            };
            if let Some(level) = self.levels.get_mut(at) {
                level.lower = Some(lower);
            }
        }
        let last = self.levels.last().and_then(|level| level.lower.as_ref());
        Ok(last.unwrap_or(&LowerDir::Unknown))
    }

    /// Looks up a directory of the layers below the range by its path.
    fn find_from_root(view: &View, path: &LayerPath) -> cowl_layers::Result<LowerDir> {
        let root = LowerDir::Present(Box::new(view.root()?));
        let mut names = path.names().into_iter();
        names.try_fold(root, |dir, name| dir.subdir(view, name))
    }

    /// Returns the attributes of a directory, including its marker.
    fn dir_attrs(&self, name: &[u8], dir: &DirNode, path: &[u8]) -> Result<Attrs> {
        let on_disk = dir.xattrs().context("cannot read the xattrs", path)?;
        let mut xattrs = self.retained_xattrs(on_disk);
        match required_marker(self.below(), name, dir.below.as_ref()) {
            Marker::None => {}
            Marker::Opaque => xattrs.push((self.space.opaque().into(), OPAQUE.to_vec())),
            Marker::Redirect(below) => xattrs.push(self.redirect_xattr(&below)),
        }
        Ok(Attrs::from_stat(&dir.stat, xattrs))
    }

    fn redirect_xattr(&self, below: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let value = Redirect::Path(below.into()).to_value();
        (self.space.redirect().into(), value)
    }

    /// Returns the xattrs that the merged object retains: all but the markers that depend on its path and its content.
    fn retained_xattrs(&self, on_disk: Xattrs) -> Xattrs {
        let marker = self.space.ino().as_bytes();
        let number = on_disk.iter().find(|(name, _)| name == marker).cloned();
        let mut retained = without_markers(self.space, on_disk);
        retained.extend(number);
        retained
    }

    /// Creates a file, or links it if another name of it was created.
    fn add_file(&mut self, name: &[u8], file: &FileNode, path: &[u8], depth: usize) -> Result<()> {
        if let Some(first) = self.hard_links.find(&file.stat)? {
            return create::link(first.as_fd(), self.cursor.here(), name, self.space, path);
        }
        self.create_file(name, file, path)?;
        let location = (self.cursor.here(), name);
        self.hard_links.record(&file.stat, location, path, depth)
    }

    /// Creates a file with its content, attributes and markers.
    fn create_file(&mut self, name: &[u8], file: &FileNode, path: &[u8]) -> Result<()> {
        let on_disk = file.loc.xattrs().context("cannot read the xattrs", path)?;
        let metacopy = on_disk
            .iter()
            .find(|(name, _)| file.data_missing && name == self.space.metacopy().as_bytes())
            .cloned();
        let mut attrs = Attrs::from_stat(&file.stat, self.retained_xattrs(on_disk));
        let kind = file.stat.kind();
        let parent = self.cursor.here();
        match kind {
            FileKind::Regular => {}
            FileKind::Symlink => {
                let link = file
                    .loc
                    .readlink()
                    .context("cannot read the symbolic link", path)?;
                let attrs = (&attrs, &mut Omissions::none());
                return create::symlink(parent, name, &link, attrs, path);
            }
            _ => {
                let device = (kind, file.stat.rdev);
                let attrs = (&attrs, &mut Omissions::none());
                return create::special(parent, name, device, attrs, self.space, path);
            }
        }
        let to = create::file(parent, name, path)?;
        let size = file.stat.size;
        if file.data_missing {
            // A metadata-only copy: its data is in a layer below the range, but it has its own size.
            attr::truncate(&to, size).context("cannot set the size", path)?;
            let marker_name = self.space.metacopy().into();
            attrs
                .xattrs
                .push(metacopy.unwrap_or((marker_name, Vec::new())));
            // The names of a file share one redirect, so it must be correct at each of their paths.
            let above = self.below().filter(|_| file.stat.nlink < 2);
            if let Marker::Redirect(below) = required_marker(above, name, file.below.as_ref()) {
                attrs.xattrs.push(self.redirect_xattr(&below));
            }
        } else {
            let content = open_content(file.data_loc()).context("cannot open the file", path)?;
            copy::copy_data(content.as_fd(), to.as_fd(), size)
                .context("cannot copy the content", path)?;
            self.done.bytes += size;
        }
        attrs::apply(to.as_fd(), kind, &attrs, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_complement_the_path() {
        let path = |path: &str| LayerPath::from(path.as_bytes());
        let marker = |above: Option<&str>, name: &str, below: Option<&str>| {
            let (above, below) = (above.map(path), below.map(path));
            super::required_marker(above.as_ref(), name.as_bytes(), below.as_ref())
        };
        let redirect = |path: &str| Marker::Redirect(path.as_bytes().to_vec());
        assert_eq!(marker(Some(""), "a", Some("a")), Marker::None);
        assert_eq!(marker(Some("x"), "a", Some("x/a")), Marker::None);
        assert_eq!(marker(Some(""), "a", Some("b")), redirect("b"));
        assert_eq!(marker(Some("x"), "a", Some("a")), redirect("a"));
        assert_eq!(marker(Some("x"), "a", None), Marker::Opaque);
        assert_eq!(marker(None, "a", None), Marker::None);
        assert_eq!(marker(None, "a", Some("b/c")), redirect("b/c"));
    }
}
