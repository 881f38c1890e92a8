//! The commands `cowl mount` and `cowl umount`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cowlfs::config::Passthrough;

use super::{CliCommand, Context, output};
use crate::container::detach::Ending;
use crate::container::durability::{make_durable, open_filesystem};
use crate::container::mount::{AfterUnmount, MountRequest, Privileges};
use crate::container::state::Lifetime;
use crate::container::state::{self, Mounted};
use crate::container::{Container, browse, detach, find_snapshot_ref};
use crate::error::{Error, Result};
use crate::host::rootless;
use crate::recover::{self, DeadMount};
use crate::shell::quoted;
use crate::snapshot::depth::MergeScope;
use crate::snapshot::resolve;
use crate::store::containerd_ids::Abbreviation;
use crate::store::kernel::Driver;
use crate::store::name::ContainerName;

/// Mount a container or a snapshot, and print the mount point
///
/// The daemon runs in the background and outlives the shell; `cowl status NAME --json` prints the path of
/// its log. On a full disk, the space that the store reserves is used. If the container is already
/// mounted, only the mount point is printed.
///
/// A snapshot is mounted read-only, at any number of mount points, independently of the container. It
/// cannot be removed while it is mounted. A container itself cannot be mounted read-only: mount a
/// snapshot of it.
///
/// Set-user-ID programs and device nodes have no effect in a snapshot, nor in a container at a DIR that
/// other users can reach, unless --suid is given: the container's root could leave such programs for users
/// of this machine. They always work in `cowl exec`.
///
/// With `--driver kernel`, the container is mounted with kernel overlayfs, which is faster than a daemon.
/// While it is mounted this way, no snapshot can be taken, and its layers cannot be merged; `cowl diff`
/// and other commands that read the layers may show the previous content of a file with several hard
/// links.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The container or the snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    address: OsString,
    /// The mount point, an empty directory [default: a directory in the store]
    #[arg(value_name = "DIR", conflicts_with = "at")]
    dir: Option<PathBuf>,
    /// The mount point, as DIR
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// Enable set-user-ID programs and device nodes at a DIR that other users can reach
    #[arg(long)]
    suid: bool,
    /// Disable set-user-ID programs and device nodes at DIR, also if no other user can reach it
    #[arg(long, conflicts_with = "suid")]
    nosuid: bool,
    /// Mount a container with this driver [default: the setting `driver`]
    #[arg(long, value_enum, value_name = "DRIVER")]
    driver: Option<DriverChoice>,
    /// Select the files of a container that the kernel reads and writes without the daemon [default: the
    /// setting `passthrough`]
    #[arg(long, value_enum, value_name = "FILES")]
    passthrough: Option<PassthroughChoice>,
    /// Do not print the mount point
    #[arg(long, hide = true)]
    silent: bool,
    /// Mount read-only; always the case for a snapshot
    #[arg(long, visible_alias = "read-only")]
    ro: bool,
}

/// The files that the kernel reads and writes without requests to the daemon
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum PassthroughChoice {
    /// Like "read", because snapshots can be taken of a container
    Auto,
    /// Also files that were changed, which a snapshot copies while they are open; for stores on XFS and btrfs
    All,
    /// Programs, libraries and other files that are replaced rather than changed
    Read,
    /// None
    Off,
}

impl PassthroughChoice {
    /// Returns the option of the mount.
    pub(super) fn passthrough(self) -> Passthrough {
        match self {
            Self::Auto => Passthrough::Auto,
            Self::All => Passthrough::All,
            Self::Read => Passthrough::Read,
            Self::Off => Passthrough::Off,
        }
    }
}

/// The program that merges the layers
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum DriverChoice {
    /// A daemon of cowl
    Fuse,
    /// Kernel overlayfs
    Kernel,
}

impl DriverChoice {
    /// Returns the driver.
    pub(super) fn driver(self) -> Driver {
        match self {
            Self::Fuse => Driver::Fuse,
            Self::Kernel => Driver::Kernel,
        }
    }
}

