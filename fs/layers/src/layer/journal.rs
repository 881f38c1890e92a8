//! The journal for linking a copied-up file under several names, which is not atomic.
//!
//! An entry consists of two files in the work directory: the inode to link, and a list of its paths. The next mount
//! completes the entries that an interrupted one left.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::{Layer, LayerDir, Staged, WorkDir};
use crate::error::{Error, Result};
use crate::name::Name;
use crate::sys;
use crate::sys::copy::Copied;
use crate::sys::order::Order;

const LIST: &[u8] = b"links-";
const INODE: &[u8] = b"inode-";

/// An entry on disk.
#[derive(Debug)]
pub struct JournalEntry {
    list: Vec<u8>,
    inode: Vec<u8>,
}

/// Writes an entry for linking `staged` at `paths`, which are relative to the root of the upper layer.
pub fn write(
    work: &Arc<WorkDir>,
    staged: Staged,
    paths: &[Vec<u8>],
    order: Order,
) -> Result<JournalEntry> {
    let suffix = staged.name().to_vec();
    let entry = JournalEntry {
        list: [LIST, &suffix].concat(),
        inode: [INODE, &suffix].concat(),
    };
    let (list, file) =
        work.stage(|dir, name| sys::node::create(dir, name, 0o600, OFlags::WRONLY))?;
    sys::copy::write_all(&file, &paths.join(&0), 0)?;
    order.content_first(&file, Copied::Written)?;
    staged.commit(work.fd(), &entry.inode)?;
    // The list makes the entry valid, so it is committed last: a list without its inode could not be completed.
    if let Err(error) = list.commit(work.fd(), &entry.list) {
        sys::node::unlink(work.fd(), &entry.inode)?;
        return Err(error);
    }
    // The entry must be durable before the first link.
    order.name_first(work.fd())?;
    Ok(entry)
}

impl JournalEntry {
    /// Returns the name, in the work directory, of the inode to link.
    pub fn inode_name(&self) -> &[u8] {
        &self.inode
    }

    /// Removes the entry after all links were created.
    pub fn remove(self, work: &WorkDir) -> Result<()> {
        // Remove the inode first: a list without an inode has no effect, so a crash in between is harmless.
        sys::node::unlink(work.fd(), &self.inode)?;
        sys::node::unlink(work.fd(), &self.list)
    }
}

/// Completes the entries that an interrupted mount left. To be called before the work directory is cleaned.
pub(super) fn finish(upper: &Arc<Layer>, work: &WorkDir) -> Result<()> {
    for entry in sys::dir::entries(work.fd())? {
        let Some(suffix) = entry.name.strip_prefix(LIST) else {
            continue;
        };
        let inode = [INODE, suffix].concat();
        let file = sys::content::open(work.fd(), &entry.name, OFlags::RDONLY)?;
        let mut list = Vec::new();
        std::io::Read::read_to_end(&mut std::fs::File::from(file), &mut list).map_err(|error| {
            Error::from(nix::errno::Errno::from_raw(
                error.raw_os_error().unwrap_or(5),
            ))
        })?;
        for path in list.split(|&byte| byte == 0) {
            link_if_free(upper, work, &inode, path)?;
        }
        sys::node::unlink(work.fd(), &entry.name)?;
        match sys::node::unlink(work.fd(), &inode) {
            Err(error) if !error.is_absent() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Creates one link, unless its name exists or its directory was removed.
///
/// The name exists if the link was created before the interruption, or if the name was hidden since.
fn link_if_free(upper: &Arc<Layer>, work: &WorkDir, inode: &[u8], path: &[u8]) -> Result<()> {
    let mut parts: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    let Some(last) = parts.pop() else {
        return Ok(());
    };
    let mut dir = upper.root_dir();
    for part in parts {
        let fd = dir.fd()?;
        match sys::stat::stat_at((*fd).as_fd(), part) {
            Ok(stat) if stat.kind() == sys::stat::FileKind::Directory => {
                dir = LayerDir::child(&dir, Name::new(part)?, stat.ino);
            }
            Ok(_) => return Ok(()),
            Err(error) if error.is_absent() => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    match sys::node::link(work.fd(), inode, (*dir.fd()?).as_fd(), last) {
        Ok(()) => Ok(()),
        Err(error) if error.errno() == crate::error::Errno::EXIST || error.is_absent() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::XattrSpace;
    use crate::layer::Upper;
    use std::os::unix::fs::MetadataExt;

    /// Interrupts the linking of one file under three names after each step.
    #[test]
    fn mount_completes_interrupted_operations() {
        for done in 0..=3 {
            let top = tempfile::tempdir().unwrap();
            let (u, w) = (top.path().join("u"), top.path().join("w"));
            std::fs::create_dir_all(u.join("d")).unwrap();
            std::fs::create_dir(&w).unwrap();
            let names: Vec<Vec<u8>> = vec![b"a".to_vec(), b"d/b".to_vec(), b"gone/c".to_vec()];
            {
                let upper = Upper::open(&u, &w, XattrSpace::detect()).unwrap();
                let (staged, file) = upper
                    .work
                    .stage(|dir, name| sys::node::create(dir, name, 0o644, OFlags::WRONLY))
                    .unwrap();
                sys::copy::write_all(&file, b"content", 0).unwrap();
                let entry = write(&upper.work, staged, &names, Order::Volatile).unwrap();
                let root = upper.layer.root_dir().fd().unwrap();
                if done >= 1 {
                    sys::node::link(upper.work.fd(), entry.inode_name(), (*root).as_fd(), b"a")
                        .unwrap();
                }
                if done >= 2 {
                    sys::node::link(upper.work.fd(), entry.inode_name(), (*root).as_fd(), b"d/b")
                        .unwrap();
                }
                if done >= 3 {
                    entry.remove(&upper.work).unwrap();
                }
            }
            let upper = Upper::open(&u, &w, XattrSpace::detect()).unwrap();
            let one = std::fs::metadata(u.join("a")).unwrap();
            let two = std::fs::metadata(u.join("d/b")).unwrap();
            assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
            assert_eq!(std::fs::read(u.join("a")).unwrap(), b"content");
            assert!(sys::dir::entries(upper.work.fd()).unwrap().is_empty());
        }
    }
}
