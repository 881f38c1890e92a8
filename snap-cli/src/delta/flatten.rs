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

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_fs::format::{OPAQUE, Redirect, XattrSpace};
use cowl_fs::name::Name;
use cowl_fs::sys::stat::FileKind;
use cowl_fs::sys::{attr, copy, dir, node};
use cowl_fs::view::{DirNode, FileNode, Found, View, without_marks};

use super::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use super::make::{self, Attrs, Xattrs, join};
use super::places::Places;
use super::walk::{Links, open_content};

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
    make::ready_root(to.as_fd())?;
    let top = view.layers().first();
    let space = top
        .map(|layer| layer.space())
        .ok_or_else(|| TreeError::new(ErrorKind::Damaged, "there are no layers to merge"))?;
    let mut flatten = Flatten {
        view,
        beneath,
        space,
        places: Places::new(to),
        folders: BTreeMap::new(),
        links: Links::default(),
        done: Progress::default(),
        progress,
    };
    let root = view.root().context("can't read the root folder", b".")?;
    let xattrs = flatten.kept(root.xattrs().context("can't read the attributes", b".")?);
    flatten
        .folders
        .insert(Vec::new(), Attrs::of(&root.stat, xattrs));
    let mut todo = vec![(Vec::new(), root)];
    while let Some((path, dir)) = todo.pop() {
        flatten.folder(&path, &dir, &mut todo)?;
    }
    flatten.finish_folders()?;
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
fn mark(above: Option<&[u8]>, name: &[u8], below: Option<&[u8]>) -> Mark {
    match (above.map(|above| join(above, name)), below) {
        (None, None) => Mark::None,
        (Some(_), None) => Mark::Opaque,
        (Some(natural), Some(below)) if natural == below => Mark::None,
        (_, Some(below)) => Mark::Redirect(below.to_vec()),
    }
}

/// What lies below a folder of the range.
enum Under<'a> {
    /// That is not known: anything may.
    Unknown,
    /// Nothing, or no folder.
    Nothing,
    /// A folder.
    Folder(&'a View, Box<DirNode>),
}

impl<'a> Under<'a> {
    /// What the layers below the range have where they are asked for `dir`.
    fn of(beneath: Option<&'a View>, dir: &DirNode) -> cowl_fs::Result<Self> {
        let (Some(view), Some(path)) = (beneath, dir.below.as_deref()) else {
            return Ok(Self::Unknown);
        };
        let mut dir = view.root()?;
        for part in path.split(|&byte| byte == b'/').filter(|p| !p.is_empty()) {
            match view.lookup(&dir, &Name::new(part)?)? {
                Found::Dir(next) => dir = next,
                Found::Absent | Found::Whiteout | Found::File(_) => return Ok(Self::Nothing),
            }
        }
        Ok(Self::Folder(view, Box::new(dir)))
    }

    /// Whether something could show there under `name`.
    fn hold(&self, name: &Name) -> cowl_fs::Result<bool> {
        Ok(match self {
            Self::Unknown => true,
            Self::Nothing => false,
            Self::Folder(view, dir) => {
                matches!(view.lookup(dir, name)?, Found::Dir(_) | Found::File(_))
            }
        })
    }
}

struct Flatten<'a> {
    view: &'a View,
    beneath: Option<&'a View>,
    space: XattrSpace,
    places: Places,
    /// Attributes of folders: set last, because what is made inside changes them.
    folders: BTreeMap<Vec<u8>, Attrs>,
    links: Links<Vec<u8>>,
    done: Progress,
    progress: OnProgress<'a>,
}

