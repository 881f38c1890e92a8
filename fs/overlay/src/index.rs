//! The kernel's index. Where kernel overlayfs (with `index=on`) copied up a file with several names, only
//! the name that was used got the copy; the others find it by an entry in the work folder's `index`,
//! named by the lower inode's handle. Here names find a file by what lies under them, so a mount first
//! gives the copy all the names that it shows under, and takes the entry out of the index. The kernel
//! reads the result as it reads any file with several names.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::{Op, Overlay};
use crate::inode::Alias;
use cowl_layers::error::Result;
use cowl_layers::format::origin::handle_of_entry;
use cowl_layers::layer::{Layer, LayerDir};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};

impl Overlay {
    /// Empties the upper's index of the kernel. To be called on an overlay that serves nobody yet, which
    /// has to be made anew afterwards: what it has looked up is out of date. False: there was none.
    pub fn take_over_index(&self) -> Result<bool> {
        let op = self.begin();
        let Some(upper) = op.cx.stack.writable().cloned() else {
            return Ok(false);
        };
        let Some(index) = upper.kernel_index()? else {
            return Ok(false);
        };
        let mut entries = Vec::new();
        for entry in sys::dir::entries(index.as_fd())? {
            // Folders and whiteouts are there for exports over NFS and say nothing that is needed.
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
        let lowers = op.lower_handles()?;
        for (entry, handle) in &entries {
            if let Some((layer, stat)) = lowers.get(handle) {
                op.link_from_index(index.as_fd(), entry, layer, stat)?;
            }
            // All its names are there: what is in the index is one too many.
            sys::node::unlink(index.as_fd(), entry)?;
        }
        log::info!("took over {} entries of the kernel's index", entries.len());
        Ok(true)
    }
}

/// Lower files with several names: their layer and what lies there, by their handles.
type ByHandle = HashMap<(i32, Vec<u8>), (Arc<Layer>, Stat)>;

impl Op<'_> {
    fn lower_handles(&self) -> Result<ByHandle> {
        let mut found = HashMap::new();
        for layer in self.cx.stack.view().layers() {
            if self.cx.stack.is_upper(layer) {
                continue;
            }
            for paths in self.scan_of(layer)?.links.values() {
                let Some(path) = paths.first() else { continue };
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
        let scan = self.scan_of(layer)?;
        for path in scan.links.get(&stat.ino).into_iter().flatten() {
            self.each_shown(layer, path, |parent, last| {
                let shows = match self.lookup(&parent, &last)? {
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
            let (_, up) = self.dir_up(&parent)?;
            self.keeping_times(&parent, &up, |fd| sys::node::link(index, entry, fd, &name))?;
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
