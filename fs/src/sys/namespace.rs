//! Mount namespaces: leaving the one that a daemon was started in, and acting in others.
//!
//! A mount in another namespace is found by its file system's device number and unmounted through a descriptor
//! whose mount id was compared, never by a path alone: what lies at a path there is decided by its inhabitants.

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
use super::users::{self, Device};
use crate::error::{Errno, Result};
use crate::shown::Show as _;

/// How long a thread may take that resolves a path in another namespace: one of its inhabitants may serve a part of
/// it.
pub const HASTY: Duration = Duration::from_secs(2);
/// How long a thread may take that resolves no such path: longer than any machine is busy.
pub const PATIENT: Duration = Duration::from_secs(20);

/// A mount namespace, held by a descriptor.
#[derive(Debug)]
pub struct MountNamespace {
    fd: OwnedFd,
    /// A process that lives in it.
    pub pid: u32,
    /// Its number, as `/proc/PID/ns/mnt` shows it.
    pub ino: u64,
}

impl MountNamespace {
    /// Opens the namespace of this thread.
    pub fn own() -> Result<Self> {
        Self::open(std::process::id(), "/proc/thread-self/ns/mnt")
    }

    fn open(pid: u32, link: impl AsRef<Path>) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, link.as_ref(), flags, Mode::empty())?;
        let ino = rustix::fs::fstat(&fd)?.st_ino;
        Ok(Self { fd, pid, ino })
    }

    /// Opens every namespace that a visible process lives in, each once.
    pub fn all() -> Result<Vec<Self>> {
        let mut found = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for pid in users::pids()? {
            for thread in users::threads(pid) {
                let link = PathBuf::from(format!("/proc/{pid}/task/{thread}/ns/mnt"));
                // A process that ended meanwhile has none, and others may be out of reach.
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

    /// Runs `work` in a thread that has entered the namespace, and waits for it for `patience`. A thread that takes
    /// longer is left behind, with ETIMEDOUT; it goes on.
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
                // Who waited has given up.
                drop(send.send(done));
            })
            .map_err(failed)?;
        let done = receive
            .recv_timeout(patience)
            .map_err(|_| Errno::TIMEDOUT)?;
        // Until it has ended it keeps the namespace alive.
        drop(entered.join());
        done
    }
}

/// A thread inside a mount namespace. The working directory of the thread is the /proc of the process, so that
/// nothing depends on what is mounted at /proc there.
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
        // Also where it is in already: that leads out of a chroot, so that the whole table is seen.
        match setns(&namespace, CloneFlags::CLONE_NEWNS) {
            Err(_) if is_own => {}
            done => done?,
        }
        rustix::process::fchdir(&proc)?;
        Ok(Self { _private: () })
    }

    /// Reads the table of all mounts of the namespace.
    pub fn mounts(&self) -> Result<Vec<Mount>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, "thread-self/mountinfo", flags, Mode::empty())?;
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut fs::File::from(file), &mut text)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(mountinfo::parse(&text))
    }

    /// Opens the root of a mount; ESTALE when something else is found at its path.
    pub fn open(&self, mount: &Mount) -> Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        // A path of mountinfo leads through no links.
        let how = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let fd = rustix::fs::openat2(CWD, &mount.at, flags, Mode::empty(), how)?;
        if is_mount(&fd, mount)? {
            Ok(fd)
        } else {
            Err(Errno::STALE.into())
        }
    }

    /// Makes a second mount of what is mounted there, which is in no tree.
    pub fn clone_of(&self, mount: &Mount) -> Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        Ok(rustix::mount::open_tree(self.open(mount)?, "", flags)?)
    }

    /// Takes the mount, and what is mounted below it, out of the namespace's tree, whoever uses it.
    pub fn detach(&self, mount: &Mount) -> Result<()> {
        let fd = self.open(mount)?;
        let path = format!("self/fd/{}", fd.as_raw_fd());
        Ok(rustix::mount::unmount(path, UnmountFlags::DETACH)?)
    }

    /// Unmounts the mount unless something uses it: EBUSY. The kernel refuses that to a descriptor's holder, so
    /// that the path has to do; it is compared directly before.
    pub fn unmount(&self, mount: &Mount) -> Result<()> {
        drop(self.open(mount)?);
        super::mount::unmount(&mount.at)
    }
}

