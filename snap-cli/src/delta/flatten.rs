//! Merging a range of adjacent layers into one new layer that shows the same, above whatever lies
//! below the range.
//!
//! What a mark of the new layer must say follows from one question the view answers for every
//! object: under which path would the layers below be asked for it (`below`)? Where that is the path
//! at which the new layer's own folder would ask anyway, no mark is needed; where it is another, a
//! redirect; where nothing below may show although it would, an opaque mark or a whiteout. A range
//! that reaches down to the bottom is asked for nothing below, so its layer has no marks at all.
//!
//! The layers that are merged are only read. Numbers that an object borrows from a layer below the
//! range stay; those borrowed from a layer of the range end with it.

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
use crate::tree::linked::Linked;
use crate::tree::walk::{Step, Walk, WithWhiteouts, open_content};
use crate::tree::{create, path};

/// Merges the view's layers into the empty folder `target`, the tree of a new layer.
///
/// Whether layers lie below the range is the view's to know: `View::part` says there are, `View::new`
/// that there are none. `beneath` is what those layers show, where that is known: then no whiteout
/// is left that would hide nothing. (The kernel lists such a one in a folder that merges with nothing.)
/// On an error the target is left half filled, for its maker to remove.
pub fn flatten(
    view: &View,
    beneath: Option<&View>,
    target: &Path,
    progress: OnProgress<'_>,
) -> Result<Progress> {
    let to = dir::open_root(target).context(
        "can't open the target folder",
        target.as_os_str().as_bytes(),
    )?;
    create::ready_root(to.as_fd())?;
    let top = view.layers().first();
    let space = top
        .map(|layer| layer.space())
        .ok_or_else(|| TreeError::new(ErrorKind::Damaged, "there are no layers to merge"))?;
    let mut flatten = Flatten {
        beneath,
        space,
        linked: Linked::new(to.as_fd())?,
        places: DirCursor::new(to),
        levels: Vec::new(),
        done: Progress::default(),
        progress,
    };
    let root = view.root().context("can't read the root folder", b".")?;
    let xattrs = flatten.kept(root.xattrs().context("can't read the attributes", b".")?);
    let mut walk = Walk::new(WithWhiteouts(view), b"");
    flatten.push(Attrs::of(&root.stat, xattrs), root.below.clone());
    walk.enter(root)?;
    while let Some(step) = walk.next()? {
        match step {
            Step::Entry(found) => flatten.entry(&mut walk, found)?,
            Step::Leave(_) => flatten.leave(walk.path())?,
        }
    }
    (flatten.progress)(flatten.done);
    Ok(flatten.done)
}

/// What an object of the new layer must carry so that the layers below are asked as before.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Mark {
    /// Nothing: the place it has says it.
    None,
    /// Nothing below may show.
    Opaque,
    /// The layers below have it elsewhere.
    Redirect(Vec<u8>),
}

/// `above`: at which path the layers below are asked for the folder that holds `name`.
/// `below`: at which path they are to be asked for the object itself.
fn mark(above: Option<&LayerPath>, name: &[u8], below: Option<&LayerPath>) -> Mark {
    match (above, below) {
        (None, None) => Mark::None,
        (Some(_), None) => Mark::Opaque,
        (Some(above), Some(below)) if is_child(above, name, below) => Mark::None,
        (_, Some(below)) => Mark::Redirect(below.to_bytes()),
    }
}

/// Whether `below` is `above` with this name.
fn is_child(above: &LayerPath, name: &[u8], below: &LayerPath) -> bool {
    below
        .split_last()
        .is_some_and(|(before, last)| last == name && before == above)
}

/// What lies below a folder of the range.
#[derive(Clone)]
enum Under {
    /// That is not known: anything may.
    Unknown,
    /// Nothing, or no folder.
    Nothing,
    /// A folder.
    Folder(Box<DirNode>),
}

impl Under {
    /// What the view shows under a name of it, as a directory.
    fn step(&self, view: &View, name: &[u8]) -> cowl_layers::Result<Self> {
        let Self::Folder(dir) = self else {
            return Ok(self.clone());
        };
        Ok(match view.lookup(dir, &Name::new(name)?)? {
            Found::Dir(next) => Self::Folder(Box::new(next)),
            Found::Absent | Found::Whiteout | Found::File(_) => Self::Nothing,
        })
    }

