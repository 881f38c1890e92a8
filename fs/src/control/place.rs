//! Finding the daemon's mount again, in whatever mount namespace: the daemon itself lives in one of its own, where
//! the mount is not.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Errno, Result};
use crate::sys::namespace::{self, Inside, Mount, MountNamespace};
use crate::sys::users::Device;

/// The mount of a daemon.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Where it was attached.
    pub(crate) path: PathBuf,
    /// Its file system.
    pub(crate) device: Device,
    /// The mount namespace in which it was attached, by its number.
    home: Option<u64>,
    /// The directory that it covers.
    covers: Option<(Device, PathBuf)>,
}

/// What a mount of the daemon's file system is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The one that the daemon made.
    Own,
    /// A copy that came with a copy of the mount around it: of a namespace, or of a tree of mounts.
    Copy,
    /// One that was made on purpose, at another place.
    Bind,
}

/// A mount of the daemon's file system.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// Where.
    pub(super) namespace: Arc<MountNamespace>,
    /// Which.
    pub(super) mount: Mount,
    /// What it is.
    pub(super) role: Role,
}

impl Place {
    /// Notes what a mount that was attached just now, in the namespace of this thread, is known by.
    pub(crate) fn attached(path: PathBuf, device: Device) -> Self {
        let mut place = Self {
            path,
            device,
            home: None,
            covers: None,
        };
        match place.look() {
            Ok((home, covers)) => {
                place.home = Some(home);
                place.covers = covers;
            }
            Err(error) => log::warn!("cannot read the table of mounts: {error}"),
        }
        place
    }

    fn look(&self) -> Result<(u64, Option<(Device, PathBuf)>)> {
        let home = MountNamespace::own()?;
        let table = home.inside(Inside::mounts)?;
        let is_it = |mount: &&Mount| mount.device == self.device && mount.at == self.path;
        let covers = table
            .iter()
            .rfind(is_it)
            .and_then(|mount| namespace::covered(&table, mount));
        Ok((home.ino, covers))
    }

    /// Whether a visible process lives in the namespace where the mount was attached; `None` where that is not
    /// known.
    pub(super) fn sees_home(&self) -> Option<bool> {
        let (home, namespaces) = (self.home?, MountNamespace::all().ok()?);
        Some(namespaces.iter().any(|namespace| namespace.ino == home))
    }

    /// Finds all mounts of the file system in all namespaces that a visible process lives in, later ones
    /// first.
    pub(super) fn find(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for namespace in MountNamespace::all()? {
            let namespace = Arc::new(namespace);
            let table = match namespace.inside(Inside::mounts) {
                Ok(table) => table,
                // It ended meanwhile, or is beyond this process's rights.
                Err(error) => {
                    log::debug!("mount namespace of pid {}: {error}", namespace.pid);
                    continue;
                }
            };
            let mut own = self.home == Some(namespace.ino);
            for mount in table.iter().rev().filter(|m| m.device == self.device) {
                let covers = namespace::covered(&table, mount);
                let role = if covers.is_none() || covers != self.covers {
                    Role::Bind
                } else if own && mount.at == self.path {
                    own = false;
                    Role::Own
                } else {
                    Role::Copy
                };
                found.push(Found {
                    namespace: namespace.clone(),
                    mount: mount.clone(),
                    role,
                });
            }
        }
        Ok(found)
    }
}

impl Found {
    /// Runs `work` on the mount in its namespace.
    pub(super) fn act<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inside, &Mount) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mount = self.mount.clone();
        self.namespace.inside(move |inside| work(inside, &mount))
    }
}

/// Takes all of these mounts out of their trees, and returns how many stay: a mount is locked where a namespace
/// with less rights inherited it.
pub(super) fn detach_all(found: &[Found]) -> usize {
    let mut locked = 0;
    let mut hanging = None;
    for one in found {
        // Each try would take its time.
        if hanging == Some(one.namespace.ino) {
            locked += 1;
            continue;
        }
        match one.act(Inside::detach) {
            Ok(()) => log::info!(
                "detached {} in the mount namespace of pid {}",
                one.mount.at.display(),
                one.namespace.pid
            ),
            // Unmounted meanwhile, with its namespace or by propagation.
            Err(error) if matches!(error.errno(), Errno::STALE | Errno::NOENT) => {}
            Err(error) => {
                locked += 1;
                hanging = (error.errno() == Errno::TIMEDOUT).then_some(one.namespace.ino);
                log::info!(
                    "{} stays in the mount namespace of pid {}: {error}",
                    one.mount.at.display(),
                    one.namespace.pid
                );
            }
        }
    }
    locked
}
