//! The kernel's index. If kernel overlayfs (with `index=on`) copied up a file with several names, only the name
//! that was used got the copy; the others find it by an entry in the work directory's `index`, named by the lower
//! inode's handle. This overlay has no index, so a mount first gives the copy all names under which the file
//! shows, and removes the entry. The kernel reads the result as any file with several names.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::copy_up::{CopyUp, preserving_times};
use crate::inode::Alias;
use crate::names::Links;
use crate::overlay::Overlay;
use crate::reach::Context;
use cowl_layers::error::Result;
use cowl_layers::format::origin::handle_of_entry;
use cowl_layers::layer::{Layer, LayerDir};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};

impl Overlay {
    /// Empties the upper's index of the kernel; false if there was none. To be called on an overlay that serves no
    /// requests yet, and that must be made anew afterwards, because its inodes are out of date.
    pub fn take_over_index(&self) -> Result<bool> {
        let op = self.begin();
        let services = op.services();
        let Some(upper) = services.cx.stack.writable().cloned() else {
            return Ok(false);
        };
        let Some(index) = upper.kernel_index()? else {
            return Ok(false);
        };
        let mut entries = Vec::new();
        for entry in sys::dir::entries(index.as_fd())? {
            // Directories and whiteouts are for NFS exports, and not needed here.
            let stat = sys::stat::stat_at(index.as_fd(), &entry.name)?;
            if let Some(handle) = handle_of_entry(&entry.name)
                && stat.kind() != FileKind::Directory
                && !stat.is_whiteout_device()
            {
                entries.push((entry.name, handle));
            }
        }
        if entries.is_empty() {
            return Ok(false);
        }
        let takeover = TakeOver {
            cx: services.cx,
            links: services.links(),
            copy_up: services.copy_up(),
        };
        let lowers = takeover.lower_handles()?;
        for (entry, handle) in &entries {
            if let Some((layer, stat)) = lowers.get(handle) {
                takeover.link_from_index(index.as_fd(), entry, layer, stat)?;
            }
            // All its names exist: the entry is one link too many.
            sys::node::unlink(index.as_fd(), entry)?;
        }
        log::info!("took over {} entries of the kernel's index", entries.len());
        Ok(true)
    }
}

/// Lower files with several names: their layer and what lies there, by their handles.
type ByHandle = HashMap<(i32, Vec<u8>), (Arc<Layer>, Stat)>;

/// Giving the names of an index entry to its copy.
#[derive(Clone, Copy)]
struct TakeOver<'o> {
    cx: &'o Context<'o>,
    links: Links<'o>,
    copy_up: CopyUp<'o>,
}

impl TakeOver<'_> {
    fn lower_handles(&self) -> Result<ByHandle> {
        let mut found = HashMap::new();
        for layer in self.cx.stack.view().layers() {
            if self.cx.stack.is_upper(layer) {
                continue;
            }
            for path in self.links.scan_layer(layer)?.files() {
                let fd = open_in(layer, path)?;
                if let Some(handle) = sys::handle::of(fd.as_fd())? {
                    found.insert(handle, (layer.clone(), sys::stat::stat_fd(&fd)?));
                }
            }
        }
        Ok(found)
    }

    /// Gives the entry's file every name under which the lower file still shows.
    fn link_from_index(
        &self,
        index: BorrowedFd<'_>,
        entry: &[u8],
        layer: &Arc<Layer>,
        stat: &Stat,
    ) -> Result<()> {
        let mut names: Vec<Alias> = Vec::new();
        let scan = self.links.scan_layer(layer)?;
        for path in scan.paths(stat.ino) {
            self.links.for_each_visible(layer, path, |parent, last| {
                let shows = match self.links.names.lookup(&parent, &last)? {
                    Some(inode) if !inode.is_dir() => {
                        let file = inode.file()?;
                        Arc::ptr_eq(file.loc.dir.layer(), layer) && file.identity.ino == stat.ino
                    }
                    _ => false,
                };
                if shows {
                    names.push(Alias { parent, name: last });
                }
                Ok(())
            })?;
        }
        for Alias { parent, name } in names {
            let (_, up) = self.copy_up.dir_up(&parent)?;
            let inodes = self.links.names.inodes;
            preserving_times(self.cx, inodes, &parent, &up, |fd| {
                sys::node::link(index, entry, fd, &name)
            })?;
        }
        Ok(())
    }
}

/// An O_PATH descriptor of what lies at `path` in a layer.
fn open_in(layer: &Arc<Layer>, path: &[u8]) -> Result<std::os::fd::OwnedFd> {
    let mut dir = layer.root_dir();
    let mut parts = path.split(|&byte| byte == b'/').peekable();
    loop {
        let part = parts.next().unwrap_or_default();
        let fd = dir.fd()?;
        if parts.peek().is_none() {
            return sys::dir::open_path((*fd).as_fd(), part);
        }
        let ino = sys::stat::stat_at((*fd).as_fd(), part)?.ino;
        dir = LayerDir::child(&dir, Name::new(part)?, ino);
    }
}
