//! Adoption of the hard link index of kernel overlayfs.
//!
//! With `index=on`, kernel overlayfs copies up a file with several names only under the name that was used. The other
//! names find the copy through an entry in the `index` of the work directory, whose name is the file handle of the
//! lower inode. This overlay has no index. A mount first links the copy under all visible names of the file and removes
//! the entry. To the kernel, the result is an ordinary file with several hard links.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::copy_up::{CopyUp, preserve_times};
use crate::inode::Alias;
use crate::names::Links;
use crate::overlay::Overlay;
use crate::reach::Context;
use cowl_layers::error::{Errno, Result};
use cowl_layers::format::origin::handle_of_entry;
use cowl_layers::layer::{Layer, LayerDir};
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::{FileKind, Stat};

impl Overlay {
    /// Replaces the entries of the upper layer's kernel index by hard links; returns false if there are none.
    ///
    /// The overlay must not serve requests yet. If this returns true, it must be created again, because its inodes are
    /// stale.
    pub fn adopt_kernel_index(&self) -> Result<bool> {
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
            // Entries of directories and whiteouts exist only for NFS exports.
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
        let adoption = IndexAdoption {
            cx: services.cx,
            links: services.links(),
            copy_up: services.copy_up(),
        };
        let lowers = adoption.find_lower_files()?;
        for (entry, handle) in &entries {
            if let Some((layer, stat)) = lowers.get(handle) {
                adoption.link_from_index(index.as_fd(), entry, layer, stat)?;
            }
            // Without its entry, the kernel would add the recorded difference to a link count that is complete.
            let file = sys::dir::open_path(index.as_fd(), entry)?;
            let nlink = upper.layer.space().kernel_nlink().as_bytes();
            match sys::xattr::remove(file.as_fd(), nlink) {
                Err(error) if !matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => {
                    return Err(error);
                }
                _ => {}
            }
            // All names are linked, so the link of the index entry is surplus.
            sys::node::unlink(index.as_fd(), entry)?;
        }
        log::info!("adopted {} entries of the kernel's index", entries.len());
        Ok(true)
    }
}

/// The layer and the attributes of each lower file with several names, by file handle.
type LowerFilesByHandle = HashMap<(i32, Vec<u8>), (Arc<Layer>, Stat)>;

/// The adoption of index entries.
#[derive(Clone, Copy)]
struct IndexAdoption<'o> {
    cx: &'o Context<'o>,
    links: Links<'o>,
    copy_up: CopyUp<'o>,
}

impl IndexAdoption<'_> {
    /// Returns all lower files with several names.
    fn find_lower_files(&self) -> Result<LowerFilesByHandle> {
        let mut found = HashMap::new();
        for layer in self.cx.stack.view().layers() {
            if self.cx.stack.is_upper(layer) {
                continue;
            }
            for path in self.links.scan_layer(layer)?.files() {
                let fd = open_path_in(layer, path)?;
                if let Some(handle) = sys::handle::from_fd(fd.as_fd())? {
                    found.insert(handle, (layer.clone(), sys::stat::stat_fd(&fd)?));
                }
            }
        }
        Ok(found)
    }

    /// Links the file of an index entry under every name at which the lower file is visible.
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
                let is_visible = match self.links.names.lookup(&parent, &last)? {
                    Some(inode) if !inode.is_dir() => {
                        let file = inode.file()?;
                        Arc::ptr_eq(file.loc.dir.layer(), layer) && file.identity.ino == stat.ino
                    }
                    _ => false,
                };
                if is_visible {
                    names.push(Alias { parent, name: last });
                }
                Ok(())
            })?;
        }
        for Alias { parent, name } in names {
            let (_, up) = self.copy_up.copy_up_dir(&parent)?;
            let inodes = self.links.names.inodes;
            preserve_times(self.cx, inodes, &parent, &up, |fd| {
                sys::node::link(index, entry, fd, &name)
            })?;
        }
        Ok(())
    }
}

/// Opens an O_PATH descriptor of `path` in a layer.
fn open_path_in(layer: &Arc<Layer>, path: &[u8]) -> Result<std::os::fd::OwnedFd> {
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
