//! The hooks that LXC calls when a container starts, has stopped, or is destroyed.
//!
//! Each hook may be called repeatedly: a reboot is a stop and a start.

use std::path::{Path, PathBuf};

use crate::container::mount::{AfterUnmount, MountRequest};
use crate::container::state::Lifetime;
use crate::container::state::Mounted;
use crate::container::{Container, Swap, destroy, external};
use crate::error::{Error, Kind, Result};
use crate::host::files;
use crate::host::process;
use crate::host::reach;
use crate::host::rootless;
use crate::lxc::binding;
use crate::lxc::config;
use crate::lxc::passing;
use crate::recover;
use crate::shell::quoted;
use crate::snapshot::depth::{self, MergeScope};
use crate::store::Store;
use crate::store::bytes::Blob;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::mount_points::{self, ClosedTo};
use crate::store::outside::Lxc;
use crate::store::paths::Paths;
use cowl_layers::shown::Show as _;

/// The LXC container that calls the hook, from LXC's environment.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The name.
    pub name: String,
    /// The path of the config.
    pub config: PathBuf,
}

/// The relation of the calling LXC container to a container of the store.
enum CallerKind {
    /// The container itself.
    Itself,
    /// The container itself, which was renamed or moved by LXC.
    Moved(Lxc),
    /// A container with a copy of the config, which would write to the same files.
    Copy,
}

/// Returns the relation of the calling LXC container to the container `id`.
fn identify_caller(
    manifest: &ContainerManifest,
    id: ContainerId,
    caller: &Caller,
) -> Result<CallerKind> {
    let Some(link) = &manifest.lxc else {
        return Ok(CallerKind::Copy);
    };
    let linked = link.config();
    match (linked.canonicalize(), caller.config.canonicalize()) {
        (Ok(linked), Ok(called)) if linked == called && link.name == caller.name => {
            return Ok(CallerKind::Itself);
        }
        // The config does not exist any more at the recorded path.
        (Err(error), Ok(called)) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = files::read(&called)?;
            let lxcpath = called.parent().and_then(Path::parent);
            if let Some(lxcpath) = lxcpath
                && called.parent() == Some(&lxcpath.join(&caller.name))
                && config::has_own_lines(&text, &id.to_string())
            {
                return Ok(CallerKind::Moved(Lxc {
                    lxcpath: lxcpath.to_path_buf(),
                    name: caller.name.clone(),
                    ..link.clone()
                }));
            }
        }
        _ => {}
    }
    Ok(CallerKind::Copy)
}

/// The purpose for which a hook opens the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Mount,
    Unmount,
}

