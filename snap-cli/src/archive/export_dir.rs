//! Writes a state as a plain directory: the merged tree, without markers.
//!
//! The target is an empty directory. After an error it is incomplete, and the caller must remove it.
//!
//! Recorded attributes that the user cannot set are omitted with a note, unlike those in the layers.

use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{copy, dir, node, stat};
use cowl_layers::view::View;

use super::report::TransferReport;
use crate::tree::attrs::{self, Attrs};
use crate::tree::create;
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, OnProgress, Result};
use crate::tree::hard_links::HardLinks;
use crate::tree::omissions::{Omissions, Unsupported};
use crate::tree::walk::{self, Item, ItemAttributes, Visitor};

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
        omissions: Omissions::foreign(Unsupported::Skip),
        out: TransferReport::default(),
        progress,
    };
    walk::visit_state(view, attributes(view)?, &mut fill)?;
    (fill.progress)(fill.out.done);
    fill.out.notes.append(fill.omissions.notes);
    Ok(fill.out)
}

/// Returns the attributes that the export sets.
///
/// Root does not apply the records of another user, which would become devices and set-user-ID programs of the host.
fn attributes(view: &View) -> Result<ItemAttributes> {
    let user = rustix::process::geteuid().as_raw();
    for layer in view.layers() {
        let root = stat::stat_fd(layer.root_fd()).context("cannot read the layer", b".")?;
        if root.uid != user {
            return Ok(ItemAttributes::Stored);
        }
    }
    Ok(ItemAttributes::Original)
}

/// The source of an object's attributes.
#[derive(Clone, Copy)]
enum Source {
    Layer,
    /// A record of attributes that could not be stored.
    Record,
}

const DEVICE_UNSUPPORTED: &str = "skipped a device that this user cannot create";

struct Fill<'a> {
    dirs: DirCursor,
    /// The attributes of the directories of the current path. They are set last, because creating entries changes
    /// them.
    levels: Vec<(Attrs, Source)>,
    linked: HardLinks,
    /// The omissions of recorded attributes.
    omissions: Omissions,
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
        let source = match item.has_record() {
            true => Source::Record,
            false => Source::Layer,
        };
        if kind == FileKind::Directory {
            if !path.is_empty() {
                create::dir(self.dirs.here(), name, path)?;
                self.dirs.enter(name, path)?;
            }
            self.levels.push((attrs, source));
            return Ok(());
        }
        let parent = self.dirs.here();
        let mut none = Omissions::none();
        let omissions = match source {
            Source::Layer => &mut none,
            Source::Record => &mut self.omissions,
        };
        match kind {
            FileKind::Regular => {
                let to = create::file(parent, name, path)?;
                let size = item.stat.size;
                if size > 0 {
                    copy::copy_data(item.open()?.as_fd(), to.as_fd(), size)
                        .context("cannot copy the content", path)?;
                }
                self.out.done.bytes = self.out.done.bytes.saturating_add(size);
                attrs::apply_except(to.as_fd(), kind, &attrs, path, omissions)?;
            }
            FileKind::Symlink => {
                let attrs = (&attrs, omissions);
                create::symlink(parent, name, &item.target()?, attrs, path)?;
            }
            _ => {
                let node = (kind, item.stat.rdev);
                if let Err(error) = create::node(parent, name, node, (&attrs, omissions), path) {
                    return omissions.unsupported(error, DEVICE_UNSUPPORTED, path, b"");
                }
            }
        }
        self.linked
            .record(&item.stat, (parent, name), path, item.depth)?;
        (self.progress)(self.out.done);
        Ok(())
    }

    fn leave(&mut self, path: &[u8]) -> Result<()> {
        let level = self.levels.pop();
        let mut none = Omissions::none();
        let omissions = &mut self.omissions;
        if self.levels.is_empty() {
            self.linked.finish()?;
        }
        self.dirs.leave(path, |fd| {
            let Some((attrs, source)) = &level else {
                return Ok(());
            };
            let omissions = match source {
                Source::Layer => &mut none,
                Source::Record => omissions,
            };
            attrs::apply_except(fd, FileKind::Directory, attrs, path, omissions)
        })
    }
}
