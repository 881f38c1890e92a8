//! Who has a snapshot mounted to read it. Each such mount holds a lock on every layer that it reads, for
//! as long as it lives; it need be on no list.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use cowl_layers::sys::flocks;

use crate::container::state::{self, Mounted};
use crate::error::{Error, Result};
use crate::store::Store;
use crate::store::layers;
use crate::store::manifest::LayerId;
use crate::wait::wait_until;

/// A daemon that was unmounted holds its locks for a moment more.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(20);

/// The locks on layers, as they are held at one moment.
#[derive(Debug, Default)]
struct Held {
    /// The inodes that each process has locked.
    by: HashMap<u32, HashSet<u64>>,
    /// The daemons of mounted containers.
    daemons: HashSet<u32>,
    /// The layers that those read and write.
    mounted: HashSet<LayerId>,
}

impl Held {
    fn look(store: &Store) -> Result<Self> {
        let mut held = Self::default();
        for (id, record) in store.containers()? {
            if let Mounted::Alive(state) = state::probe(store, id)? {
                held.daemons.insert(state.pid);
                // What can't be read explains no lock.
                held.mounted
                    .extend(record.into_iter().flat_map(|record| record.body.stack));
            }
        }
        let locks =
            flocks::read().map_err(|error| Error::at("read", Path::new("/proc/locks"), error))?;
        for lock in locks {
            held.by.entry(lock.pid).or_default().insert(lock.ino);
        }
        Ok(held)
    }

    /// The processes that read just this state; 0 stands for those that can't be seen from here.
    fn readers(&self, store: &Store, stack: &[LayerId]) -> Result<Vec<u32>> {
        let Some(top) = stack.first() else {
            return Ok(Vec::new());
        };
        let ino = inode(store, *top)?;
        let mut readers = Vec::new();
        let mut seen = false;
        for (pid, inodes) in &self.by {
            if !inodes.contains(&ino) {
                continue;
            }
            seen = true;
            // Who holds more layers than these serves a state further up.
            if !self.daemons.contains(pid) && self.layers(store, inodes)? == stack.len() {
                readers.push(*pid);
            }
        }
        if !seen && !self.mounted.contains(top) {
            readers.push(0);
        }
        readers.sort_unstable();
        Ok(readers)
    }

    /// How many of these inodes are layers' trees.
    fn layers(&self, store: &Store, inodes: &HashSet<u64>) -> Result<usize> {
        let mut layers = 0;
        for id in store.layer_ids()? {
            layers += usize::from(inodes.contains(&inode(store, id)?));
        }
        Ok(layers)
    }
}

fn inode(store: &Store, id: LayerId) -> Result<u64> {
    let tree = store.paths().layer_tree(id);
    match std::fs::symlink_metadata(&tree) {
        Ok(meta) => Ok(meta.ino()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::at("look at", &tree, error)),
    }
}

/// The processes that have this state of a snapshot mounted; 0 stands for those that can't be seen from
/// here. The mounts of containers count for nothing: what they stand on stays, whatever is removed.
pub fn of(store: &Store, stack: &[LayerId]) -> Result<Vec<u32>> {
    let Some(top) = stack.first() else {
        return Ok(Vec::new());
    };
    let mut readers = Vec::new();
    wait_until(Instant::now() + PATIENCE, PAUSE, || {
        readers = match layers::is_held(store, *top)? {
            true => Held::look(store)?.readers(store, stack)?,
            false => Vec::new(),
        };
        Ok::<_, Error>(readers.is_empty())
    })?;
    Ok(readers)
}
