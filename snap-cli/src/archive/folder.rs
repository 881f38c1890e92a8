//! Writing a state as a plain folder: what a container shows, without layers and without marks.
//!
//! The target is an empty folder. On an error it is left half filled: whoever made it removes it.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_fs::sys::stat::FileKind;
use cowl_fs::sys::{copy, dir, node};
use cowl_fs::view::View;

use super::export::Exported;
use crate::delta::error::{Context as _, OnProgress, Result};
use crate::delta::make::{self, Attrs, split};
use crate::delta::places::Places;
use crate::delta::walk::{self, Item, Links};

/// Fills the empty folder `target` with what the view shows. Making it durable is the caller's.
pub fn fill(view: &View, target: &Path, progress: OnProgress<'_>) -> Result<Exported> {
    let root = dir::open_root(target).context(
        "can't open the target folder",
        target.as_os_str().as_bytes(),
    )?;
    make::ready_root(root.as_fd())?;
    let mut fill = Fill {
        places: Places::new(root),
        folders: BTreeMap::new(),
        links: Links::default(),
        out: Exported::default(),
        progress,
    };
    walk::state(view, &mut |item| fill.item(&item))?;
    // The deepest first: one that its owner may not enter must not be in the way of what is below it.
    for (path, attrs) in std::mem::take(&mut fill.folders).into_iter().rev() {
        let place = fill.places.folder(&path, false)?;
        make::apply(place.fd(), FileKind::Directory, &attrs, &path)?;
    }
    (fill.progress)(fill.out.done);
    Ok(fill.out)
}

struct Fill<'a> {
    places: Places,
    /// Attributes of folders: set last, because what is made inside changes them.
    folders: BTreeMap<Vec<u8>, Attrs>,
    links: Links<Vec<u8>>,
    out: Exported,
    progress: OnProgress<'a>,
}

impl Fill<'_> {
    fn item(&mut self, item: &Item) -> Result<()> {
        let path = item.path.as_slice();
        self.out.done.entries += u64::from(!path.is_empty());
        if let Some(first) = self.links.first(&item.stat, || path.to_vec()) {
            let (parent, name) = split(first);
            let source = dir::open_path(self.places.folder(parent, false)?.fd(), name)
                .context("can't open", first)?;
            let (parent, name) = split(path);
            let place = self.places.folder(parent, false)?;
            return node::link_fd(source.as_fd(), place.fd(), name)
                .context("can't make the hard link", path);
        }
        let attrs = Attrs::of(&item.stat, item.xattrs()?);
        let (parent, name) = split(path);
        let kind = item.kind();
        if kind == FileKind::Directory {
            if !path.is_empty() {
                make::folder(self.places.folder(parent, false)?.fd(), name, path)?;
            }
            self.folders.insert(path.to_vec(), attrs);
            return Ok(());
        }
        let place = self.places.folder(parent, false)?;
        match kind {
            FileKind::Regular => {
                let to = make::file(place.fd(), name, path)?;
                let size = item.stat.size;
                if size > 0 {
                    copy::copy_data(item.open()?.as_fd(), to.as_fd(), size)
                        .context("can't copy the content", path)?;
                }
                self.out.done.bytes = self.out.done.bytes.saturating_add(size);
                make::apply(to.as_fd(), kind, &attrs, path)?;
            }
            FileKind::Symlink => make::symlink(place.fd(), name, &item.target()?, &attrs, path)?,
            _ => make::node(place.fd(), name, (kind, item.stat.rdev), &attrs, path)?,
        }
        (self.progress)(self.out.done);
        Ok(())
    }
}