impl Flatten<'_> {
    fn folder(
        &mut self,
        path: &[u8],
        from: &DirNode,
        todo: &mut Vec<(Vec<u8>, DirNode)>,
    ) -> Result<()> {
        let names = self
            .view
            .list_raw(from)
            .context("can't read the folder", path)?;
        let (beneath, mut under) = (self.beneath, None);
        for entry in names {
            let inner = join(path, &entry.name);
            let found = self
                .view
                .lookup(from, &entry.name)
                .context("can't read", &inner)?;
            match found {
                Found::Absent => continue,
                Found::Whiteout if from.below.is_none() => continue,
                Found::Whiteout => {
                    let known = match under.take() {
                        Some(known) => known,
                        None => Under::of(beneath, from).context("can't read below", path)?,
                    };
                    let known = under.insert(known);
                    if !known
                        .hold(&entry.name)
                        .context("can't read below", &inner)?
                    {
                        continue;
                    }
                    self.whiteout(path, &entry.name, &inner)?;
                }
                Found::Dir(dir) => {
                    let place = self.places.folder(path, false)?;
                    make::folder(place.fd(), &entry.name, &inner)?;
                    let attrs = self.folder_attrs(from, &entry.name, &dir, &inner)?;
                    self.folders.insert(inner.clone(), attrs);
                    todo.push((inner, dir));
                }
                Found::File(file) => self.file(from, path, &entry.name, &file, &inner)?,
            }
            self.done.entries += 1;
            (self.progress)(self.done);
        }
        Ok(())
    }

    fn folder_attrs(
        &self,
        from: &DirNode,
        name: &[u8],
        dir: &DirNode,
        path: &[u8],
    ) -> Result<Attrs> {
        let on_disk = dir.xattrs().context("can't read the attributes", path)?;
        let mut xattrs = self.kept(on_disk);
        match mark(from.below.as_deref(), name, dir.below.as_deref()) {
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
        let mut kept = without_marks(self.space, on_disk);
        kept.extend(number);
        kept
    }

    fn whiteout(&mut self, parent: &[u8], name: &[u8], path: &[u8]) -> Result<()> {
        let place = self.places.folder(parent, false)?;
        node::mknod(place.fd(), name, FileKind::CharDevice, 0, 0)
            .context("can't make the deletion mark", path)
    }

    fn file(
        &mut self,
        from: &DirNode,
        parent: &[u8],
        name: &[u8],
        file: &FileNode,
        path: &[u8],
    ) -> Result<()> {
        if let Some(first) = self.links.first(&file.stat, || path.to_vec()) {
            let first = first.clone();
            return self.hard_link(&first, parent, name, path);
        }
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
        let place = self.places.folder(parent, false)?;
        match kind {
            FileKind::Regular => {}
            FileKind::Symlink => {
                let link = file
                    .loc
                    .readlink()
                    .context("can't read the symbolic link", path)?;
                return make::symlink(place.fd(), name, &link, &attrs, path);
            }
            _ => {
                let what = (kind, file.stat.rdev);
                return make::special(place.fd(), name, what, &attrs, self.space, path);
            }
        }
        let to = make::file(place.fd(), name, path)?;
        let size = file.stat.size;
        if file.data_missing {
            // The content stays where it is; the size is the file's own.
            attr::truncate(&to, size).context("can't set the size", path)?;
            let mark_name = self.space.metacopy().into();
            attrs
                .xattrs
                .push(metacopy.unwrap_or((mark_name, Vec::new())));
            // One mark serves all names of a file: it must hold wherever they are.
            let above = from.below.as_deref().filter(|_| file.stat.nlink < 2);
            if let Mark::Redirect(below) = mark(above, name, file.below.as_deref()) {
                attrs.xattrs.push(self.redirect(&below));
            }
        } else {
            let content = open_content(file.data_loc()).context("can't open the file", path)?;
            copy::copy_data(content.as_fd(), to.as_fd(), size)
                .context("can't copy the content", path)?;
            self.done.bytes += size;
        }
        make::apply(to.as_fd(), kind, &attrs, path)
    }

    fn hard_link(&mut self, first: &[u8], parent: &[u8], name: &[u8], path: &[u8]) -> Result<()> {
        let (first_parent, first_name) = make::split(first);
        let fd = {
            let place = self.places.folder(first_parent, false)?;
            dir::open_path(place.fd(), first_name).context("can't open", first)?
        };
        let place = self.places.folder(parent, false)?;
        make::link(fd.as_fd(), place.fd(), name, self.space, path)
    }

    fn finish_folders(&mut self) -> Result<()> {
        for (path, attrs) in std::mem::take(&mut self.folders).into_iter().rev() {
            let place = self.places.folder(&path, false)?;
            make::apply(place.fd(), FileKind::Directory, &attrs, &path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_say_what_the_place_does_not() {
        let some = |path: &'static str| Some(path.as_bytes());
        assert_eq!(mark(some(""), b"a", some("a")), Mark::None);
        assert_eq!(mark(some("x"), b"a", some("x/a")), Mark::None);
        assert_eq!(
            mark(some(""), b"a", some("b")),
            Mark::Redirect(b"b".to_vec())
        );
        assert_eq!(
            mark(some("x"), b"a", some("a")),
            Mark::Redirect(b"a".to_vec())
        );
        assert_eq!(mark(some("x"), b"a", None), Mark::Opaque);
        assert_eq!(mark(None, b"a", None), Mark::None);
        assert_eq!(
            mark(None, b"a", some("b/c")),
            Mark::Redirect(b"b/c".to_vec())
        );
    }
}
