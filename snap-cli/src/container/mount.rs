//! Mounting and unmounting containers: the daemon's start in the background and its end.

use cowlfs::config::{Passthrough, choice_name};
use cowlfs::control::Client;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::kernel::{self, StartOptions};
use super::launch::launch;
use super::mount_point::{canonical, check_empty, check_mount_point};
use super::state::{self, Lifetime, Mounted, RunState};
use super::{Container, Swap, daemon, dead, detach, kernel_layers, lxc};
use crate::error::{Error, Kind, Result};
use crate::host::{reach, rootless};
use crate::lxc::binding;
use crate::store::kernel::Driver;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerManifest, Ephemeral};
use crate::store::mount_points;
use crate::store::name::ContainerName;
use crate::store::reserve;
use crate::wait::poll_until;
use cowl_layers::shown::Show as _;

/// The time that a daemon whose mount has ended may take at least to release the directories of the layers.
const RELEASE: Duration = Duration::from_secs(2);

/// Whether set-user-ID programs and device nodes have an effect in a mount at a path that the caller chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// They have an effect.
    Honored,
    /// They have an effect only if no other user can reach the mount point.
    ///
    /// Such a user would become root through set-user-ID programs that the container's root created.
    WherePrivate,
    /// They have no effect.
    Denied,
}

/// The request to mount a container.
#[derive(Clone, Copy, Debug)]
pub struct MountRequest<'a> {
    /// The mount point; `None`: the container's own in the store.
    pub at: Option<(&'a Path, Privileges)>,
    /// The lifetime of the mount.
    pub lifetime: Lifetime,
    /// The driver; `None`: any if the container is already mounted, otherwise that of the settings.
    pub driver: Option<Driver>,
    /// The files that are handled by passthrough; `None`: any if the container is already mounted, otherwise those of
    /// the settings.
    pub passthrough: Option<Passthrough>,
}

impl MountRequest<'_> {
    /// Returns a request for a mount at the container's own mount point, with the driver of the settings.
    pub fn of(lifetime: Lifetime) -> Self {
        Self {
            at: None,
            lifetime,
            driver: None,
            passthrough: None,
        }
    }
}

/// The caller's intention after an unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterUnmount {
    /// The container stays unmounted.
    StayUnmounted,
    /// The caller remounts it immediately. If the caller is killed in between, the next command does.
    Remount,
}

/// The state of a daemon whose mount is not visible any more.
#[derive(PartialEq, Eq)]
enum UnseenDaemon {
    Ended,
    /// It serves the mount in another mount namespace.
    Serving,
}

