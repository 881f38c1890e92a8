//! Finds the daemon's mount in all mount namespaces. The daemon runs in a namespace of its own, which does not
//! contain the mount.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Mounter;
use cowl_layers::error::{Errno, Result};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::mountinfo::{self, Mount};
use cowl_layers::sys::namespace::{HASTY, Inside, MountNamespace, PATIENT};
use cowl_layers::sys::users::Device;

/// The time limit for detaching all copies together.
const TIME_LIMIT: Duration = Duration::from_secs(2);

/// The mount of the daemon.
#[derive(Clone, Debug)]
pub(crate) struct OwnMount {
    /// The mount point at which it was attached.
    pub(crate) path: PathBuf,
    /// The device number of its file system.
    pub(crate) device: Device,
    /// The process that mounted it.
    pub(crate) mounter: Mounter,
    /// Whether the modes of all directories above the mount point permit every user to enter them.
    is_public: bool,
    origin: Option<Origin>,
}

/// The properties by which the daemon recognizes its own mount.
#[derive(Clone, Debug)]
struct Origin {
    /// The inode number of the mount namespace in which it was attached.
    namespace: u64,
    /// The mount point, relative to the root of that namespace.
    at: PathBuf,
    /// The directory that it covers.
    covers: Option<(Device, PathBuf)>,
}

/// The kinds of mounts that concern the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The mount that the daemon attached.
    Own,
    /// A copy of it, created when a mount namespace or a tree of mounts was copied.
    Copy,
    /// A deliberate mount of the file system elsewhere.
    Bind,
    /// A kernel overlayfs with a layer in the mount.
    Overlay,
}

/// A mount of the daemon's file system, or of an overlay on it.
#[derive(Clone, Debug)]
pub(super) struct FoundMount {
    /// The namespace that contains it.
    pub(super) namespace: Arc<MountNamespace>,
    /// Its line of mountinfo.
    pub(super) mount: Mount,
    /// Its kind.
    pub(super) role: Role,
}

/// An [`OwnMount`] for another process. Paths are byte strings, because serde encodes a path as UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OwnMountRecord {
    path: OsString,
    device: Device,
    is_public: bool,
    origin: Option<OriginRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct OriginRecord {
    namespace: u64,
    at: OsString,
    covers: Option<(Device, OsString)>,
}

impl OwnMountRecord {
    /// Returns the mount, as the recording process recognizes it.
    pub(crate) fn into_mount(self, mounter: Mounter) -> OwnMount {
        let origin = self.origin.map(|origin| Origin {
            namespace: origin.namespace,
            at: origin.at.into(),
            covers: origin.covers.map(|(device, path)| (device, path.into())),
        });
        OwnMount {
            path: self.path.into(),
            device: self.device,
            mounter,
            is_public: self.is_public,
            origin,
        }
    }
}

impl OwnMount {
    /// Describes the mount for another process.
    pub(crate) fn to_record(&self) -> OwnMountRecord {
        let Self {
            path,
            device,
            mounter: _,
            is_public,
            origin,
        } = self;
        let origin = origin.as_ref().map(|origin| {
            let Origin {
                namespace,
                at,
                covers,
            } = origin;
            let covers = covers.as_ref();
            OriginRecord {
                namespace: *namespace,
                at: at.clone().into_os_string(),
                covers: covers.map(|(device, path)| (*device, path.clone().into_os_string())),
            }
        });
        OwnMountRecord {
            path: path.clone().into_os_string(),
            device: *device,
            is_public: *is_public,
            origin,
        }
    }

    /// Records the properties of a mount that was just attached, by this thread or in other namespaces.
    pub(crate) fn record(path: PathBuf, device: Device, mounter: Mounter) -> Self {
        let origin = match mounter {
            Mounter::Daemon => find_origin(&path, device).unwrap_or_else(|error| {
                log::warn!("cannot read mountinfo: {error}");
                None
            }),
            Mounter::Other => None,
        };
        Self {
            is_public: is_public(&path),
            path,
            device,
            mounter,
            origin,
        }
    }

    /// Whether a visible process lives in the namespace in which the mount was attached; `None` if that namespace is
    /// not known.
    pub(super) fn is_origin_visible(&self) -> Option<bool> {
        let (origin, namespaces) = (self.origin.as_ref()?, MountNamespace::all().ok()?);
        Some(namespaces.iter().any(|one| one.ino == origin.namespace))
    }

