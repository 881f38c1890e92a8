//! Mount namespaces: leaving the one that a daemon was started in, and acting in others.
//!
//! Mounts in other namespaces are found by device number, and unmounted through a descriptor whose mount id was
//! compared, never by path alone: the processes of a namespace decide what its paths lead to.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, OpenTreeFlags, UnmountFlags,
};

use super::mountinfo::{self, Mount};
use super::user_namespace;
use super::users::{self, Device};
use crate::error::{Errno, Result};
use crate::shown::Show as _;

/// The time limit for a thread that resolves a path in another namespace.
///
/// A process of that namespace may serve a file system on the path and never reply.
pub const HASTY: Duration = Duration::from_secs(2);
/// The time limit for a thread that resolves no such path. It is longer than any scheduling delay.
pub const PATIENT: Duration = Duration::from_secs(20);

/// A mount namespace, held by a descriptor.
#[derive(Debug)]
pub struct MountNamespace {
    fd: OwnedFd,
    /// A process in the namespace.
    pub pid: u32,
    /// The inode number of `/proc/PID/ns/mnt`.
    pub ino: u64,
}

impl MountNamespace {
    /// Opens the namespace of the current thread.
    pub fn own() -> Result<Self> {
        Self::open(std::process::id(), "/proc/thread-self/ns/mnt")
    }

    fn open(pid: u32, link: impl AsRef<Path>) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, link.as_ref(), flags, Mode::empty())?;
        let ino = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self { fd, pid, ino })
    }

    /// Opens every namespace that contains a visible process, each once.
    pub fn all() -> Result<Vec<Self>> {
        let mut found = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for pid in users::pids()? {
            for thread in users::threads(pid) {
                let link = PathBuf::from(format!("/proc/{pid}/task/{thread}/ns/mnt"));
                // The process has ended, or this process lacks permission.
                let Ok(name) = fs::read_link(&link) else {
                    continue;
                };
                if !seen.contains(&name)
                    && let Ok(namespace) = Self::open(pid, &link)
                {
                    seen.insert(name);
                    found.push(namespace);
                }
            }
        }
        Ok(found)
    }

    /// Returns whether it belongs to the user namespace of this process. Root of another one may have created it, and
    /// mounted in it what it likes.
    pub fn is_trusted(&self) -> bool {
        user_namespace::is_owned(&self.fd).unwrap_or(false)
    }

    /// Runs `work` in a thread that has entered the namespace, and waits for it for up to `patience`.
    ///
    /// On a timeout, returns ETIMEDOUT and leaves the thread running.
    pub fn inside<T: Send + 'static>(
        &self,
        patience: Duration,
        work: impl FnOnce(&Inside) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let failed = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let fd = self.fd.try_clone().map_err(failed)?;
        let (send, receive) = mpsc::channel();
        let entered = thread::Builder::new()
            .name("namespace".into())
            .spawn(move || {
                let done = Inside::enter(fd).and_then(|inside| work(&inside));
                // The receiver is gone after a timeout.
                drop(send.send(done));
            })
            .map_err(failed)?;
        let done = receive
            .recv_timeout(patience)
            .map_err(|_| Errno::TIMEDOUT)?;
        // The thread holds the namespace until it has ended.
        drop(entered.join());
        done
    }
}

/// A thread inside a mount namespace.
///
/// Its working directory is the /proc of this process, so that nothing depends on the mounts at /proc in the
/// namespace.
#[derive(Debug)]
pub struct Inside {
    _private: (),
}

impl Inside {
    fn enter(namespace: OwnedFd) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = rustix::fs::openat(CWD, "/proc", flags, Mode::empty())?;
        unshare(CloneFlags::CLONE_FS)?;
        let is_own = rustix::fs::fstat(&namespace)?.st_ino == MountNamespace::own()?.ino;
        // Enter the namespace even if this thread is already in it: setns(2) leaves a chroot, so that mountinfo shows
        // all mounts.
        match setns(&namespace, CloneFlags::CLONE_NEWNS) {
            Err(_) if is_own => {}
            done => done?,
        }
        rustix::process::fchdir(&proc)?;
        Ok(Self { _private: () })
    }

    /// Reads mountinfo: all mounts of the namespace.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, "thread-self/mountinfo", flags, Mode::empty())?;
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut fs::File::from(file), &mut text)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(mountinfo::parse(&text))
    }

    /// Opens the root of a mount. Returns ESTALE if its path leads to another object.
    pub fn open(&self, mount: &Mount) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // Paths in mountinfo contain no symbolic links.
        let how = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let fd = rustix::fs::openat2(CWD, &mount.at, flags, Mode::empty(), how)?;
        if is_mount(&fd, mount)? {
            Ok(fd)
        } else {
            Err(Errno::STALE.into())
        }
    }

    /// Clones the mount as a detached mount.
    pub fn clone_mount(&self, mount: &Mount) -> Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        Ok(rustix::mount::open_tree(self.open(mount)?, "", flags)?)
    }

    /// Detaches the mount and all mounts below it, even if they are in use.
    pub fn detach(&self, mount: &Mount) -> Result<()> {
        let fd = self.open(mount)?;
        let path = format!("self/fd/{}", fd.as_raw_fd());
        Ok(rustix::mount::unmount(path, UnmountFlags::DETACH)?)
    }

    /// Unmounts the mount; fails with EBUSY if it is in use.
    ///
    /// An open descriptor would itself make the mount busy, so the unmount is by path, directly after a comparison
    /// through a descriptor.
    pub fn unmount(&self, mount: &Mount) -> Result<()> {
        drop(self.open(mount)?);
        super::mount::unmount(&mount.at)
    }
}