impl Container<'_> {
    /// Mounts the container. Returns the mount point.
    ///
    /// A container that is already mounted there stays mounted.
    pub fn mount(&mut self, request: MountRequest<'_>) -> Result<PathBuf> {
        self.record_mount(Ephemeral::Mounted)?;
        let mounted = self.mount_unrecorded(request);
        if mounted.is_err() && self.mounted()? == Mounted::No {
            self.record_mount(Ephemeral::Waiting)?;
        }
        mounted
    }

    /// Records that an ephemeral container is about to be mounted, or that its mount failed.
    fn record_mount(&mut self, phase: Ephemeral) -> Result<()> {
        if self.manifest().ephemeral.is_none_or(|was| was == phase) {
            return Ok(());
        }
        let next = ContainerManifest {
            ephemeral: Some(phase),
            ..self.manifest().clone()
        };
        self.commit(next, None, |_| Ok(Swap::Done))
    }

    /// Like [`Container::mount`], but does not record the mount of an ephemeral container.
    pub(crate) fn mount_unrecorded(&self, request: MountRequest<'_>) -> Result<PathBuf> {
        let MountRequest { at, lifetime, .. } = request;
        if let Mounted::Alive(state) = self.mounted()? {
            if state.in_lxc {
                return Err(lxc::runs_in_lxc(self));
            }
            if let Some(mount_point) = self.existing_mount(&state, request)? {
                return Ok(mount_point);
            }
            // Another program unmounted it, and its daemon is about to exit.
            match state.driver() {
                Driver::Fuse => self.wait_for_exit(&state)?,
                Driver::Kernel => kernel::wait_for_end(self, &state)?,
            }
            state::remove(self.store, self.id)?;
        }
        kernel_layers::ensure_settled(self)?;
        let (mount_point, nosuid) = match at {
            Some((at, privileges)) => {
                let mount_point = check_mount_point(at, self.store.root())?;
                let nosuid = match privileges {
                    Privileges::Honored => false,
                    Privileges::WherePrivate => !reach::is_private(&mount_point)?,
                    Privileges::Denied => true,
                };
                (mount_point, nosuid)
            }
            None => (canonical(&self.create_mount_point()?)?, false),
        };
        let driver = request.driver.unwrap_or(self.store.session().mounts.driver);
        if driver == Driver::Kernel && request.passthrough.is_some() {
            return Err(
                Error::usage("kernel overlayfs has no daemon, and so no passthrough")
                    .hint("omit --passthrough, or add --driver fuse"),
            );
        }
        let options = StartOptions {
            lifetime,
            nosuid,
            driver,
            passthrough: request.passthrough,
        };
        self.start(&mount_point, options)?;
        Ok(mount_point)
    }

    /// Returns the default mount point.
    pub(crate) fn mount_point(&self) -> Result<PathBuf> {
        Ok(match &self.manifest().lxc {
            Some(link) => binding::mount_point(self.store, self.id, &binding::read_config(link)?),
            None => self.store.paths().mount_dir(self.id),
        })
    }

    /// Creates the default mount point and returns its path.
    pub(super) fn create_mount_point(&self) -> Result<PathBuf> {
        // LXC cannot start a container without its config, so any mount point will do.
        let mount_point = self.mount_point().unwrap_or_else(|error| {
            log::info!("{error}");
            self.store.paths().mount_dir(self.id)
        });
        let root = match &self.manifest().lxc {
            Some(link) if mount_point != self.store.paths().mount_dir(self.id) => {
                binding::mapped_root(&link.config(), &binding::read_config(link)?)?
            }
            _ => None,
        };
        let group = root.map(|(_, group)| group);
        mount_points::create(self.store.paths(), self.id, &mount_point, group)?;
        check_empty(&mount_point)?;
        Ok(mount_point)
    }

    /// Returns the mount point if the container is mounted where the caller wants it.
    ///
    /// Extends the lifetime of a mount that a command made for itself, if `lifetime` is longer.
    fn existing_mount(
        &self,
        state: &RunState,
        request: MountRequest<'_>,
    ) -> Result<Option<PathBuf>> {
        let MountRequest { at, lifetime, .. } = request;
        let name = self.name();
        if !state.is_here()? {
            state.refuse_covered(name)?;
            return Ok(None);
        }
        if let Some(driver) = request.driver
            && driver != state.driver()
        {
            return Err(Error::busy(format!(
                "{name} is already mounted with the driver {}",
                state.driver().name()
            ))
            .hint(format!("unmount it first: cowl umount {name}")));
        }
        if state.driver() == Driver::Fuse {
            // Fails if the daemon is stopped: every program that accesses the mount would hang.
            let client = daemon::connect(self.store, self.id)?;
            if let Some(requested) = request.passthrough {
                check_passthrough(client, requested, name)?;
            }
        }
        if state.driver() == Driver::Kernel && request.passthrough.is_some() {
            return Err(Error::busy(format!(
                "{name} is already mounted with the driver kernel, which has no passthrough"
            ))
            .hint(format!("unmount it first: cowl umount {name}")));
        }
        if let Some((at, _)) = at {
            let requested = at
                .canonicalize()
                .map_err(|e| Error::at("mount at", at, e))?;
            if requested != state.mountpoint {
                return Err(Error::busy(format!(
                    "{name} is mounted at {} already",
                    state.mountpoint.shown()
                ))
                .hint(format!("unmount it first: cowl umount {name}")));
            }
        }
        if state.transient && lifetime == Lifetime::UntilUnmounted {
            let state = RunState {
                transient: false,
                ..state.clone()
            };
            state::write(self.store, self.id, &state)?;
        }
        Ok(Some(state.mountpoint.clone()))
    }

    /// Starts a daemon, or mounts by the kernel, and waits until the mount is ready.
    fn start(&self, mount_point: &Path, options: StartOptions) -> Result<()> {
        reserve::release_if_full(self.store)?;
        let log = state::ensure_run_dir(self.store, self.id)?.join("log");
        match options.driver {
            Driver::Fuse => self.start_daemon(mount_point, &log, options),
            Driver::Kernel => kernel::mount(self, mount_point, options),
        }?;
        rootless::hold_again().or_else(|error| {
            // No other command would see the mount.
            self.unmount(AfterUnmount::StayUnmounted)?;
            Err(error)
        })
    }

    fn start_daemon(&self, mount_point: &Path, log: &Path, options: StartOptions) -> Result<()> {
        // The daemon holds the container's lock until it has written its state. Otherwise, if this process were
        // killed before that, another command would consider the container unmounted and freeze the layer that the
        // daemon is about to write to.
        let lock = self.lock.for_child()?;
        launch(self.store, log, |command| {
            command.stdin(lock);
            if options.lifetime == Lifetime::OfCommand {
                command.arg("--transient");
            }
            if options.nosuid {
                command.arg("--nosuid");
            }
            if let Some(passthrough) = &options.passthrough {
                command.arg("--passthrough");
                command.arg(choice_name(&Passthrough::NAMES, passthrough));
            }
            command.arg(self.id.to_string()).arg(mount_point);
        })
    }

    /// Unmounts the container. Returns the state of the ended mount; `None` if the container was not mounted.
    ///
    /// Fails if a process uses the mount, in any mount namespace. When this returns, the daemon writes to no layer any
    /// more.
    pub fn unmount(&self, then: AfterUnmount) -> Result<Option<RunState>> {
        let state = match self.mounted()? {
            Mounted::Alive(state) => state,
            // The daemon died after the container was opened.
            Mounted::Dead(state)
                if state.driver() == Driver::Fuse && then == AfterUnmount::StayUnmounted =>
            {
                dead::unmount(self.store, self.id, &state)?;
                state::remove(self.store, self.id)?;
                return Ok(Some(state));
            }
            Mounted::Dead(_) | Mounted::No => {
                // Its run-time files may be missing.
                kernel_layers::refuse_in_use(self)?;
                return Ok(None);
            }
        };
        if state.in_lxc {
            return self.await_end_in_lxc(&state).map(|()| None);
        }
        if then == AfterUnmount::Remount {
            let replacing = RunState {
                replacing: true,
                ..state.clone()
            };
            state::write(self.store, self.id, &replacing)?;
        }
        let target = detach::UnmountTarget {
            server: match kernel::find_mount(&state)? {
                Some(mount) => detach::Server::Kernel(mount),
                None => detach::Server::Daemon(daemon::socket(self.store, self.id)),
            },
            pid: state.pid,
            mountpoint: &state.mountpoint,
            device: state.device()?,
        };
        let unmounted =
            detach::unmount(self, &target).and_then(|()| kernel::finish_unmount(self, &state));
        match unmounted {
            Ok(()) => {
                if then == AfterUnmount::StayUnmounted {
                    state::remove(self.store, self.id)?;
                    self.remove_mount_point();
                }
                Ok(Some(state))
            }
            Err(error) => {
                if then == AfterUnmount::Remount {
                    state::write(self.store, self.id, &state)?;
                }
                Err(error)
            }
        }
    }

    /// Waits for the end of a mount in the namespaces of an LXC container. Fails if the container runs.
    fn await_end_in_lxc(&self, state: &RunState) -> Result<()> {
        if lxc::is_running(self)? || !detach::await_end(self, state, self.store.session().patience)?
        {
            return Err(lxc::runs_in_lxc(self));
        }
        self.remove_mount_point();
        Ok(())
    }

    /// Removes the mount point of an LXC container.
    ///
    /// LXC's tools would otherwise use the empty directory as the root filesystem, and snapshot it.
    pub(super) fn remove_mount_point(&self) {
        if self.manifest().lxc.is_some()
            && let Err(error) = mount_points::remove(self.store.paths(), self.id)
        {
            log::debug!("{error}");
        }
    }

    /// Waits until a daemon whose mount is not visible any more has exited.
    fn wait_for_exit(&self, state: &RunState) -> Result<()> {
        /// The time in which copies of the mount in other mount namespaces may disappear.
        const GRACE_PERIOD: Duration = Duration::from_secs(2);
        let start = Instant::now();
        let patience = self.store.session().patience;
        // The daemon then exits immediately if only unused copies in other mount namespaces are left.
        let request = daemon::connect(self.store, self.id)
            .map(|client| cowl_layers::sys::process::ask_to_check(client.pid()));
        if let Ok(Err(error)) = request {
            log::info!("cannot ask the daemon whether its mount is in use: {error}");
        }
        let path = state::daemon_lock(self.store, self.id, state.daemon);
        let mut checked = false;
        // A daemon without any mount may take long to exit, because it drops its caches.
        let daemon = poll_until(start + patience, Duration::from_millis(1), || {
            if !Lock::is_held(&path)? {
                return Ok(Some(UnseenDaemon::Ended));
            }
            if checked || start.elapsed() < GRACE_PERIOD {
                return Ok::<_, Error>(None);
            }
            checked = true;
            let mounted = state.device.map(cowl_layers::sys::namespace::is_mounted);
            Ok(matches!(mounted, Some(Ok(true))).then_some(UnseenDaemon::Serving))
        })?;
        if daemon == Some(UnseenDaemon::Ended) {
            return Ok(());
        }
        let name = self.name();
        Err(Error::busy(format!(
            "{name} is not mounted at {} here, but its daemon (pid {}) still serves it in another mount namespace",
            state.mountpoint.shown(),
            state.pid
        ))
        .hint(format!(
            "unmount it there: cowl umount {name} (cowl status {name} shows what uses it)"
        )))
    }

    /// Remounts the container where it was mounted before [`Container::unmount`], or before its daemon died.
    ///
    /// The state is removed only if that fails: if this command is killed before that, the next one retries.
    pub fn remount(&self, was: &RunState) -> Result<()> {
        let started = self.start_again(was);
        if started.is_err() {
            state::remove(self.store, self.id)?;
        }
        started
    }

    fn start_again(&self, was: &RunState) -> Result<()> {
        // Another user may have replaced a directory in its path. The mount fails if there is a symbolic link.
        check_empty(&was.mountpoint)?;
        if was.driver() == Driver::Fuse {
            // A command that was killed after the unmount has not asked the daemon to exit.
            self.wait_for_exit(was)?;
        }
        let options = StartOptions {
            lifetime: was.lifetime(),
            nosuid: was.nosuid,
            driver: was.driver(),
            passthrough: was.passthrough,
        };
        // On a busy machine, the process that has served exits some time after its lock was released.
        let deadline = Instant::now() + RELEASE.max(self.store.session().patience);
        let start = || match self.start(&was.mountpoint, options) {
            Err(error) if error.kind == Kind::Busy && Instant::now() < deadline => Ok(None),
            done => done.map(Some),
        };
        poll_until(deadline, RELEASE / 20, start).map(drop)
    }
}

/// Returns an error if a container is mounted with another option for passthrough than the requested one.
fn check_passthrough(
    mut client: Client,
    requested: Passthrough,
    name: &ContainerName,
) -> Result<()> {
    let status = client.passthrough();
    let status = status.map_err(|error| daemon::to_error(&error))?;
    let option = status.map(|status| status.option);
    if option == Some(requested) {
        return Ok(());
    }
    let with = match &option {
        Some(option) => format!(
            "with passthrough={}",
            choice_name(&Passthrough::NAMES, option)
        ),
        None => "by a daemon that does not report its passthrough".to_owned(),
    };
    Err(Error::busy(format!("{name} is already mounted {with}"))
        .hint(format!("unmount it first: cowl umount {name}")))
}
