//! The daemon: `cowl serve`, in the process that [`crate::container::mount`] starts.

use std::cell::RefCell;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use cowlfs::config::{Config, MountPath, Passthrough, Successor};
use cowlfs::{Event, Takeover};
use uuid::Uuid;

use crate::container::in_lxc::{Arrived, Waiting};
use crate::container::launch::{release_output, report_ready};
use crate::container::served::{Owner, ServedMount};
use crate::container::state::{self, RunState};
use crate::container::{browse, daemon, dead, durability};
use crate::error::{Error, Result};
use crate::host;
use crate::lxc::{binding, passing};
use crate::recover;
use crate::store::Store;
use crate::store::disk::Filesystem;
use crate::store::lock::{Lock, Mode};
use crate::store::manifest::{ContainerId, ContainerManifest};
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::users::Device;
use cowl_overlay::idmap::{IdMap, IdRange};

/// Detaches the process from the shell that started it: inherited descriptors, session, working directory,
/// cgroup.
pub fn detach_from_shell() -> Result<()> {
    let failed =
        |error: std::io::Error| Error::failed("cannot detach from the shell").because(error);
    let dir = std::fs::read_dir("/proc/self/fd").map_err(failed)?;
    let open: Vec<i32> = dir
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        match nix::unistd::close(fd) {
            // The list contains the descriptor of the listing itself, which is closed already.
            Ok(()) | Err(nix::errno::Errno::EBADF) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    match rustix::process::setsid() {
        // The process is a session leader already, for example because a service manager started it.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(error) => return Err(failed(error.into())),
    }
    if rustix::process::geteuid().is_root() {
        host::cgroup::move_out(std::process::id());
    }
    std::env::set_current_dir("/").map_err(failed)
}

/// The options of a mount of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// Whether only a command that runs in the mount requested it.
    pub transient: bool,
    /// Whether set-user-ID programs and device nodes are disabled.
    pub nosuid: bool,
    /// Whether LXC mounts, in the namespaces of its container.
    pub in_lxc: bool,
    /// The files that are handled by passthrough; `None`: those of the settings.
    pub passthrough: Option<Passthrough>,
}

impl ServeOptions {
    fn apply(self, config: &mut Config) {
        config.mount.nosuid = self.nosuid;
        config.mount.nodev = self.nosuid;
        config.passthrough = self.passthrough.unwrap_or(config.passthrough);
    }
}

/// Mounts the container at `mountpoint` and serves it until it is unmounted.
pub fn serve(
    store: &Store,
    id: ContainerId,
    mountpoint: &Path,
    options: ServeOptions,
) -> Result<()> {
    let session = store.session();
    // Open this descriptor before any write: its sync reports every error since then, including the last.
    let filesystem = durability::open_filesystem(store)?;
    let daemon = Uuid::new_v4();
    let lock = state::daemon_lock(store, id, daemon);
    let alive = Lock::take(&lock, Mode::Exclusive, &session.command, session.patience)?;
    let held = Held { alive, filesystem };
    let served = serve_locked(store, id, (mountpoint, options), daemon, &held);
    held.release(store, id, served)
}

/// The resources that a daemon holds while it serves a container.
struct Held {
    /// The lock that shows that the daemon is alive.
    alive: Lock,
    /// Its sync reports every error since it was opened.
    filesystem: Filesystem,
}

impl Held {
    /// Returns how the process is started that takes over from this one.
    fn successor(&self, store: &Store, id: ContainerId, daemon: Uuid) -> Result<Successor> {
        let own = ServedMount::Container {
            container: id,
            daemon,
        };
        own.successor(store, vec![self.alive.share()?, self.filesystem.share()?])
    }

    /// Releases everything after the mount has ended.
    fn release(self, store: &Store, id: ContainerId, served: Result<()>) -> Result<()> {
        self.alive.remove()?;
        served?;
        recover::end_after_serving(store, id)?;
        // The thread that syncs ends with the session, and no process waits for this one any more.
        durability::make_durable(store, id, &self.filesystem)
    }
}

