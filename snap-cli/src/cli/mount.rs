//! `cowl mount` and `cowl umount`

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Context, Verb, output};
use crate::container::durability::{make_durable, open_filesystem};
use crate::container::mount::{AfterUnmount, Privileges};
use crate::container::state::Lifetime;
use crate::container::state::{self, Mounted};
use crate::container::{browse, detach, find_snapshot_ref};
use crate::error::{Error, Result};
use crate::recover::{self, DeadMount};
use crate::shell::quoted;
use crate::snapshot::resolve;
use crate::store::name::{Address, ContainerName};

/// Mount a container, or a snapshot to browse in it, and print where
///
/// The daemon runs in the background and outlives the shell; `cowl status NAME --json` names its log. On a full
/// disk, the space that the store has set aside is used.
/// A container that is mounted already stays as it is, and the place is printed. A snapshot is mounted
/// read-only, at as many places as you like, whatever becomes of the container; while it is, it can't
/// be removed. What a container is now can't be mounted read-only beside itself: snapshot it first, and
/// mount that.
///
/// Set-user-ID programs and device nodes have no effect in a snapshot, nor in a container that is mounted at a
/// DIR that other users can reach, unless --suid says so: the container's root may leave such programs for
/// users of this machine. `cowl exec` runs commands with them in any case.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The container, or the snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    address: OsString,
    /// An empty folder to mount it at [default: a place in the store]
    #[arg(value_name = "DIR", conflicts_with = "at")]
    dir: Option<PathBuf>,
    /// The same
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// Let set-user-ID programs and device nodes work at a DIR that other users can reach
    #[arg(long)]
    suid: bool,
    /// Read-only, as snapshots always are
    #[arg(long, visible_alias = "read-only")]
    ro: bool,
}

impl Verb for MountArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let address = Address::parse(&self.address)?;
        let name = &address.container;
        let at = self.dir.as_deref().or(self.at.as_deref());
        let store = context.store_of(name)?;
        let mut container = recover::open(&store, name)?;
        let place = match &address.snapshot {
            Some(_) if self.suid => {
                return Err(
                    Error::usage("set-user-ID programs never work in a mounted snapshot")
                        .hint("leave --suid out"),
                );
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
                    "{name} itself is not mounted read-only: it may be written to meanwhile"
                ))
                .hint(format!(
                    "mount a snapshot of it: cowl mount {name}@$(cowl snapshot {name}){dir}"
                )));
            }
            None => {
                context.keep_depth(&mut container);
                let privileges = match self.suid {
                    true => Privileges::Honored,
                    false => Privileges::WherePrivate,
                };
                let place =
                    container.mount(at.map(|at| (at, privileges)), Lifetime::UntilUnmounted)?;
                let nosuid = matches!(container.mounted()?, Mounted::Alive(state) if state.nosuid);
                if nosuid && self.suid {
                    return Err(Error::busy(format!(
                        "{name} is mounted at {} already, without set-user-ID programs",
                        quoted(&place)
                    ))
                    .hint(format!("unmount it first: cowl umount {name}")));
                }
                if nosuid {
                    output::note(&format!(
                        "other users can reach {}: set-user-ID programs and device nodes have no effect \
                         there (--suid mounts without this protection)",
                        quoted(&place)
                    ));
                }
                place
            }
        };
        output::place(&place)?;
        Ok(0)
    }

    /// Files are removed through a mount, too.
    fn frees(&self) -> bool {
        true
    }
}

/// Unmount a container, or what was mounted of a snapshot
///
/// Refused while anything in it is in use; the message names who uses it.
#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    /// The container; or the snapshot, wherever it is mounted; or a mount point, with a slash in it
    #[arg(value_name = "NAME[@SNAP]|DIR")]
    what: OsString,
    /// Kill a daemon that does not answer: what programs do in the mount fails from then on, and what
    /// they stored through mappings may be lost. One that answers unmounts as without this option
    #[arg(long)]
    force: bool,
}

impl Verb for UmountArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        if self.what.as_bytes().contains(&b'/') {
            return by_place(context, Path::new(&self.what), self.force);
        }
        let address = Address::parse(&self.what)?;
        let name = &address.container;
        let Some(snapshot) = &address.snapshot else {
            return head(context, name, self.force);
        };
        let store = context.store_of(name)?;
        let (container, _) = recover::open_to_unmount(&store, name)?;
        let id = find_snapshot_ref(container.manifest(), snapshot)?.id;
        let meant = |browse: &browse::SnapshotMount| browse.snapshot == id;
        let killed = match self.force {
            true => browse::kill_silent(&container, meant)?,
            false => 0,
        };
        if browse::close(&container, meant)? + killed == 0 {
            return Err(Error::failed(format!("{address} is not mounted"))
                .hint(format!("mount it with: cowl mount {address} DIR")));
        }
        Ok(0)
    }
}

fn head(context: &Context, name: &ContainerName, force: bool) -> Result<u8> {
    let store = context.store_of(name)?;
    let (mut container, mut dead) = recover::open_to_unmount(&store, name)?;
    if force && detach::kill_silent_daemon(&container)? {
        drop(container);
        (container, dead) = recover::open_to_unmount(&store, name)?;
    }
    let unmounted = container.unmount(AfterUnmount::StayUnmounted)?;
    if unmounted.is_none() && dead == DeadMount::Absent {
        return Err(Error::failed(format!("{name} is not mounted"))
            .hint(format!("mount it with: cowl mount {name}")));
    }
    let id = container.id();
    if recover::end_if_ephemeral(container)? {
        output::note(&format!("{name} was there for one mount, and is gone"));
        return Ok(0);
    }
    // Its daemon can no more, and the disk may be unmounted next.
    if let Err(error) = open_filesystem(&store).and_then(|fs| make_durable(&store, id, &fs)) {
        log::warn!("snapshots of {name} stay settling: {error}");
    }
    if let Some(state) = unmounted {
        detach::wait_for_exit(state.pid);
    }
    Ok(0)
}

/// Unmounts whatever of ours is mounted at a place.
fn by_place(context: &Context, at: &Path, force: bool) -> Result<u8> {
    // Where a daemon died the place itself can't be looked at any more.
    let place = match at.canonicalize() {
        Ok(place) => place,
        Err(_) => std::path::absolute(at).map_err(|e| Error::at("find", at, e))?,
    };
    for store in context.stores()? {
        for (id, record) in store.containers()? {
            // A damaged one is told by other commands.
            let Ok(record) = record else { continue };
            let name = &record.body.name;
            let mounted = match state::probe(&store, id)? {
                Mounted::Alive(state) | Mounted::Dead(state) => state.mountpoint == place,
                Mounted::No => false,
            };
            if mounted {
                return head(context, name, force);
            }
            let browsed = browse::mounts(&store, id)?;
            if browsed.iter().any(|browse| browse.mountpoint == place) {
                let (container, _) = recover::open_to_unmount(&store, name)?;
                let meant = |browse: &browse::SnapshotMount| browse.mountpoint == place;
                if force {
                    browse::kill_silent(&container, meant)?;
                }
                browse::close(&container, meant)?;
                return Ok(0);
            }
        }
    }
    Err(Error::not_found(format!(
        "nothing of this store is mounted at {}",
        output::shown(OsStr::as_bytes(at.as_os_str()))
    ))
    .hint("`cowl status` shows what is mounted where"))
}
