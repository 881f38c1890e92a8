//! Mounts of kernel overlayfs (docs/decisions/0038).
//!
//! There is no daemon, so no process and no lock shows that a container is mounted. The kernel refuses a second mount of
//! the same head, which answers the question after any kill. So the file system is created first, then its use is
//! recorded, and only then is it attached: a command that is killed in between leaves no mount without a record.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::dir;
use cowl_layers::sys::overlay::{self, MarkerNames, OverlayLayers, PreparedOverlay, Refusal};
use cowlfs::config::Passthrough;
use cowlfs::control::KernelMount;
use uuid::Uuid;

use super::state::{self, KernelState, Lifetime, Mounted, RunState};
use super::{Container, kernel_layers};
use crate::error::{Error, Result};
use crate::host;
use crate::host::users::Device;
use crate::host::{files, mountinfo};
use crate::store::Store;
use crate::store::kernel::{self, Driver, KernelPhase, KernelUse};
use crate::store::manifest::{ContainerManifest, LayerId};
use crate::store::reserve;
use crate::wait::wait_until;

/// The interval between questions to the kernel whether a file system has ended.
const PAUSE: Duration = Duration::from_millis(10);
/// The time in which an unmounted file system may end.
const END_TIMEOUT: Duration = Duration::from_secs(3);

/// The properties of a new mount.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartOptions {
    pub(super) lifetime: Lifetime,
    /// Whether set-user-ID programs and device nodes have no effect.
    pub(super) nosuid: bool,
    pub(super) driver: Driver,
    /// The passthrough of a daemon; `None`: that of the settings.
    pub(super) passthrough: Option<Passthrough>,
}

/// The layers of a stack, open for reading.
struct OpenedStack {
    lowers: Vec<OwnedFd>,
    upper: OwnedFd,
    work: OwnedFd,
}

impl OpenedStack {
    /// Opens the layers without following symbolic links below the store.
    fn open(store: &Store, manifest: &ContainerManifest) -> Result<Self> {
        let layers = store.paths().layers();
        let root = dir::open_root(&layers).map_err(|e| Error::at("open", &layers, e))?;
        let open = |id: LayerId, name: &str| {
            let layer = dir::open_dir(root.as_fd(), id.to_string().as_bytes());
            layer
                .and_then(|layer| dir::open_dir_to_read(layer.as_fd(), name.as_bytes()))
                .map_err(|e| Error::at("open the layer", &store.paths().layer_dir(id), e))
        };
        let lowers = manifest.below_head().iter().map(|id| open(*id, "tree"));
        Ok(Self {
            lowers: lowers.collect::<Result<_>>()?,
            upper: open(manifest.head, "tree")?,
            work: open(manifest.head, "work")?,
        })
    }
}

/// Mounts a container, which must be settled, at `at`.
pub(super) fn mount(container: &Container<'_>, at: &Path, options: StartOptions) -> Result<()> {
    let (store, id, manifest) = (container.store(), container.id(), container.manifest());
    kernel_layers::prepare(store, manifest)?;
    let stack = OpenedStack::open(store, manifest)?;
    let layers = OverlayLayers {
        source: manifest.name.as_str(),
        lowers: &stack.lowers,
        upper: stack.upper.as_fd(),
        work: stack.work.as_fd(),
        markers: match store.space() {
            XattrSpace::Trusted => MarkerNames::Trusted,
            XattrSpace::User => MarkerNames::User,
        },
    };
    let privileges = match options.nosuid {
        true => overlay::Privileges::Denied,
        false => overlay::Privileges::Honored,
    };
    let prepared = match PreparedOverlay::new(layers, privileges) {
        // The store is a copy, or was restored from a backup.
        Err(refusal) if refusal.error.errno() == Errno::STALE => {
            kernel_layers::forget_handles(store, manifest.head)?;
            PreparedOverlay::new(layers, privileges)
        }
        done => done,
    };
    let prepared = prepared.map_err(|refusal| describe(manifest, refusal))?;
    let device = prepared
        .device()
        .map_err(|error| Error::at("inspect the mount for", at, error))?;
    let mut record = KernelUse {
        phase: KernelPhase::Mounted,
        lowers: manifest.below_head().to_vec(),
        release: kernel::release(),
    };
    kernel::write(store, manifest.head, &record)?;
    // Until the mount is attached, the next command would have to make it again.
    let replacing = state::read(store, id)?.is_some_and(|before| before.replacing);
    let mut run = RunState {
        pid: 0,
        mountpoint: at.to_path_buf(),
        daemon: Uuid::new_v4(),
        boot: host::boot_id()?,
        in_lxc: false,
        transient: options.lifetime == Lifetime::OfCommand,
        nosuid: options.nosuid,
        replacing,
        device: Some(device),
        store: Some(store.run().key().to_owned()),
        passthrough: None,
        kernel: Some(KernelState {
            head: manifest.head,
            mount: None,
        }),
    };
    let attached = state::write(store, id, &run).and_then(|()| {
        prepared
            .attach(at)
            .map_err(|error| Error::at("mount at", at, error))
    });
    if let Err(error) = attached {
        // Nothing was written through it.
        drop(prepared);
        state::remove(store, id)?;
        record.phase = KernelPhase::Settled;
        kernel::write(store, manifest.head, &record)?;
        return Err(error);
    }
    run.replacing = false;
    run.kernel = Some(KernelState {
        head: manifest.head,
        mount: Some(KernelMount::record(at.to_path_buf(), device)),
    });
    state::write(store, id, &run)?;
    if run.lifetime() == Lifetime::UntilUnmounted && !has_index(device)? {
        log::warn!(
            "the kernel mounts {} without an index, as always in a user namespace: if a file with several hard links is \
             changed under one name, that name becomes a separate file",
            manifest.name
        );
    }
    Ok(())
}