/// Continues the mount of the daemon that has started this process.
pub fn take_over(store: &Store) -> Result<()> {
    let takeover = Takeover::receive()?;
    match ServedMount::of_predecessor(&takeover)? {
        ServedMount::Container { container, daemon } => {
            take_over_container(store, container, daemon, takeover)
        }
        ServedMount::Snapshot { container, id } => {
            browse::take_over(store, container, id, takeover)
        }
    }
}

fn take_over_container(
    store: &Store,
    id: ContainerId,
    daemon: Uuid,
    mut takeover: Takeover,
) -> Result<()> {
    let descriptors = <[OwnedFd; 2]>::try_from(takeover.take_descriptors());
    let [lock, filesystem] =
        descriptors.map_err(|_| Error::failed("descriptors of the running daemon are missing"))?;
    let mut held = Held {
        alive: Lock::of_predecessor(&state::daemon_lock(store, id, daemon), lock),
        filesystem: durability::inherited_filesystem(store, filesystem),
    };
    let (settle, requests) = channel();
    let config = takeover.config_mut();
    config.settle = Some(settle);
    config.successor = Some(held.successor(store, id, daemon)?);
    let filesystem = held.filesystem.try_clone()?;
    // This process becomes the keeper, which lasts longer than the process that serves.
    let pid = std::process::id();
    let mut sync = Some((filesystem, requests));
    let mut owner = Owner::Predecessor;
    let served = takeover.serve(|event| {
        let mut steps = Vec::new();
        owner.note(&event);
        if let Event::GivenUp(reason) = event {
            steps.push(state::record_end(store, id, daemon, reason.to_string()));
            log_commands(store, id);
        }
        if let Event::TakenOver(device) | Event::Continued(device) = event {
            held.alive.record_holder(pid, &store.session().command);
            steps.push(adopt_state(store, id, daemon, (pid, device)));
            if let Some((filesystem, requests)) = sync.take() {
                steps.push(spawn_sync_thread(store, id, filesystem, requests));
            }
        }
        for error in steps.into_iter().filter_map(Result::err) {
            log::error!("{error}");
        }
    });
    let served = served.map_err(Error::from);
    if owner == Owner::Predecessor {
        return served;
    }
    let ended = served.and_then(|()| remove_state(store, id, daemon));
    held.release(store, id, ended)
}

/// Logs the commands with which a container continues whose mount has ended.
fn log_commands(store: &Store, id: ContainerId) {
    match store.container(id) {
        Ok(Some(record)) => {
            log::error!("{}", dead::commands(&record.body.name));
        }
        Ok(None) => {}
        Err(error) => log::error!("{error}"),
    }
}

/// Writes the process that lasts as long as the mount into its state.
///
/// A command may have changed the state since the mount began, so it is read again.
fn adopt_state(
    store: &Store,
    id: ContainerId,
    daemon: Uuid,
    (pid, device): (u32, Device),
) -> Result<()> {
    let Some(state) = state::read(store, id)?.filter(|state| state.daemon == daemon) else {
        return Err(Error::failed("the state of the mount is missing"));
    };
    if (state.pid, state.device) == (pid, Some(device)) {
        return Ok(());
    }
    let state = RunState {
        pid,
        device: Some(device),
        ..state
    };
    state::write(store, id, &state)
}

/// Removes the state of a mount that was ended by umount(8), for example. A cowl command that unmounts removes the state
/// itself.
fn remove_state(store: &Store, id: ContainerId, daemon: Uuid) -> Result<()> {
    let left = state::read(store, id)?;
    if left.is_some_and(|left| left.daemon == daemon && !left.replacing) {
        state::remove(store, id)?;
    }
    Ok(())
}

