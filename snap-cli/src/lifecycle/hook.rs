//! What LXC calls when a container starts, has stopped, or is destroyed. Each may be called again at any
//! time: a reboot is a stop and a start.

use std::path::{Path, PathBuf};

use crate::container::mount::Then;
use crate::container::state::Lifetime;
use crate::container::state::Mounted;
use crate::container::{Container, Swap, destroy, external};
use crate::error::{Error, Kind, Result};
use crate::host::files;
use crate::host::process;
use crate::host::reach;
use crate::lxc::binding;
use crate::lxc::config;
use crate::recover;
use crate::shell::quoted;
use crate::snapshot::depth;
use crate::store::Store;
use crate::store::bytes::Blob;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::mount_points::{self, Closed};
use crate::store::outside::Lxc;
use cowl_layers::shown::Show as _;

/// The LXC container that calls, by LXC's environment.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Its name.
    pub name: String,
    /// Its config.
    pub config: PathBuf,
}

/// Who calls.
enum Who {
    /// The container itself.
    Itself,
    /// The container itself, which LXC has given another name or place.
    Moved(Lxc),
    /// A copy of its config, by which another container would write to its files.
    Copy,
}

fn who(manifest: &ContainerManifest, id: ContainerId, caller: &Caller) -> Result<Who> {
    let Some(link) = &manifest.lxc else {
        return Ok(Who::Copy);
    };
    let known = link.config();
    match (known.canonicalize(), caller.config.canonicalize()) {
        (Ok(known), Ok(called)) if known == called && link.name == caller.name => {
            return Ok(Who::Itself);
        }
        // Where it was there is nothing any more.
        (Err(error), Ok(called)) if error.kind() == std::io::ErrorKind::NotFound => {
            let text = files::read(&called)?;
            let lxcpath = called.parent().and_then(Path::parent);
            if let Some(lxcpath) = lxcpath
                && called.parent() == Some(&lxcpath.join(&caller.name))
                && config::names(&text, &id.to_string())
            {
                return Ok(Who::Moved(Lxc {
                    lxcpath: lxcpath.to_path_buf(),
                    name: caller.name.clone(),
                    ..link.clone()
                }));
            }
        }
        _ => {}
    }
    Ok(Who::Copy)
}

/// What a hook does with the container.
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

/// Before a start: mounts the container. Refused for a copy of it.
pub fn pre_start(store: &Store, id: ContainerId, caller: &Caller, limit: usize) -> Result<()> {
    let Some(mut container) = open(store, id, Purpose::Mount)? else {
        return Err(Error::not_found(format!(
            "the files of {} are gone: cowl has no container {id} in {} any more",
            caller.name,
            store.root().shown()
        ))
        .hint(format!("remove what is left: {}", quoted(&caller.config))));
    };
    match who(container.manifest(), id, caller)? {
        Who::Itself => {}
        Who::Moved(link) => {
            let next = ContainerManifest {
                lxc: Some(link),
                ..container.manifest().clone()
            };
            container.commit(next, None, |_| Ok(Swap::Done))?;
        }
        // A full copy that LXC's own tools made has a root file system of its own.
        Who::Copy if !stands_on(caller, id)? => return Ok(()),
        Who::Copy => {
            let name = container.name();
            return Err(Error::failed(format!(
                "{} would write to the files of {name}: its config is a copy ({})",
                caller.name,
                caller.config.shown()
            ))
            .hint(format!(
                "remove it (lxc-destroy does no harm to {name}), then type: cowl clone {name} {}",
                caller.name
            )));
        }
    }
    if let Mounted::Alive(state) = container.mounted()?
        && state.mountpoint != container.place()?
    {
        return Err(Error::busy(format!(
            "{} is mounted at {}",
            container.name(),
            state.mountpoint.shown()
        ))
        .hint(format!("unmount it: cowl umount {}", container.name())));
    }
    // Who starts containers only through LXC mounts them nowhere else.
    depth::keep(&mut container, limit, &mut |_| ());
    container.mount(None, Lifetime::UntilUnmounted)?;
    admit(container)
}

/// Has the container's root reach its files: LXC resolves their path with its rights.
fn admit(mut container: Container<'_>) -> Result<()> {
    let (store, id) = (container.store(), container.id());
    let Some(link) = container.manifest().lxc.clone() else {
        return Ok(());
    };
    let text = binding::read_config(&link)?;
    let place = binding::mount_point(store, id, &text);
    let Some((user, group)) = binding::mapped_root(&link, &text)? else {
        return Ok(());
    };
    if place == store.paths().mapped_dir(id) {
        mount_points::close_mnt(store.paths(), Closed::ToMappedRoots)?;
    } else {
        // Written by an older version, or the map was added since. LXC has read the config already: this start
        // goes through the place that all share; the next one finds a place of its own.
        mount_points::admit_to_mnt(store.paths(), group)?;
        let ours = binding::own_lines(store, id, container.name(), (&link, &text))?;
        container.write_config_with_next(Blob(config::attach(&text, &ours)));
        let next = container.manifest().clone();
        container.commit(next, None, |_| Ok(Swap::Done))?;
        recover::complete_outside(container)?;
    }
    if let Some(dir) = reach::blocked_for(&place, user, group)? {
        log::warn!(
            "uid {user}, the root of {}, cannot search {}: if LXC then cannot open the files, type: \
             chmod o+x {}",
            link.name,
            quoted(&dir),
            quoted(&dir)
        );
    }
    Ok(())
}

/// After a stop: unmounts the container. One that somebody else still uses stays mounted.
pub fn post_stop(store: &Store, id: ContainerId, caller: &Caller) -> Result<()> {
    let Some(container) = open(store, id, Purpose::Unmount)? else {
        return Ok(());
    };
    match who(container.manifest(), id, caller)? {
        Who::Itself | Who::Moved(_) => {
            mount_points::close_mnt(store.paths(), Closed::ToMappedRoots)?;
            container.unmount(Then::StayUnmounted).map(drop)
        }
        Who::Copy => Ok(()),
    }
}

/// Whether the caller's root file system is, or lies over, the container's.
fn stands_on(caller: &Caller, id: ContainerId) -> Result<bool> {
    let path = &caller.config;
    let text = files::read(path)?;
    let rootfs = config::get(&text, config::ROOTFS).unwrap_or_default();
    let id = id.to_string();
    let named = rootfs.windows(id.len()).any(|part| part == id.as_bytes());
    Ok(named || rootfs.is_empty())
}

/// When LXC destroys it: the container goes from the store, as by `cowl destroy`.
pub fn destroy(store: &Store, id: ContainerId, caller: &Caller) -> Result<()> {
    let Some(container) = open(store, id, Purpose::Unmount)? else {
        return Ok(());
    };
    let name = container.name();
    match who(container.manifest(), id, caller)? {
        // It would destroy the container, and then copy one of its own snapshots to that place.
        Who::Itself | Who::Moved(_) if process::is_descendant_of("lxc-snapshot") => {
            Err(Error::failed(format!(
                "{name} is cowl's: LXC's lxc-snapshot would throw away what it is now, and its snapshots"
            ))
            .hint(format!("type: cowl restore {name} SNAP (cowl list {name} shows them)")))
        }
        Who::Itself | Who::Moved(_) => destroy::destroy(container).map(drop),
        // It has no files of its own, so LXC leaves its folder, half made or not: nobody needs it.
        Who::Copy if stands_on(caller, id)? => external::remove_copy(&caller.config),
        Who::Copy => Ok(()),
    }
}