    /// Whether processes of a namespace may have used the mount as a layer of an overlay.
    ///
    /// mountinfo shows the path as the overlay's creator wrote it. A user may have written it for another directory, to
    /// prevent the unmount. So a namespace that a user has created counts only if users can reach the mount point.
    fn has_access(&self, namespace: &MountNamespace) -> bool {
        namespace.is_trusted() || self.is_public
    }

    /// Finds all mounts of the file system, and overlays on it, in the mount namespaces of all visible processes.
    /// Later mounts come first.
    ///
    /// A mount of another process is not among them: the namespace in which it is does not admit the daemon.
    pub(super) fn find_all(&self) -> Result<Vec<FoundMount>> {
        let mut found = Vec::new();
        if self.mounter == Mounter::Other {
            return Ok(found);
        }
        for namespace in MountNamespace::all()? {
            let namespace = Arc::new(namespace);
            let table = match namespace.inside(PATIENT, Inside::mounts) {
                Ok(table) => table,
                // The namespace's last process has ended, or this process lacks permission.
                Err(error) => {
                    log::debug!("mount namespace of pid {}: {error}", namespace.pid);
                    continue;
                }
            };
            // Set until the own mount is found in this namespace.
            let mut origin = self.origin.as_ref();
            origin = origin.filter(|origin| origin.namespace == namespace.ino);
            for mount in table.iter().rev() {
                let is_layer = |dir: &PathBuf| dir.starts_with(&self.path);
                let role = if mount.layers().iter().any(is_layer) && self.has_access(&namespace) {
                    Role::Overlay
                } else if mount.device != self.device {
                    continue;
                } else {
                    let covers = mountinfo::covered(&table, mount);
                    match (&self.origin, origin) {
                        (_, Some(own)) if own.at == mount.at && own.covers == covers => {
                            origin = None;
                            Role::Own
                        }
                        (Some(own), _) if covers.is_some() && own.covers == covers => Role::Copy,
                        _ => Role::Bind,
                    }
                };
                found.push(FoundMount {
                    namespace: namespace.clone(),
                    mount: mount.clone(),
                    role,
                });
            }
        }
        Ok(found)
    }
}

/// Whether the modes of all directories above a path permit every user to enter them.
///
/// To be called in the mount namespace in which the mount was attached.
fn is_public(path: &Path) -> bool {
    path.ancestors().skip(1).all(|dir| {
        let meta = std::fs::symlink_metadata(dir);
        meta.map_or(true, |meta| meta.mode() & 0o001 != 0)
    })
}

impl FoundMount {
    /// Runs `work` on the mount in its namespace.
    pub(super) fn run_inside<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl FnOnce(&Inside, &Mount) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mount = self.mount.clone();
        self.namespace
            .inside(patience, move |inside| work(inside, &mount))
    }
}

/// Returns the properties of the mount at `path`, or `None` if it is not in mountinfo.
fn find_origin(path: &Path, device: Device) -> Result<Option<Origin>> {
    let namespace = MountNamespace::own()?;
    let table = namespace.inside(PATIENT, Inside::mounts)?;
    // In a chroot, `path` is only the end of the path in mountinfo.
    let below = path.strip_prefix("/").unwrap_or(path);
    let is_it = |mount: &&Mount| mount.device == device && mount.at.ends_with(below);
    Ok(table.iter().rfind(is_it).map(|mount| Origin {
        namespace: namespace.ino,
        at: mount.at.clone(),
        covers: mountinfo::covered(&table, mount),
    }))
}

/// Detaches these mounts and returns how many remain.
///
/// A mount remains if it is locked, because a less privileged namespace inherited it, or if a file system on the path
/// to it does not answer.
pub(super) fn detach_all(found: &[FoundMount]) -> usize {
    let mut remaining = 0;
    let until = Instant::now() + TIME_LIMIT;
    for one in found {
        // A user who may create namespaces can create many that hang, so the limit covers them all.
        if Instant::now() >= until {
            remaining += 1;
            continue;
        }
        match one.run_inside(HASTY, Inside::detach) {
            Ok(()) => log::info!(
                "detached {} in the mount namespace of pid {}",
                one.mount.at.shown(),
                one.namespace.pid
            ),
            // It was unmounted in the meantime, together with its namespace or through propagation.
            Err(error) if matches!(error.errno(), Errno::STALE | Errno::NOENT) => {}
            Err(error) => {
                remaining += 1;
                log::info!(
                    "cannot detach {} in the mount namespace of pid {}: {error}",
                    one.mount.at.shown(),
                    one.namespace.pid
                );
            }
        }
    }
    remaining
}