fn serve_locked(
    store: &Store,
    id: ContainerId,
    (mountpoint, options): (&Path, ServeOptions),
    daemon: Uuid,
    held: &Held,
) -> Result<()> {
    let Some(record) = store.container(id)? else {
        return Err(Error::not_found(format!("container {id} does not exist")));
    };
    let manifest = record.body;
    let mut config = configure(store, id, &manifest, mountpoint)?;
    let (settle, requests) = channel();
    config.settle = Some(settle);
    config.successor = Some(held.successor(store, id, daemon)?);
    let filesystem = held.filesystem.try_clone()?;
    options.apply(&mut config);
    let mut state = RunState {
        pid: std::process::id(),
        mountpoint: mountpoint.to_path_buf(),
        daemon,
        boot: host::boot_id()?,
        transient: options.transient,
        nosuid: options.nosuid,
        replacing: false,
        device: None,
        in_lxc: options.in_lxc,
        store: Some(store.run().key().to_owned()),
        passthrough: options.passthrough,
        kernel: None,
    };
    log::info!("mounting {} at {}", manifest.name, mountpoint.shown());
    let mut sync = Some((filesystem, requests));
    let waiting = match options.in_lxc {
        true => Some(prepare_in_lxc(store, id, &manifest, &mut config)?),
        false => None,
    };
    let hook = RefCell::new(None);
    let on = |event| {
        let mut spawn_sync = || match sync.take() {
            Some((filesystem, requests)) => spawn_sync_thread(store, id, filesystem, requests),
            None => Ok(()),
        };
        let steps = match event {
            Event::Mounted(device) => {
                state.device = Some(device);
                // Without the state file the next command would not find the mount, but the daemon can still serve it.
                // Each step runs even if an earlier one failed, because the command that waits must not wait forever.
                vec![
                    state::write(store, id, &state),
                    release_lock(),
                    match hook.take() {
                        Some(hook) => report_serving(hook),
                        None => report_ready(),
                    },
                    spawn_sync(),
                ]
            }
            Event::TakenOver(_) | Event::Continued(_) => vec![spawn_sync()],
            Event::Kept => {
                drop(hook.take());
                vec![release_lock(), release_output()]
            }
            Event::GivenUp(reason) => {
                log_commands(store, id);
                vec![state::record_end(store, id, daemon, reason.to_string())]
            }
        };
        for error in steps.into_iter().filter_map(Result::err) {
            log::error!("{error}");
        }
    };
    match waiting {
        None => cowlfs::serve(config, on)?,
        Some(waiting) => {
            // From here on, the start of the container continues, to the hook that mounts.
            let receive = || {
                let arrived = report_ready().and_then(|()| waiting.receive());
                let Arrived { mount, hook: from } =
                    arrived.map_err(|error| failed_mount(&error))?;
                hook.replace(Some(from));
                Ok(mount)
            };
            cowlfs::serve_passed(config, receive, on)?;
        }
    }
    remove_state(store, id, daemon)?;
    log::info!("{} was unmounted", manifest.name);
    Ok(())
}

/// Returns the configuration of a mount of the container, without the means by which it ends.
fn configure(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    mountpoint: &Path,
) -> Result<Config> {
    let lowers = store.layer_trees(manifest.below_head())?;
    store.layer_trees(&[manifest.head])?;
    let upper = (
        store.paths().layer_tree(manifest.head),
        store.paths().layer_work(manifest.head),
    );
    let mut config = Config::new(lowers, Some(upper), mountpoint.to_path_buf());
    config.path = MountPath::Exact;
    config.space = Some(store.space());
    config.control = Some(daemon::socket(store, id));
    config.manage();
    store.session().mounts.apply(&mut config);
    config.mount.source = manifest.name.to_string();
    config.reach = vec![store.root().to_path_buf(), store.run().dir(id)];
    Ok(config)
}

