//! Mounts in the namespaces of an LXC container of a plain user (docs/decisions/0037).
//!
//! LXC creates these namespaces after the pre-start hook, which starts the daemon. The daemon listens on a socket. The
//! pre-mount hook, in these namespaces, mounts and passes the descriptor of the mount to the daemon. The kernel admits
//! only processes of the container's user namespace to the mount.

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cowlfs::PassedMount;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::state::Mounted;
use super::{Container, detach, launch, state};
use crate::error::{Error, Result};
use crate::host::reach;
use crate::lxc::binding;
use crate::lxc::passing::{self, CANCEL};
use crate::shell::quoted;
use crate::store::Store;
use crate::store::disk;
use crate::store::manifest::ContainerId;
use cowl_layers::shown::Show as _;
use cowl_layers::sys::{fuse_device, socket};

/// The time that LXC may take from the pre-start hook to the pre-mount hook, and that hook to pass the mount.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// The time that a hook may take to send a message after it has connected.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);
/// The time for which the post-stop hook waits for the end of the mount.
const END_PATIENCE: Duration = Duration::from_secs(5);

impl Container<'_> {
    /// Starts the daemon of a mount that LXC's pre-mount hook makes, and waits until the daemon listens.
    pub fn start_in_lxc(&self) -> Result<()> {
        let Some(link) = &self.manifest().lxc else {
            return Err(Error::usage(format!(
                "{} is not an LXC container",
                self.name()
            )));
        };
        let (config, text) = (link.config(), binding::read_config(link)?);
        binding::require_startable(&link.name, &config, &text)?;
        let mount_point = self.store.paths().mapped_dir(self.id);
        if binding::mount_point(self.store, self.id, &text) != mount_point {
            return Err(Error::failed(format!(
                "the config of {} does not have the lines for a container of a plain user",
                link.name
            ))
            .hint(format!(
                "let cowl write them: cowl adopt {} -P {}",
                quoted(&link.name),
                quoted(&link.lxcpath)
            )));
        }
        self.await_previous_end()?;
        self.create_mount_point()?;
        if let Some((user, group)) = binding::mapped_root(&config, &text)?
            && let Some(dir) = reach::blocked_for(&mount_point, user, group)?
        {
            return Err(Error::failed(format!(
                "the root of the LXC container {} cannot search {}",
                link.name,
                dir.shown()
            ))
            .hint(format!("permit it: chmod o+x {}", quoted(&dir))));
        }
        let log = state::ensure_run_dir(self.store, self.id)?.join("log");
        let lock = self.lock.for_child()?;
        launch::launch(self.store, &log, |command| {
            command.stdin(lock).arg("--in-lxc");
            command.arg(self.id.to_string()).arg(&mount_point);
        })
    }

    /// Waits until an earlier mount in LXC's namespaces has ended. Fails if the container is mounted elsewhere.
    fn await_previous_end(&self) -> Result<()> {
        let Mounted::Alive(state) = self.mounted()? else {
            return Ok(());
        };
        if !state.in_lxc {
            return Err(Error::busy(format!(
                "{} is mounted at {} in the namespace of your user",
                self.name(),
                state.mountpoint.shown()
            ))
            .hint(format!("unmount it: cowl umount {}", self.name())));
        }
        match detach::await_end(self, &state, END_PATIENCE)? {
            true => Ok(()),
            false => Err(Error::busy(format!(
                "{} is still mounted in the namespaces of its LXC container",
                self.name()
            ))
            .hint("end the processes that hold these namespaces open")),
        }
    }

    /// Waits some time for the end of the mount in LXC's namespaces, and removes its mount point.
    ///
    /// For the hook that LXC calls when the container has stopped.
    pub fn end_in_lxc(&self) -> Result<()> {
        if let Mounted::Alive(state) = self.mounted()? {
            if !state.in_lxc {
                return Ok(());
            }
            if !detach::await_end(self, &state, END_PATIENCE)? {
                log::info!("{} is still mounted in LXC's namespaces", self.name());
                return Ok(());
            }
        }
        self.remove_mount_point();
        Ok(())
    }
}

/// Ends a daemon that waits for LXC's pre-mount hook, if there is one: the start of the container has failed.
pub fn cancel(store: &Store, id: ContainerId) {
    let canceled = passing::connect(&store.paths().mapped_socket(id))
        .and_then(|mut stream| stream.write_all(CANCEL));
    match canceled {
        Ok(()) => log::info!("the start was canceled"),
        // Regularly, because the daemon removes the socket when it has the mount.
        Err(error) => log::debug!("no daemon waits for a mount: {error}"),
    }
}

/// A socket on which a daemon waits for the mount of a container.
#[derive(Debug)]
pub struct Waiting {
    listener: UnixListener,
    path: PathBuf,
    /// The user that is root in the container.
    root: u32,
}

/// A mount that a hook has passed, and the connection to the hook, which waits until the daemon serves.
#[derive(Debug)]
pub struct Arrived {
    /// The mount.
    pub mount: PassedMount,
    /// The connection.
    pub hook: UnixStream,
}

impl Waiting {
    /// Creates the socket, which only the user and the `root` of the container can use: the mount point's directory
    /// admits no other user.
    pub fn listen(store: &Store, id: ContainerId, root: (u32, u32)) -> Result<Self> {
        let path = store.paths().mapped_socket(id);
        let at = |error| Error::at("listen on", &path, error);
        disk::remove_if_exists(&path)?;
        let listener = passing::listen(&path).map_err(at)?;
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&path, mode).map_err(at)?;
        chown(&path, Some(root.0), Some(root.1)).map_err(at)?;
        Ok(Self {
            listener,
            path,
            root: root.0,
        })
    }

    /// Waits for the mount, and removes the socket.
    pub fn receive(self) -> Result<Arrived> {
        let arrived = self.accept();
        disk::remove_if_exists(&self.path)?;
        arrived
    }

    fn accept(&self) -> Result<Arrived> {
        let failed = |error| Error::failed("cannot wait for LXC's mount").because(error);
        let deadline = Instant::now() + START_TIMEOUT;
        // A client may end before it is accepted.
        self.listener.set_nonblocking(true).map_err(failed)?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|e| failed(std::io::Error::other(e)))?;
            let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => {
                    return Err(Error::failed(format!(
                        "LXC has not mounted the container within {} seconds",
                        START_TIMEOUT.as_secs()
                    )));
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock
                            | ErrorKind::Interrupted
                            | ErrorKind::ConnectionAborted
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(failed(error)),
            };
            let peer = socket::peer_user(&stream).map_err(failed)?;
            let own = rustix::process::geteuid().as_raw();
            if peer != self.root && peer != own {
                log::warn!("a connection of uid {peer} was refused");
                continue;
            }
            match receive(stream) {
                Ok(Some(arrived)) if peer == self.root => return Ok(arrived),
                Ok(None) if peer == own => {
                    return Err(Error::failed("the start of the LXC container has failed"));
                }
                Ok(_) => log::warn!("a message of uid {peer} was refused"),
                Err(error) => log::warn!("uid {peer} has passed no mount: {error}"),
            }
        }
    }
}

/// Receives a message: a mount, or `None` if the start was canceled.
fn receive(stream: UnixStream) -> std::io::Result<Option<Arrived>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
    stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
    let Some((device, number)) = passing::receive(&stream)? else {
        return Ok(None);
    };
    if !fuse_device::is_device(&device)? {
        return Err(std::io::Error::other(
            "the descriptor is not one of /dev/fuse",
        ));
    }
    let mount = PassedMount { device, number };
    Ok(Some(Arrived {
        mount,
        hook: stream,
    }))
}
