//! The daemon's side: what `cowl serve` does in the process that [`crate::container::mount`] started.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use cowlfs::config::Config;
use uuid::Uuid;

use crate::container::mount::report_ready;
use crate::container::state::{self, RunState};
use crate::container::{daemon, durability};
use crate::error::{Error, Result};
use crate::host;
use crate::recover;
use crate::store::Store;
use crate::store::disk::Filesystem;
use crate::store::lock::{Lock, Mode};
use crate::store::manifest::ContainerId;
use cowl_layers::shown::Show as _;

/// Cuts the process off from the shell that started it: descriptors that it left open, its session, its
/// working directory.
pub fn detach_from_shell() -> Result<()> {
    let lost = |error: std::io::Error| Error::failed("cannot leave the shell").because(error);
    let dir = std::fs::read_dir("/proc/self/fd").map_err(lost)?;
    let open: Vec<i32> = dir
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        match nix::unistd::close(fd) {
            // The listing's own descriptor is in the list, and closed by now.
            Ok(()) | Err(nix::errno::Errno::EBADF) => {}
            Err(error) => return Err(lost(error.into())),
        }
    }
    match rustix::process::setsid() {
        // Already the leader: started by a service manager, say.
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(error) => return Err(lost(error.into())),
    }
    if rustix::process::geteuid().is_root() {
        host::cgroup::leave();
    }
    std::env::set_current_dir("/").map_err(lost)
}

/// What a mount of a container is to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// Nobody asked for it but a command that runs in it.
    pub transient: bool,
    /// Set-user-ID programs and device nodes have no effect in it.
    pub nosuid: bool,
}

/// Mounts the container at `place` and serves it until it is unmounted.
pub fn serve(store: &Store, id: ContainerId, place: &Path, how: How) -> Result<()> {
    let session = store.session();
    // Before anything is written: its sync reports every error since, also the last one.
    let filesystem = durability::open_filesystem(store)?;
    let daemon = Uuid::new_v4();
    let lock = state::daemon_lock(store, id, daemon);
    let alive = Lock::take(&lock, Mode::Exclusive, &session.command, session.patience)?;
    let served = filesystem
        .try_clone()
        .and_then(|filesystem| serve_locked(store, id, (place, how), daemon, filesystem));
    alive.remove()?;
    served?;
    recover::end_after_serving(store, id)?;
    // The thread that did so ends with the session. Nobody waits for this process any more.
    durability::make_durable(store, id, &filesystem)
}

fn serve_locked(
    store: &Store,
    id: ContainerId,
    (place, how): (&Path, How),
    daemon: Uuid,
    filesystem: Filesystem,
) -> Result<()> {
    let Some(record) = store.container(id)? else {
        return Err(Error::not_found(format!("there is no container {id}")));
    };
    let manifest = record.body;
    let lowers = store.layer_trees(manifest.below_head())?;
    store.layer_trees(&[manifest.head])?;
    let upper = (
        store.paths().layer_tree(manifest.head),
        store.paths().layer_work(manifest.head),
    );
    let mut config = Config::new(lowers, Some(upper), place.to_path_buf());
    config.space = Some(store.space());
    config.control = Some(daemon::socket(store, id));
    config.snapshots = true;
    let (settle, told) = channel();
    config.settle = Some(settle);
    store.session().mounts.apply(&mut config);
    config.mount.source = manifest.name.to_string();
    config.mount.nosuid = how.nosuid;
    config.mount.nodev = how.nosuid;
    config.reach = vec![store.root().to_path_buf(), store.run().dir(id)];
    let mut state = RunState {
        pid: std::process::id(),
        mountpoint: place.to_path_buf(),
        daemon,
        boot: host::boot_id()?,
        transient: how.transient,
        nosuid: how.nosuid,
        replacing: false,
        device: None,
        store: Some(store.run().key().to_owned()),
    };
    log::info!("mounting {} at {}", manifest.name, place.shown());
    cowlfs::serve(config, |device| {
        state.device = Some(device);
        // Without the state the next command would not find the mount; it serves all the same. Each step is
        // taken whatever became of those before: the command that waits must not wait for ever.
        for done in [
            state::write(store, id, &state),
            let_go_of_lock(),
            report_ready(),
            settle_in_background(store, id, filesystem, told),
        ] {
            if let Err(error) = done {
                log::error!("{error}");
            }
        }
    })?;
    // Ended by umount(8), say: whoever ends it by cowl has seen to the state already.
    let left = state::read(store, id)?;
    if left.is_some_and(|left| left.daemon == daemon && !left.replacing) {
        state::remove(store, id)?;
    }
    log::info!("{} was unmounted", manifest.name);
    Ok(())
}

/// Starts the thread that makes the container's states durable. It ends with the process.
fn settle_in_background(
    store: &Store,
    id: ContainerId,
    filesystem: Filesystem,
    told: Receiver<()>,
) -> Result<()> {
    let store = Store::open(store.root(), store.session().clone())?;
    std::thread::Builder::new()
        .name("settle".to_owned())
        .spawn(move || durability::serve(&store, id, &filesystem, &told))
        .map(drop)
        .map_err(|error| Error::failed("cannot start a thread").because(error))
}

/// The standard input is the container's lock, held until others can see that it is mounted.
fn let_go_of_lock() -> Result<()> {
    let lost = |error: std::io::Error| Error::failed("cannot let go of the lock").because(error);
    let null = std::fs::File::open("/dev/null").map_err(lost)?;
    rustix::stdio::dup2_stdin(&null).map_err(|e| lost(e.into()))
}