/// Whether a mount of overlayfs in this namespace has an index. The mount table omits the default of the module.
fn has_index(device: Device) -> Result<bool> {
    let mounts = mountinfo::read()?;
    let options = mounts.iter().find(|mount| mount.device == device);
    let options = options.map_or(&[][..], |mount| mount.options.as_slice());
    let has = |option: &[u8]| options.split(|byte| *byte == b',').any(|it| it == option);
    if has(b"index=on") || has(b"index=off") {
        return Ok(has(b"index=on"));
    }
    let default = files::read_opt(Path::new("/sys/module/overlay/parameters/index"))?;
    Ok(default.is_some_and(|value| value.starts_with(b"Y")))
}

/// Returns the error for a mount that the kernel refused.
fn describe(manifest: &ContainerManifest, refusal: Refusal) -> Error {
    let name = &manifest.name;
    let errno = refusal.error.errno();
    let what = format!("the kernel refuses to mount {name} with overlayfs");
    let message = refusal.message.as_slice();
    let error = match errno {
        Errno::BUSY => Error::busy(what),
        _ => Error::failed(what),
    };
    let error = match message.is_empty() {
        true => error.because(refusal.error),
        false => error.because(format!("{} ({})", refusal.error, message.shown())),
    };
    let fallback = "or use the default driver: --driver fuse";
    error.hint(match errno {
        Errno::NODEV => format!("load the module (modprobe overlay), {fallback}"),
        Errno::PERM | Errno::ACCESS => {
            format!("mount it as root, or in a user namespace on Linux 5.11 or later, {fallback}")
        }
        Errno::BUSY => "unmount it where it is mounted (umount PATH)".to_owned(),
        Errno::TOOBIG => format!("merge layers (cowl flatten {name}), {fallback}"),
        _ => format!("read the reason in the kernel's log (dmesg), {fallback}"),
    })
}

/// Returns the mount of kernel overlayfs, as [`KernelMount::detach`] needs it; `None` for other drivers.
pub(super) fn find_mount(state: &RunState) -> Result<Option<KernelMount>> {
    let Some(kernel) = &state.kernel else {
        return Ok(None);
    };
    Ok(match (&kernel.mount, state.device) {
        (Some(mount), _) => Some(mount.clone()),
        // The command that mounted it was killed before it recorded the mount.
        (None, Some(device)) => Some(KernelMount::record(state.mountpoint.clone(), device)),
        (None, None) => None,
    })
}

/// Waits for the end of an unmounted file system, and settles the head. Does nothing for other drivers.
pub(super) fn finish_unmount(container: &Container<'_>, state: &RunState) -> Result<()> {
    if state.driver() != Driver::Kernel {
        return Ok(());
    }
    // The unmounted head must be settled also on a full disk.
    reserve::release_if_full(container.store())?;
    wait_for_end(container, state)
}

/// Waits until the kernel has released the head of a mount that is not visible here, and settles the head.
pub(super) fn wait_for_end(container: &Container<'_>, state: &RunState) -> Result<()> {
    let head = container.manifest().head;
    let has_ended = || Ok::<_, Error>(!kernel::is_in_use(container.store(), head)?);
    let patience = END_TIMEOUT.min(container.store().session().patience);
    if wait_until(Instant::now() + patience, PAUSE, has_ended)? {
        return kernel_layers::settle(container);
    }
    let name = container.name();
    Err(Error::busy(format!(
        "{name} is not mounted at {} here, but the kernel still uses its files: another mount namespace has a copy of \
         the mount, or a file in it is open",
        state.mountpoint.shown()
    ))
    .hint(format!(
        "unmount it there: cowl umount {name} (cowl status {name} shows what uses it)"
    )))
}

/// Returns an error if the container is mounted with kernel overlayfs, which cannot do `what`: "take a snapshot of".
pub(crate) fn refuse(container: &Container<'_>, what: &str) -> Result<()> {
    match container.mounted()? {
        Mounted::Alive(state) if state.driver() == Driver::Kernel => {
            let name = container.name();
            Err(Error::busy(format!(
                "cannot {what} {name} while it is mounted with the driver kernel"
            ))
            .hint(format!(
                "unmount it first (cowl umount {name}), or mount it with the default driver (cowl mount {name} --driver fuse)"
            )))
        }
        _ => Ok(()),
    }
}
