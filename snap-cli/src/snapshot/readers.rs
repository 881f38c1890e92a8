//! Finds the processes that have a snapshot mounted for reading.
//!
//! Such a mount holds a shared lock on every layer that it reads, for its whole lifetime. It need not be
//! registered anywhere.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use cowl_layers::sys::flocks::{self, Flock};
use cowl_layers::sys::process;

use crate::container::state::{self, Mounted};
use crate::error::{Error, Result};
use crate::host::mountinfo;
use crate::store::Store;
use crate::store::held;
use crate::store::kernel::Driver;
use crate::store::layers;
use crate::store::manifest::LayerId;
use crate::wait::wait_until;

/// The time to wait for daemons to release their locks: they hold them for a moment after the unmount.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// A snapshot of the locks on layers.
#[derive(Debug, Default)]
struct LayerLocks {
    /// The inodes that each process has locked, by process id.
    inodes: HashMap<u32, HashSet<u64>>,
    /// The process ids of the daemons of mounted containers, and of their keepers.
    daemons: HashSet<u32>,
    /// The layers that those daemons use.
    mounted: HashSet<LayerId>,
    /// The inode that transfers lock. They retain the layers, whichever snapshots are removed.
    transfers: Option<u64>,
}

impl LayerLocks {
    fn read(store: &Store) -> Result<Self> {
        let mut locks = Self {
            transfers: held::inode_of_transfers(store)?,
            ..Self::default()
        };
        for (id, record) in store.containers()? {
            if let Mounted::Alive(state) = state::probe(store, id)?
                && state.driver() == Driver::Fuse
            {
                locks.daemons.insert(state.pid);
                locks.daemons.insert(process::same_program_below(state.pid));
                // An unreadable manifest accounts for no locks.
                locks
                    .mounted
                    .extend(record.into_iter().flat_map(|record| record.body.stack));
            }
        }
        let all =
            flocks::read().map_err(|error| Error::at("read", Path::new("/proc/locks"), error))?;
        // Another file system may have the same inode numbers. A chroot may hide the mount, and then all locks count.
        let device = mountinfo::find_containing(store.root())
            .map(|mount| mount.device)
            .ok();
        let is_here = |lock: &Flock| device.is_none_or(|device| device == lock.device);
        for lock in all.into_iter().filter(is_here) {
            locks.inodes.entry(lock.pid).or_default().insert(lock.ino);
        }
        Ok(locks)
    }

    /// Returns the processes that read exactly this state.
    ///
    /// 0 stands for processes in other PID namespaces.
    fn find_readers(&self, store: &Store, stack: &[LayerId]) -> Result<Vec<u32>> {
        let Some(top) = stack.first() else {
            return Ok(Vec::new());
        };
        let ino = read_inode(store, *top)?;
        let mut readers = Vec::new();
        let mut is_explained = false;
        for (pid, inodes) in &self.inodes {
            if !inodes.contains(&ino) {
                continue;
            }
            is_explained = true;
            if self.transfers.is_some_and(|mark| inodes.contains(&mark)) {
                continue;
            }
            // A process that has more layers locked serves a later state.
            if !self.is_of_daemon(*pid, ino) && self.count_layers(store, inodes)? == stack.len() {
                readers.push(*pid);
            }
        }
        if !is_explained && !self.mounted.contains(top) {
            readers.push(0);
        }
        readers.sort_unstable();
        Ok(readers)
    }

    /// Whether a lock on an inode belongs to the daemon of a container.
    ///
    /// The process that took it may have been killed. Its lock then belongs to the daemon that has taken its place.
    fn is_of_daemon(&self, pid: u32, ino: u64) -> bool {
        let is_inherited = || {
            let holders = flocks::holders(ino);
            holders.iter().any(|holder| self.daemons.contains(holder))
        };
        self.daemons.contains(&pid) || process::is_gone(pid) && is_inherited()
    }

    /// Returns the number of these inodes that are directories of layers.
    fn count_layers(&self, store: &Store, inodes: &HashSet<u64>) -> Result<usize> {
        let mut layers = 0;
        for id in store.layer_ids()? {
            layers += usize::from(inodes.contains(&read_inode(store, id)?));
        }
        Ok(layers)
    }
}

fn read_inode(store: &Store, id: LayerId) -> Result<u64> {
    let tree = store.paths().layer_tree(id);
    match std::fs::symlink_metadata(&tree) {
        Ok(meta) => Ok(meta.ino()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::at("inspect", &tree, error)),
    }
}

/// Returns the processes that have this state of a snapshot mounted.
///
/// 0 stands for processes in other PID namespaces. Mounts of containers are ignored: their layers are
/// retained, whichever snapshots are removed.
pub fn find_readers(store: &Store, stack: &[LayerId]) -> Result<Vec<u32>> {
    let Some(top) = stack.first() else {
        return Ok(Vec::new());
    };
    let mut readers = Vec::new();
    wait_until(Instant::now() + PATIENCE, PAUSE, || {
        readers = match layers::is_held(store, *top)? {
            true => LayerLocks::read(store)?.find_readers(store, stack)?,
            false => Vec::new(),
        };
        Ok::<_, Error>(readers.is_empty())
    })?;
    Ok(readers)
}
