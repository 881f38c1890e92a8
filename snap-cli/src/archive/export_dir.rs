//! Writes a state as a plain directory: the merged tree, without markers.
//!
//! The target is an empty directory. After an error it is incomplete, and the caller must remove it.

use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{copy, dir, node};
use cowl_layers::view::View;

use super::report::TransferReport;
use crate::tree::attrs::{self, Attrs};
use crate::tree::create;
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, OnProgress, Result};
use crate::tree::hard_links::HardLinks;
use crate::tree::omissions::Omissions;
use crate::tree::walk::{self, Item, Visitor};

/// Copies the merged tree of a view into the empty directory `target`. The caller must sync it.
pub fn fill(view: &View, target: &Path, progress: OnProgress<'_>) -> Result<TransferReport> {
    let root = dir::open_root(target).context(
        "cannot open the target directory",
        target.as_os_str().as_bytes(),
    )?;
    create::prepare_root(root.as_fd())?;
    let mut fill = Fill {
        linked: HardLinks::new(root.as_fd())?,
        dirs: DirCursor::new(root),
        levels: Vec::new(),
        out: TransferReport::default(),
        progress,
    };
    walk::visit_state(view, &mut fill)?;
    (fill.progress)(fill.out.done);
    Ok(fill.out)
}

struct Fill<'a> {
    dirs: DirCursor,
    /// The attributes of the directories of the current path. They are set last, because creating entries changes
    /// them.
    levels: Vec<Attrs>,
    linked: HardLinks,
    out: TransferReport,
    progress: OnProgress<'a>,
}

impl Visitor for Fill<'_> {
    fn visit(&mut self, item: &Item<'_>) -> Result<()> {
        let (path, name, kind) = (item.path, item.name(), item.kind());
        self.out.done.entries += u64::from(!path.is_empty());
        if let Some(first) = self.linked.find(&item.stat)? {
            return node::link_fd(first.as_fd(), self.dirs.here(), name)
                .context("cannot create the hard link", path);
        }
        let attrs = Attrs::from_stat(&item.stat, item.xattrs()?);
        if kind == FileKind::Directory {
            if !path.is_empty() {
                create::dir(self.dirs.here(), name, path)?;
                self.dirs.enter(name, path)?;
            }
            self.levels.push(attrs);
            return Ok(());
        }
        let parent = self.dirs.here();
        match kind {
            FileKind::Regular => {
                let to = create::file(parent, name, path)?;
                let size = item.stat.size;
                if size > 0 {
                    copy::copy_data(item.open()?.as_fd(), to.as_fd(), size)
                        .context("cannot copy the content", path)?;
                }
                self.out.done.bytes = self.out.done.bytes.saturating_add(size);
                attrs::apply(to.as_fd(), kind, &attrs, path)?;
            }
            FileKind::Symlink => {
                let attrs = (&attrs, &mut Omissions::none());
                create::symlink(parent, name, &item.target()?, attrs, path)?;
            }
            _ => {
                let attrs = (&attrs, &mut Omissions::none());
                create::node(parent, name, (kind, item.stat.rdev), attrs, path)?;
            }
        }
        self.linked
            .record(&item.stat, (parent, name), path, item.depth)?;
        (self.progress)(self.out.done);
        Ok(())
    }

    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let attrs = self.levels.pop();
        if self.levels.is_empty() {
            self.linked.finish()?;
        }
        self.dirs.leave(path, |fd| match &attrs {
            Some(attrs) => attrs::apply(fd, FileKind::Directory, attrs, path),
            None => Ok(()),
        })
    }
}