/// Whether the file system is mounted in a namespace that a visible process lives in.
pub fn is_mounted(device: Device) -> Result<bool> {
    let namespaces = MountNamespace::all()?;
    Ok(namespaces.iter().any(|namespace| {
        let table = namespace
            .inside(PATIENT, Inside::mounts)
            .unwrap_or_default();
        table.iter().any(|mount| mount.device() == device)
    }))
}

fn is_mount(fd: impl AsFd, mount: &Mount) -> Result<bool> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(&fd, "", flags, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id == mount.id && Device::of_fd(&fd)? == mount.device())
}

/// Moves this thread, and every one that it starts from here on, to a mount namespace of its own, in which
/// nothing is mounted but what the paths `keep` lie on. A path that does not exist keeps nothing.
///
/// The mounts there are private: none that is made or unmounted elsewhere appears or vanishes there. The working
/// directory is the root directory afterwards. Where the right to it is missing, nothing has changed.
pub fn leave(keep: &[&Path], device: Device) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let kept = keep
        .iter()
        .filter_map(|path| rustix::fs::statx(CWD, *path, flags, StatxFlags::MNT_ID).ok());
    let kept: Vec<u64> = kept.map(|stat| stat.stx_mnt_id).collect();
    // From the root of the namespace, which a process in a chroot does not see.
    let own = MountNamespace::own()?;
    let trimmed = own.inside(HASTY, move |inside| trim(inside, &kept, device));
    // Where it was before may have been unmounted here.
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
            if mount.device() == device || !kept.insert(id) {
                break;
            }
            id = mount.parent;
        }
    }
    // What lies below another goes with it. Later mounts come first: they may cover earlier ones.
    let covers_root = |mount: &Mount| {
        let parent = table.iter().find(|other| other.id == mount.parent);
        parent.is_some_and(|parent| parent.at == mount.at)
    };
    for mount in table.iter().rev() {
        let topmost = kept.contains(&mount.parent) || covers_root(mount);
        // One that is kept is in the way to it.
        let is_hidden = |other: &Mount| kept.contains(&other.id) && other.at == mount.at;
        let done = if mount.device() == device {
            inside.detach(mount)
        } else if !topmost || kept.contains(&mount.id) || table.iter().any(is_hidden) {
            continue;
        } else {
            // By its path: nothing else acts in this namespace, and an unmount asks no file system for anything,
            // which a server that is gone would never answer.
            super::mount::unmount_lazily(&mount.at)
        };
        if let Err(error) = done {
            // Locked, because a more privileged namespace made it; or out of reach, below another one.
            log::debug!("{} stays mounted here: {error}", mount.at.shown());
        }
    }
    Ok(())
}

/// The switch by which the kernel breaks off the connection of one FUSE file system.
#[derive(Debug)]
pub struct AbortSwitch(OwnedFd);

impl AbortSwitch {
    /// Opens the switch of the file system `device`, which must be mounted: its number is another one's later.
    /// Nothing need be mounted for it, but the right to mount is needed.
    pub fn open(device: Device) -> Result<Self> {
        let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = rustix::mount::fsmount(context.as_fd(), flags, MountAttrFlags::empty())?;
        // The kernel names a connection by its own form of the device number.
        let switch = format!("{}/abort", device.major << 20 | device.minor);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&mount, switch, flags, Mode::empty())?;
        Ok(Self(file))
    }

    /// Breaks the connection off: what waits for an answer, and what is asked from here on, fails. Nothing
    /// happens where the file system has ended.
    pub fn abort(&self) -> Result<()> {
        rustix::io::write(&self.0, b"1")?;
        Ok(())
    }
}