    /// Whether something could show there under `name`.
    fn hold(&self, view: &View, name: &Name) -> cowl_layers::Result<bool> {
        Ok(match self {
            Self::Unknown => true,
            Self::Nothing => false,
            Self::Folder(dir) => {
                matches!(view.lookup(dir, name)?, Found::Dir(_) | Found::File(_))
            }
        })
    }
}

/// A directory that is being filled.
struct Level {
    /// Set last, because what is made inside changes them.
    attrs: Attrs,
    /// [`DirNode::below`].
    below: Option<LayerPath>,
    /// What the layers below the range have there, once that was asked.
    under: Option<Under>,
}

struct Flatten<'a> {
    beneath: Option<&'a View>,
    space: XattrSpace,
    places: DirCursor,
    /// The directories in which the walk is, the root's first.
    levels: Vec<Level>,
    linked: Linked,
    done: Progress,
    progress: OnProgress<'a>,
}

impl Flatten<'_> {
    fn push(&mut self, attrs: Attrs, below: Option<LayerPath>) {
        self.levels.push(Level {
            attrs,
            below,
            under: None,
        });
    }

    fn below(&self) -> Option<&LayerPath> {
        self.levels.last().and_then(|level| level.below.as_ref())
    }

    fn entry(&mut self, walk: &mut Walk<WithWhiteouts<'_>>, found: Found) -> Result<()> {
        let path = walk.path();
        let name = Name::new(path::split(path).1).context("can't read", path)?;
        match found {
            Found::Absent => return Ok(()),
            Found::Whiteout => {
                if self.below().is_none() || !self.hides(&name, path)? {
                    return Ok(());
                }
                node::mknod(self.places.here(), &name, FileKind::CharDevice, 0, 0)
                    .context("can't make the deletion mark", path)?;
            }
            Found::Dir(dir) => {
                create::dir(self.places.here(), &name, path)?;
                let attrs = self.folder_attrs(&name, &dir, path)?;
                self.push(attrs, dir.below.clone());
                self.places.enter(&name, path)?;
                walk.enter(dir)?;
            }
            Found::File(file) => self.file(&name, &file, path, walk.depth())?,
        }
        self.done.entries += 1;
        (self.progress)(self.done);
        Ok(())
    }

    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let level = self.levels.pop();
        if self.levels.is_empty() {
            self.linked.finish()?;
        }
        self.places.leave(path, |fd| match &level {
            Some(level) => attrs::apply(fd, FileKind::Directory, &level.attrs, path),
            None => Ok(()),
        })
    }

    /// Whether a whiteout in the directory in which the walk is hides anything.
    fn hides(&mut self, name: &Name, path: &[u8]) -> Result<bool> {
        let Some(view) = self.beneath else {
            return Ok(true);
        };
        let what = "can't read below";
        let under = self.under(view).context(what, path)?;
        under.hold(view, name).context(what, path)
    }

    /// What the layers below the range have where they are asked for the directory in which the walk is:
    /// found from the nearest directory above of which it is known.
    fn under(&mut self, view: &View) -> cowl_layers::Result<&Under> {
        let known = |level: &Level| level.under.is_some();
        let from = self.levels.iter().rposition(known).map_or(0, |at| at + 1);
        for at in from..self.levels.len() {
            let above = at.checked_sub(1).and_then(|above| self.levels.get(above));
            let Some(level) = self.levels.get(at) else {
                break;
            };
            let under = match (above, &level.below) {
                (_, None) => Under::Unknown,
                (Some(above), Some(below)) => {
                    match (&above.under, &above.below, below.split_last()) {
                        (Some(under), Some(path), Some((before, name)))
                            if !matches!(under, Under::Unknown) && before == path =>
                        {
                            under.step(view, name)?
                        }
                        _ => Self::from_root(view, below)?,
                    }
                }
                (None, Some(below)) => Self::from_root(view, below)?,
            };
            if let Some(level) = self.levels.get_mut(at) {
                level.under = Some(under);
            }
        }
        let last = self.levels.last().and_then(|level| level.under.as_ref());
        Ok(last.unwrap_or(&Under::Unknown))
    }

    fn from_root(view: &View, path: &LayerPath) -> cowl_layers::Result<Under> {
        let root = Under::Folder(Box::new(view.root()?));
        let mut names = path.names().into_iter();
        names.try_fold(root, |under, name| under.step(view, name))
    }

    fn folder_attrs(&self, name: &[u8], dir: &DirNode, path: &[u8]) -> Result<Attrs> {
        let on_disk = dir.xattrs().context("can't read the attributes", path)?;
        let mut xattrs = self.kept(on_disk);
        match mark(self.below(), name, dir.below.as_ref()) {
            Mark::None => {}
            Mark::Opaque => xattrs.push((self.space.opaque().into(), OPAQUE.to_vec())),
            Mark::Redirect(below) => xattrs.push(self.redirect(&below)),
        }
        Ok(Attrs::of(&dir.stat, xattrs))
    }

    fn redirect(&self, below: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let value = Redirect::Path(below.into()).to_value();
        (self.space.redirect().into(), value)
    }

    /// Attributes of an object that come with it: all but the marks that place and content decide.
    fn kept(&self, on_disk: Xattrs) -> Xattrs {
        let mark = self.space.ino().as_bytes();
        let number = on_disk.iter().find(|(name, _)| name == mark).cloned();
        let mut kept = without_markers(self.space, on_disk);
        kept.extend(number);
        kept
    }

    fn file(&mut self, name: &[u8], file: &FileNode, path: &[u8], depth: usize) -> Result<()> {
        if let Some(first) = self.linked.find(&file.stat)? {
            return create::link(first.as_fd(), self.places.here(), name, self.space, path);
        }
        self.new_file(name, file, path)?;
        let place = (self.places.here(), name);
        self.linked.note(&file.stat, place, path, depth)
    }

    fn new_file(&mut self, name: &[u8], file: &FileNode, path: &[u8]) -> Result<()> {
        let on_disk = file
            .loc
            .xattrs()
            .context("can't read the attributes", path)?;
        let metacopy = on_disk
            .iter()
            .find(|(name, _)| file.data_missing && name == self.space.metacopy().as_bytes())
            .cloned();
        let mut attrs = Attrs::of(&file.stat, self.kept(on_disk));
        let kind = file.stat.kind();
        let place = self.places.here();
        match kind {
            FileKind::Regular => {}
            FileKind::Symlink => {
                let link = file
                    .loc
                    .readlink()
                    .context("can't read the symbolic link", path)?;
                return create::symlink(place, name, &link, &attrs, path);
            }
            _ => {
                let what = (kind, file.stat.rdev);
                return create::special(place, name, what, &attrs, self.space, path);
            }
        }
        let to = create::file(place, name, path)?;
        let size = file.stat.size;
        if file.data_missing {
            // The content stays where it is; the size is the file's own.
            attr::truncate(&to, size).context("can't set the size", path)?;
            let mark_name = self.space.metacopy().into();
            attrs
                .xattrs
                .push(metacopy.unwrap_or((mark_name, Vec::new())));
            // One mark serves all names of a file: it must hold wherever they are.
            let above = self.below().filter(|_| file.stat.nlink < 2);
            if let Mark::Redirect(below) = mark(above, name, file.below.as_ref()) {
                attrs.xattrs.push(self.redirect(&below));
            }
        } else {
            let content = open_content(file.data_loc()).context("can't open the file", path)?;
            copy::copy_data(content.as_fd(), to.as_fd(), size)
                .context("can't copy the content", path)?;
            self.done.bytes += size;
        }
        attrs::apply(to.as_fd(), kind, &attrs, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_say_what_the_place_does_not() {
        let path = |path: &str| LayerPath::from(path.as_bytes());
        let mark = |above: Option<&str>, name: &str, below: Option<&str>| {
            let (above, below) = (above.map(path), below.map(path));
            super::mark(above.as_ref(), name.as_bytes(), below.as_ref())
        };
        let redirect = |path: &str| Mark::Redirect(path.as_bytes().to_vec());
        assert_eq!(mark(Some(""), "a", Some("a")), Mark::None);
        assert_eq!(mark(Some("x"), "a", Some("x/a")), Mark::None);
        assert_eq!(mark(Some(""), "a", Some("b")), redirect("b"));
        assert_eq!(mark(Some("x"), "a", Some("a")), redirect("a"));
        assert_eq!(mark(Some("x"), "a", None), Mark::Opaque);
        assert_eq!(mark(None, "a", None), Mark::None);
        assert_eq!(mark(None, "a", Some("b/c")), redirect("b/c"));
    }
}