impl CliCommand for MountArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let address = context.address(&self.address)?;
        let name = &address.container;
        let at = self.dir.as_deref().or(self.at.as_deref());
        let store = context.store_for(name)?;
        let mut container = recover::open(&store, name)?;
        let mountpoint = match &address.snapshot {
            Some(_) if self.suid => {
                return Err(Error::usage(
                    "cannot enable set-user-ID programs in a mounted snapshot",
                )
                .hint("omit --suid"));
            }
            Some(_) if self.driver == Some(DriverChoice::Kernel) => {
                return Err(
                    Error::usage("snapshots are always mounted with the driver fuse")
                        .hint("omit --driver"),
                );
            }
            Some(_) if self.passthrough.is_some() => {
                return Err(Error::usage(
                    "a snapshot is never written to, so it has no choice of passthrough",
                )
                .hint("omit --passthrough"));
            }
            Some(snapshot) => {
                if let Some(why) = resolve(&store, &address)?.describe_loss(&store)? {
                    log::warn!("{why}");
                }
                browse::open(&container, snapshot, at)?
            }
            None if self.ro => {
                let dir = at.map(|at| format!(" {}", quoted(at))).unwrap_or_default();
                return Err(Error::usage(format!(
                    "cannot mount {name} read-only: only snapshots are mounted read-only"
                ))
                .hint(format!(
                    "mount a snapshot of it: cowl mount {name}@$(cowl snapshot {name}){dir}"
                )));
            }
            None if self.nosuid && at.is_none() => {
                return Err(Error::usage("--nosuid needs a DIR"));
            }
            None => {
                context.limit_depth(&mut container, MergeScope::Unmounted);
                self.mount_container(&mut container, at)?
            }
        };
        if !self.silent {
            output::print_path(&mountpoint)?;
            if rootless::has_entered() {
                output::print_note(&format!(
                    "the mount is visible only in the namespace of your user: cowl unshare ls {}",
                    quoted(&mountpoint)
                ));
            }
        }
        Ok(0)
    }

    /// A mount is needed to remove files in a container.
    fn frees_space(&self) -> bool {
        true
    }
}

impl MountArgs {
    /// Mounts a container, not a snapshot. Returns the mount point.
    fn mount_container(&self, container: &mut Container<'_>, at: Option<&Path>) -> Result<PathBuf> {
        let name = container.name().clone();
        let privileges = match (self.suid, self.nosuid) {
            (true, _) => Privileges::Honored,
            (false, true) => Privileges::Denied,
            (false, false) => Privileges::WherePrivate,
        };
        let mountpoint = container.mount(MountRequest {
            at: at.map(|at| (at, privileges)),
            lifetime: Lifetime::UntilUnmounted,
            driver: self.driver.map(DriverChoice::driver),
            passthrough: self.passthrough.map(PassthroughChoice::passthrough),
        })?;
        let nosuid = matches!(container.mounted()?, Mounted::Alive(state) if state.nosuid);
        if self.nosuid && !nosuid {
            return Err(Error::busy(format!(
                "{name} is already mounted at {} with set-user-ID programs",
                quoted(&mountpoint)
            ))
            .hint(format!("unmount it first: cowl umount {name}")));
        }
        if nosuid && self.suid {
            return Err(Error::busy(format!(
                "{name} is already mounted at {} without set-user-ID programs",
                quoted(&mountpoint)
            ))
            .hint(format!("unmount it first: cowl umount {name}")));
        }
        if nosuid && !self.nosuid {
            output::print_note(&format!(
                "other users can reach {}: set-user-ID programs and device nodes have no effect \
                 there (--suid enables them)",
                quoted(&mountpoint)
            ));
        }
        Ok(mountpoint)
    }
}

/// Unmount a container or a snapshot
///
/// Refused while a process uses the mount; the message names the processes.
#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    /// The container; or the snapshot, at all its mount points; or a mount point, with a slash in it
    #[arg(value_name = "NAME[@SNAP]|DIR")]
    target: OsString,
    /// Kill the daemon if it does not respond: later accesses to the mount fail, and data written through
    /// memory mappings may be lost
    #[arg(long)]
    force: bool,
}

