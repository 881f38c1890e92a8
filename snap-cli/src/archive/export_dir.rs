//! Writing a state as a plain folder: what a container shows, without layers and without marks.
//!
//! The target is an empty folder. On an error it is left half filled: whoever made it removes it.

use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{copy, dir, node};
use cowl_layers::view::View;

use super::report::Report;
use crate::tree::attrs::{self, Attrs};
use crate::tree::create;
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, OnProgress, Result};
use crate::tree::hard_links::HardLinks;
use crate::tree::walk::{self, Item, Visitor};

/// Fills the empty folder `target` with what the view shows. Making it durable is the caller's.
pub fn fill(view: &View, target: &Path, progress: OnProgress<'_>) -> Result<Report> {
    let root = dir::open_root(target).context(
        "can't open the target folder",
        target.as_os_str().as_bytes(),
    )?;
    create::prepare_root(root.as_fd())?;
    let mut fill = Fill {
        linked: HardLinks::new(root.as_fd())?,
        places: DirCursor::new(root),
        levels: Vec::new(),
        out: Report::default(),
        progress,
    };
    walk::visit_state(view, &mut fill)?;
    (fill.progress)(fill.out.done);
    Ok(fill.out)
}

struct Fill<'a> {
    places: DirCursor,
    /// Attributes of the directories in which the walk is: set last, because what is made inside changes them.
    levels: Vec<Attrs>,
    linked: HardLinks,
    out: Report,
    progress: OnProgress<'a>,
}

impl Visitor for Fill<'_> {
    fn visit(&mut self, item: &Item<'_>) -> Result<()> {
        let (path, name, kind) = (item.path, item.name(), item.kind());
        self.out.done.entries += u64::from(!path.is_empty());
        if let Some(first) = self.linked.find(&item.stat)? {
            return node::link_fd(first.as_fd(), self.places.here(), name)
                .context("can't make the hard link", path);
        }
        let attrs = Attrs::from_stat(&item.stat, item.xattrs()?);
        if kind == FileKind::Directory {
            if !path.is_empty() {
                create::dir(self.places.here(), name, path)?;
                self.places.enter(name, path)?;
            }
            self.levels.push(attrs);
            return Ok(());
        }
        let place = self.places.here();
        match kind {
            FileKind::Regular => {
                let to = create::file(place, name, path)?;
                let size = item.stat.size;
                if size > 0 {
                    copy::copy_data(item.open()?.as_fd(), to.as_fd(), size)
                        .context("can't copy the content", path)?;
                }
                self.out.done.bytes = self.out.done.bytes.saturating_add(size);
                attrs::apply(to.as_fd(), kind, &attrs, path)?;
            }
            FileKind::Symlink => create::symlink(place, name, &item.target()?, &attrs, path)?,
            _ => create::node(place, name, (kind, item.stat.rdev), &attrs, path)?,
        }
        self.linked
            .record(&item.stat, (place, name), path, item.depth)?;
        (self.progress)(self.out.done);
        Ok(())
    }

    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let attrs = self.levels.pop();
        if self.levels.is_empty() {
            self.linked.finish()?;
        }
        self.places.leave(path, |fd| match &attrs {
            Some(attrs) => attrs::apply(fd, FileKind::Directory, attrs, path),
            None => Ok(()),
        })
    }
}