/// Sets the id map of the container, whose ids the requests of its processes have, and listens for its mount.
fn prepare_in_lxc(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
    config: &mut Config,
) -> Result<Waiting> {
    let Some(link) = &manifest.lxc else {
        return Err(Error::usage(format!(
            "{} is not an LXC container",
            manifest.name
        )));
    };
    let (file, text) = (link.config(), binding::read_config(link)?);
    let map = binding::id_map(&file, &text)?;
    let Some(root) = map.root_ids() else {
        return Err(Error::failed(format!(
            "lxc.idmap in {} does not map user 0 and group 0",
            file.shown()
        )));
    };
    let ranges = |ranges: &[[u32; 3]]| {
        let ranges = ranges.iter().map(|[mount, disk, count]| IdRange {
            mount: *mount,
            disk: *disk,
            count: *count,
        });
        IdMap::new(ranges.collect(), None)
    };
    config.overlay.uids = ranges(&map.users);
    config.overlay.gids = ranges(&map.groups);
    Waiting::listen(store, id, root)
}

fn failed_mount(error: &Error) -> SetupError {
    SetupError::new(SetupKind::Host, error.to_string(), "")
}

/// Reports to LXC's pre-mount hook that the mount is served.
fn report_serving(mut hook: UnixStream) -> Result<()> {
    hook.write_all(passing::SERVING)
        .map_err(|error| Error::failed("cannot report to LXC's hook").because(error))
}

/// Starts the thread that syncs the container's states.
///
/// It ends with the process.
fn spawn_sync_thread(
    store: &Store,
    id: ContainerId,
    filesystem: Filesystem,
    requests: Receiver<()>,
) -> Result<()> {
    let store = Store::open(store.root(), store.session().clone())?;
    std::thread::Builder::new()
        .name("settle".to_owned())
        .spawn(move || durability::serve(&store, id, &filesystem, &requests))
        .map(drop)
        .map_err(|error| Error::failed("cannot start a thread").because(error))
}

/// Releases the container's lock, which is standard input and is held until other commands can see the mount.
fn release_lock() -> Result<()> {
    let failed = |error: std::io::Error| Error::failed("cannot release the lock").because(error);
    let null = std::fs::File::open("/dev/null").map_err(failed)?;
    rustix::stdio::dup2_stdin(&null).map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use clap::Parser as _;
    use cowl_layers::format::XattrSpace;
    use cowlfs::cli::Args;

    use super::*;
    use crate::archive::image::Images;
    use crate::lifecycle::create::{ImportPolicy, Source, create};
    use crate::store::name::ContainerName;
    use crate::store::tests::session;
    use crate::tree::omissions::Unsupported;

    /// Benchmarks mount with `cowlfs -o managed`, and their results are quoted for containers.
    #[test]
    fn cowlfs_mounts_with_the_same_policy_if_managed() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        let store = Store::open_or_make(&dir.path().join("store"), session()).unwrap();
        let name = ContainerName::parse("web").unwrap();
        let policy = ImportPolicy {
            images: Images::Refuse,
            unsupported: Unsupported::Refuse,
        };
        create(&store, &name, Source::Path(&source), policy, &mut |_| {}).unwrap();
        let (id, record) = store.find(&name).unwrap();
        let ours = configure(&store, id, &record.body, "/mnt".as_ref()).unwrap();

        let mut options = std::ffi::OsString::from("managed");
        let (upper, work) = ours.upper.clone().unwrap();
        for (key, path) in [
            (",lowerdir=", ours.lowers.first().unwrap()),
            (",upperdir=", &upper),
            (",workdir=", &work),
            (",control=", ours.control.as_ref().unwrap()),
        ] {
            options.push(key);
            options.push(path);
        }
        if store.space() == XattrSpace::User {
            options.push(",userxattr");
        }
        let options = ["cowlfs".as_ref(), "-o".as_ref(), &*options, "/mnt".as_ref()];
        let mut managed = Args::parse_from(options).into_invocation().unwrap().config;
        // Neither belongs to the policy: the name in the mount table, and paths that are checked or stay reachable.
        managed.mount.source.clone_from(&ours.mount.source);
        managed.path = ours.path;
        managed.reach.clone_from(&ours.reach);
        // The option is absent if it is detected.
        managed.space = managed.space.or(Some(store.space()));
        assert_eq!(format!("{managed:?}"), format!("{ours:?}"));
    }
}