impl UmountArgs {
    fn ending(&self) -> Ending {
        match self.force {
            true => Ending::Forced,
            false => Ending::Orderly,
        }
    }
}

impl CliCommand for UmountArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let is_id = || match self.target.to_str() {
            Some(text) if !Path::new(text).try_exists().unwrap_or(true) => {
                let id = text.split_once('@').map_or(text, |(id, _)| id);
                context.by_id(id, Abbreviation::Accepted)
            }
            _ => Ok(None),
        };
        if self.target.as_bytes().contains(&b'/') && is_id()?.is_none() {
            return umount_path(context, Path::new(&self.target), self.ending());
        }
        let address = context.address(&self.target)?;
        let name = &address.container;
        let Some(snapshot) = &address.snapshot else {
            return umount_container(context, name, self.ending());
        };
        let store = context.store_for(name)?;
        let (container, _) = recover::open_to_unmount(&store, name)?;
        let id = find_snapshot_ref(container.manifest(), snapshot)?.id;
        let matches = |browse: &browse::SnapshotMount| browse.snapshot == id;
        if browse::close(&container, self.ending(), matches)? == 0 {
            return Err(Error::failed(format!("{address} is not mounted"))
                .hint(format!("mount it with: cowl mount {address} DIR")));
        }
        Ok(0)
    }
}

fn umount_container(context: &Context, name: &ContainerName, ending: Ending) -> Result<u8> {
    let store = context.store_for(name)?;
    let (mut container, mut dead) = recover::open_to_unmount(&store, name)?;
    if ending == Ending::Forced && detach::kill_silent_daemon(&container)? {
        drop(container);
        (container, dead) = recover::open_to_unmount(&store, name)?;
    }
    let servers = match ending {
        Ending::Forced => Some(detach::find_servers(&container)?),
        Ending::Orderly => None,
    };
    let unmounted = container.unmount(AfterUnmount::StayUnmounted)?;
    if let Some(servers) = servers {
        servers.kill_stopped()?;
    }
    if unmounted.is_none() && dead == DeadMount::Absent {
        return Err(Error::failed(format!("{name} is not mounted"))
            .hint(format!("mount it with: cowl mount {name}")));
    }
    let id = container.id();
    if recover::end_if_ephemeral(container)? {
        output::print_note(&format!("removed {name}, which existed for one mount"));
        return Ok(0);
    }
    // The daemon has ended and cannot sync, and the disk may be unmounted next.
    if let Err(error) = open_filesystem(&store).and_then(|fs| make_durable(&store, id, &fs)) {
        log::warn!("cannot sync settling snapshots of {name}: {error}");
    }
    if let Some(state) = unmounted {
        detach::wait_for_exit(state.pid);
    }
    Ok(0)
}

/// Unmounts the container or snapshot that is mounted at `path`.
fn umount_path(context: &Context, path: &Path, ending: Ending) -> Result<u8> {
    // The mount point of a dead daemon cannot be resolved: every access fails.
    let mountpoint = match path.canonicalize() {
        Ok(resolved) => resolved,
        Err(_) => std::path::absolute(path).map_err(|e| Error::at("resolve", path, e))?,
    };
    for store in context.stores()? {
        for (id, record) in store.containers()? {
            // Other commands report damaged manifests.
            let Ok(record) = record else { continue };
            let name = &record.body.name;
            let mounted = match state::probe(&store, id)? {
                Mounted::Alive(state) | Mounted::Dead(state) => state.mountpoint == mountpoint,
                Mounted::No => false,
            };
            if mounted {
                return umount_container(context, name, ending);
            }
            let browsed = browse::mounts(&store, id)?;
            let matches = |browse: &browse::SnapshotMount| browse.mountpoint == mountpoint;
            if browsed.iter().any(matches) {
                let (container, _) = recover::open_to_unmount(&store, name)?;
                browse::close(&container, ending, matches)?;
                return Ok(0);
            }
        }
    }
    Err(Error::not_found(format!(
        "no container or snapshot is mounted at {}",
        output::shown(OsStr::as_bytes(path.as_os_str()))
    ))
    .hint("list all mounts: cowl status"))
}