fn open(store: &Store, id: ContainerId, purpose: Purpose) -> Result<Option<Container<'_>>> {
    let Some(record) = store.container(id)? else {
        return Ok(None);
    };
    let name = record.body.name;
    let opened = match purpose {
        Purpose::Unmount => recover::open_to_unmount(store, &name).map(|(container, _)| container),
        Purpose::Mount => recover::open(store, &name),
    };
    match opened {
        Ok(container) if container.id() == id => Ok(Some(container)),
        Ok(_) => Ok(None),
        Err(error) if error.kind == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The pre-start hook: mounts the container.
///
/// Fails for a copy of the container.
pub fn pre_start(store: &Store, id: ContainerId, caller: &Caller, limit: usize) -> Result<()> {
    let Some(mut container) = open(store, id, Purpose::Mount)? else {
        return Err(Error::not_found(format!(
            "the files of {} do not exist: there is no container {id} in {}",
            caller.name,
            store.root().shown()
        ))
        .hint(format!("remove its config: {}", quoted(&caller.config))));
    };
    match identify_caller(container.manifest(), id, caller)? {
        CallerKind::Itself => {}
        CallerKind::Moved(link) => {
            let next = ContainerManifest {
                lxc: Some(link),
                ..container.manifest().clone()
            };
            container.commit(next, None, |_| Ok(Swap::Done))?;
        }
        // A full copy by LXC's own tools has its own root filesystem.
        CallerKind::Copy if !depends_on(caller, id)? => return Ok(()),
        CallerKind::Copy => {
            let name = container.name();
            return Err(Error::failed(format!(
                "{} would write to the files of {name}: its config is a copy ({})",
                caller.name,
                caller.config.shown()
            ))
            .hint(format!(
                "destroy it with lxc-destroy, which does not affect {name}, then type: cowl clone {name} {}",
                caller.name
            )));
        }
    }
    if rootless::is_inside() {
        depth::enforce_limit(&mut container, limit, MergeScope::Unmounted, &mut |_| ());
        return container.start_in_lxc();
    }
    if let Mounted::Alive(state) = container.mounted()?
        && state.mountpoint != container.mount_point()?
    {
        return Err(Error::busy(format!(
            "{} is mounted at {}",
            container.name(),
            state.mountpoint.shown()
        ))
        .hint(format!("unmount it: cowl umount {}", container.name())));
    }
    // A container that is only started by LXC is not mounted otherwise.
    depth::enforce_limit(&mut container, limit, MergeScope::Unmounted, &mut |_| ());
    container.mount(MountRequest::of(Lifetime::UntilUnmounted))?;
    grant_access(container)
}

/// The pre-mount hook of a container of a plain user, in the namespaces of the container: mounts the container in the store
/// at `store`, and passes the mount to the daemon that the pre-start hook has started.
pub fn pre_mount(store: &Path, id: ContainerId, caller: &Caller) -> Result<()> {
    let paths = Paths::new(store);
    passing::pass_mount(
        &paths.mapped_socket(id),
        &paths.mapped_dir(id),
        &caller.name,
    )
}

/// Grants the container's root access to its files: LXC resolves their path with its permissions.
fn grant_access(mut container: Container<'_>) -> Result<()> {
    let (store, id) = (container.store(), container.id());
    let Some(link) = container.manifest().lxc.clone() else {
        return Ok(());
    };
    let text = binding::read_config(&link)?;
    let mountpoint = binding::mount_point(store, id, &text);
    let Some((user, group)) = binding::mapped_root(&link.config(), &text)? else {
        return Ok(());
    };
    if mountpoint == store.paths().mapped_dir(id) {
        mount_points::close_mnt(store.paths(), ClosedTo::MappedRoots)?;
    } else {
        // An older version wrote the config, or the id map was added later. LXC has read the config already, so
        // this start uses the shared directory of mount points. The next start uses the container's own.
        mount_points::admit_to_mnt(store.paths(), group)?;
        let ours = binding::own_lines(store, id, container.name(), (&link.config(), &text))?;
        container.write_config_with_next(Blob(config::attach(&text, &ours)));
        let next = container.manifest().clone();
        container.commit(next, None, |_| Ok(Swap::Done))?;
        recover::complete_outside(container)?;
    }
    if let Some(dir) = reach::blocked_for(&mountpoint, user, group)? {
        log::warn!(
            "uid {user}, the root of {}, cannot search {}; if LXC cannot open the files, type: \
             chmod o+x {}",
            link.name,
            quoted(&dir),
            quoted(&dir)
        );
    }
    Ok(())
}

/// The post-stop hook: unmounts the container, unless other processes still use it.
pub fn post_stop(store: &Store, id: ContainerId, caller: &Caller) -> Result<()> {
    let Some(container) = open(store, id, Purpose::Unmount)? else {
        return Ok(());
    };
    match identify_caller(container.manifest(), id, caller)? {
        CallerKind::Itself | CallerKind::Moved(_) => {
            mount_points::close_mnt(store.paths(), ClosedTo::MappedRoots)?;
            if rootless::is_inside() {
                return container.end_in_lxc();
            }
            container.unmount(AfterUnmount::StayUnmounted).map(drop)
        }
        CallerKind::Copy => Ok(()),
    }
}

/// Returns whether the caller's root filesystem is, or is based on, that of the container.
fn depends_on(caller: &Caller, id: ContainerId) -> Result<bool> {
    let path = &caller.config;
    let text = files::read(path)?;
    let rootfs = config::get(&text, config::ROOTFS).unwrap_or_default();
    let id = id.to_string();
    let named = rootfs.windows(id.len()).any(|part| part == id.as_bytes());
    Ok(named || rootfs.is_empty())
}

/// The destroy hook: destroys the container as `cowl destroy` does.
pub fn destroy(store: &Store, id: ContainerId, caller: &Caller) -> Result<()> {
    let Some(container) = open(store, id, Purpose::Unmount)? else {
        return Ok(());
    };
    let name = container.name();
    match identify_caller(container.manifest(), id, caller)? {
        // LXC's lxc-snapshot destroys the container before it copies a snapshot, which is one of the
        // container's own.
        CallerKind::Itself | CallerKind::Moved(_) if process::is_descendant_of("lxc-snapshot") => {
            Err(Error::failed(format!(
                "cannot restore {name} with LXC's lxc-snapshot: it would destroy the container and its \
                 snapshots"
            ))
            .hint(format!(
                "type: cowl restore {name} SNAP (list the snapshots with cowl list {name})"
            )))
        }
        CallerKind::Itself | CallerKind::Moved(_) => destroy::destroy(container).map(drop),
        // A copy without files of its own: LXC does not remove its directory, so remove that here.
        CallerKind::Copy if depends_on(caller, id)? => external::remove_copy(&caller.config),
        CallerKind::Copy => Ok(()),
    }
}