/// Whether the file system is mounted in a namespace that contains a visible process.
pub fn is_mounted(device: Device) -> Result<bool> {
    let namespaces = MountNamespace::all()?;
    Ok(namespaces.iter().any(|namespace| {
        let table = namespace
            .inside(PATIENT, Inside::mounts)
            .unwrap_or_default();
        table.iter().any(|mount| mount.device == device)
    }))
}

fn is_mount(fd: impl AsFd, mount: &Mount) -> Result<bool> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&fd, "", flags, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id == mount.id && Device::from_fd(&fd)? == mount.device)
}

/// Moves this thread to a new mount namespace that contains only the mounts that the paths `keep` are on.
///
/// Threads that it starts later are in that namespace as well. Paths that do not exist are ignored. The mounts there
/// are private, so mounts and unmounts elsewhere do not propagate to it. The working directory becomes `/`. Without the
/// privilege to create a namespace, nothing changes.
pub fn leave(keep: &[&Path], device: Device) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let kept = keep
        .iter()
        .filter_map(|path| rustix::fs::statx(CWD, *path, flags, StatxFlags::MNT_ID).ok());
    let kept: Vec<u64> = kept.map(|stat| stat.stx_mnt_id).collect();
    // mountinfo of a chroot shows only a part of the table.
    let own = MountNamespace::own()?;
    let trimmed = own.inside(HASTY, move |inside| trim(inside, &kept, device));
    // The previous working directory may be on a mount that was just removed.
    rustix::process::chdir("/")?;
    trimmed
}

fn trim(inside: &Inside, paths: &[u64], device: Device) -> Result<()> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;
    let table = inside.mounts()?;
    let mut kept = std::collections::HashSet::new();
    for id in paths {
        let mut id = *id;
        while let Some(mount) = table.iter().find(|mount| mount.id == id) {
            if mount.device == device || !kept.insert(id) {
                break;
            }
            id = mount.parent;
        }
    }
    // Detaching a mount detaches the mounts below it as well. Later mounts come first, because they may cover earlier
    // ones.
    let covers_root = |mount: &Mount| {
        let parent = table.iter().find(|other| other.id == mount.parent);
        parent.is_some_and(|parent| parent.at == mount.at)
    };
    for mount in table.iter().rev() {
        let topmost = kept.contains(&mount.parent) || covers_root(mount);
        // A retained mount at the same path would be unmounted instead.
        let is_hidden = |other: &Mount| kept.contains(&other.id) && other.at == mount.at;
        let done = if mount.device == device {
            inside.detach(mount)
        } else if !topmost || kept.contains(&mount.id) || table.iter().any(is_hidden) {
            continue;
        } else {
            // By path is safe: nothing else acts in this namespace. A lazy unmount sends no request to the file
            // system, which a dead server would never answer.
            super::mount::unmount_lazily(&mount.at)
        };
        if let Err(error) = done {
            // Locked, because a more privileged namespace created it, or hidden below another mount.
            log::debug!(
                "cannot unmount {} in the daemon's namespace: {error}",
                mount.at.shown()
            );
        }
    }
    Ok(())
}

/// The control file with which the kernel aborts the connection of a FUSE file system.
#[derive(Debug)]
pub struct AbortSwitch(OwnedFd);

impl AbortSwitch {
    /// Opens the control file of the file system `device`.
    ///
    /// The file system must be mounted: its device number is reused later. fusectl need not be mounted, but the
    /// privilege to mount it is required.
    pub fn open(device: Device) -> Result<Self> {
        let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = rustix::mount::fsmount(context.as_fd(), flags, MountAttrFlags::empty())?;
        // fusectl names connections by the kernel's internal device number.
        let switch = format!("{}/abort", device.major << 20 | device.minor);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&mount, switch, flags, Mode::empty())?;
        Ok(Self(file))
    }

    /// Aborts the connection: pending and future requests fail. Has no effect if the file system has already ended.
    pub fn abort(&self) -> Result<()> {
        rustix::io::write(&self.0, b"1")?;
        Ok(())
    }
}
