//! Finding the daemon's mount again, in whatever mount namespace: the daemon itself lives in one of its own, where
//! the mount is not.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Errno, Result};
use crate::shown::Show as _;
use crate::sys::mountinfo::{self, Mount};
use crate::sys::namespace::{HASTY, Inside, MountNamespace, PATIENT};
use crate::sys::users::Device;

/// How long all copies together may take to be detached.
const PATIENCE: Duration = Duration::from_secs(2);

/// The mount of a daemon.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Where it was attached.
    pub(crate) path: PathBuf,
    /// Its file system.
    pub(crate) device: Device,
    home: Option<Home>,
}

/// What the daemon's own mount is known by.
#[derive(Clone, Debug)]
struct Home {
    /// The mount namespace in which it was attached, by its number.
    namespace: u64,
    /// Where it is, seen from the root of that namespace.
    at: PathBuf,
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
    /// An overlay of the kernel's, with a layer in the mount.
    Overlay,
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
        let home = Self::home(&path, device).unwrap_or_else(|error| {
            log::warn!("cannot read the table of mounts: {error}");
            None
        });
        Self { path, device, home }
    }

    fn home(path: &Path, device: Device) -> Result<Option<Home>> {
        let namespace = MountNamespace::own()?;
        let table = namespace.inside(PATIENT, Inside::mounts)?;
        // Seen from a chroot the path is shorter.
        let below = path.strip_prefix("/").unwrap_or(path);
        let is_it = |mount: &&Mount| mount.device() == device && mount.at.ends_with(below);
        Ok(table.iter().rfind(is_it).map(|mount| Home {
            namespace: namespace.ino,
            at: mount.at.clone(),
            covers: mountinfo::covered(&table, mount),
        }))
    }

    /// Whether a visible process lives in the namespace where the mount was attached; `None` where that is not
    /// known.
    pub(super) fn sees_home(&self) -> Option<bool> {
        let (home, namespaces) = (self.home.as_ref()?, MountNamespace::all().ok()?);
        Some(namespaces.iter().any(|one| one.ino == home.namespace))
    }

    /// Finds all mounts of the file system, and overlays that lie on it, in all namespaces that a visible process
    /// lives in; later ones first.
    pub(super) fn find(&self) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for namespace in MountNamespace::all()? {
            let namespace = Arc::new(namespace);
            let table = match namespace.inside(PATIENT, Inside::mounts) {
                Ok(table) => table,
                // It ended meanwhile, or is beyond this process's rights.
                Err(error) => {
                    log::debug!("mount namespace of pid {}: {error}", namespace.pid);
                    continue;
                }
            };
            let mut home = self.home.as_ref();
            home = home.filter(|home| home.namespace == namespace.ino);
            for mount in table.iter().rev() {
                let role = if mount.layers().iter().any(|dir| dir.starts_with(&self.path)) {
                    Role::Overlay
                } else if mount.device() != self.device {
                    continue;
                } else {
                    let covers = mountinfo::covered(&table, mount);
                    match (&self.home, home) {
                        (_, Some(own)) if own.at == mount.at && own.covers == covers => {
                            home = None;
                            Role::Own
                        }
                        (Some(own), _) if covers.is_some() && own.covers == covers => Role::Copy,
                        _ => Role::Bind,
                    }
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
        patience: Duration,
        work: impl FnOnce(&Inside, &Mount) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mount = self.mount.clone();
        self.namespace
            .inside(patience, move |inside| work(inside, &mount))
    }
}

/// Takes all of these mounts out of their trees, and returns how many stay: a mount is locked where a namespace
/// with less rights inherited it, and out of reach where the way to it leads through a file system that does not
/// answer.
pub(super) fn detach_all(found: &[Found]) -> usize {
    let mut locked = 0;
    let until = Instant::now() + PATIENCE;
    for one in found {
        // Whoever can make namespaces can make many of that kind: all together get this long.
        if Instant::now() >= until {
            locked += 1;
            continue;
        }
        match one.act(HASTY, Inside::detach) {
            Ok(()) => log::info!(
                "detached {} in the mount namespace of pid {}",
                one.mount.at.shown(),
                one.namespace.pid
            ),
            // Unmounted meanwhile, with its namespace or by propagation.
            Err(error) if matches!(error.errno(), Errno::STALE | Errno::NOENT) => {}
            Err(error) => {
                locked += 1;
                log::info!(
                    "{} stays in the mount namespace of pid {}: {error}",
                    one.mount.at.shown(),
                    one.namespace.pid
                );
            }
        }
    }
    locked
}
