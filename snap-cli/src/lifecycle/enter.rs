//! The inner half of exec: in a process of its own, makes the mounted container the root of a private
//! mount namespace, with /proc, /sys and /dev of the host, and becomes the command.
//!
//! The old root is let go of, so that the namespace holds no copy of any other mount: nothing else
//! becomes busy because a command runs in here. What is mounted over is opened by descriptor without
//! following links, because a link in the container may point anywhere.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::error::{Error, Result};

/// cowl itself failed.
pub const FAILED: u8 = 125;
/// The command is there and can't be run.
pub const NOT_EXECUTABLE: u8 = 126;
/// There is no such command.
pub const NOT_FOUND: u8 = 127;

/// Devices that programs expect.
const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Links in /dev that programs expect.
const LINKS: [(&str, &str); 5] = [
    // Not the host's node: that one looks for the terminals beside itself, where it was bound from.
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Becomes `command` inside the mount at `place`. Comes back only when that failed: with the exit code
/// and why.
pub fn enter(place: &Path, command: &[OsString]) -> (u8, Error) {
    let Some((program, args)) = command.split_first() else {
        return (FAILED, Error::usage("no command to run"));
    };
    if let Err(error) = change_root(place) {
        return (FAILED, error);
    }
    // `exec` holds signals back for itself, and what it starts inherits that.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        let what = "cannot let signals through to the command";
        return (FAILED, Error::failed(what).because(error));
    }
    let error = Command::new(program).args(args).exec();
    let code = match error.kind() {
        ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    let shown = program.as_encoded_bytes().escape_ascii();
    let what = format!("cannot run {shown} in the container");
    (code, Error::failed(what).because(error))
}

fn change_root(place: &Path) -> Result<()> {
    let failed = |what: &str, error: std::io::Error| Error::failed(what.to_owned()).because(error);
    own_namespace()?;
    let recursive = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", recursive)
        .map_err(|e| failed("cannot keep the namespace's mounts private", e.into()))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, place, flags, Mode::empty())
        .map_err(|e| Error::at("enter", place, std::io::Error::from(e)))?;
    honor_privileges(&root)
        .map_err(|e| failed("cannot let set-user-ID programs work", e.into()))?;
    if let Some(at) = folder(&root, "proc")? {
        rustix::mount::mount_bind_recursive("/proc", &at.path)
            .map_err(|e| failed("cannot mount /proc", e.into()))?;
    }
    if let Some(at) = folder(&root, "sys")? {
        let failed = |e: rustix::io::Errno| failed("cannot mount /sys", e.into());
        match rustix::mount::mount_bind("/sys", &at.path) {
            Ok(()) => {
                // A descriptor stands for what lies below a later mount: look anew.
                if let Some(mounted) = folder(&root, "sys")? {
                    read_only(&mounted.path).map_err(failed)?;
                }
            }
            // In a user namespace only with everything that is mounted below it.
            Err(rustix::io::Errno::INVAL) => {
                rustix::mount::mount_bind_recursive("/sys", &at.path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    if let Some(at) = folder(&root, "dev")? {
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        let size = c"mode=755,size=64k";
        rustix::mount::mount("tmpfs", &at.path, "tmpfs", flags, size)
            .map_err(|e| failed("cannot mount /dev", e.into()))?;
        if let Some(mounted) = folder(&root, "dev")? {
            devices(&mounted.path).map_err(|e| failed("cannot make /dev", e))?;
        }
    }
    rustix::process::fchdir(&root)
        .map_err(|e| Error::at("enter", place, std::io::Error::from(e)))?;
    drop(root);
    match rustix::process::pivot_root(".", ".") {
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH)
            .map_err(|e| failed("cannot let go of the old root", e.into()))?,
        // The host's root can't be moved when it is the initial ramfs.
        Err(rustix::io::Errno::INVAL) => rustix::process::chroot(".")
            .map_err(|e| failed("cannot make the container the root", e.into()))?,
        Err(e) => return Err(failed("cannot make the container the root", e.into())),
    }
    std::env::set_current_dir("/").map_err(|e| failed("cannot enter the new root", e))
}

/// Lets set-user-ID programs and device nodes work, sudo for one, in this namespace's copy of a mount in which
/// they have no effect because other users reach it: nobody else reaches this copy.
fn honor_privileges(root: &OwnedFd) -> rustix::io::Result<()> {
    let now = rustix::fs::fstatvfs(root)?.f_flag;
    let without = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    if !rustix::process::geteuid().is_root() || !now.intersects(without) {
        return Ok(());
    }
    let mut flags = MountFlags::BIND;
    for (has, flag) in [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    ] {
        flags.set(flag, now.contains(has));
    }
    let path = format!("/proc/self/fd/{}", root.as_raw_fd());
    rustix::mount::mount_remount(path, flags, "")
}

/// A mount namespace of our own; without root in a user namespace of our own, in which we are root.
fn own_namespace() -> Result<()> {
    let failed = |error: nix::Error| {
        Error::failed("cannot make a mount namespace")
            .because(error)
            .hint(
                "run as root, or where users may make namespaces (sysctl user.max_user_namespaces)",
            )
    };
    if rustix::process::geteuid().is_root() {
        return unshare(CloneFlags::CLONE_NEWNS).map_err(failed);
    }
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).map_err(failed)?;
    for (file, text) in [
        ("uid_map", format!("0 {} 1", uid.as_raw())),
        ("setgroups", "deny".to_owned()),
        ("gid_map", format!("0 {} 1", gid.as_raw())),
    ] {
        let path = PathBuf::from("/proc/self").join(file);
        std::fs::write(&path, text).map_err(|e| Error::at("write", &path, e))?;
    }
    Ok(())
}

/// A folder to mount over.
struct Target {
    path: PathBuf,
    _fd: OwnedFd,
}

/// The folder `name` of the container, if it is one: a container without /sys gets none.
fn folder(root: &OwnedFd, name: &str) -> Result<Option<Target>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(root.as_fd(), name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(Target {
            path: PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())),
            _fd: fd,
        })),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            log::info!("the container has no folder /{name}: nothing is mounted there");
            Ok(None)
        }
        Err(error) => Err(
            Error::failed(format!("cannot open /{name} of the container"))
                .because(std::io::Error::from(error)),
        ),
    }
}

fn read_only(at: &Path) -> rustix::io::Result<()> {
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    rustix::mount::mount_remount(at, flags, "")
}

/// Fills a small /dev: the host's devices that programs expect, its terminals, and shared memory.
fn devices(dev: &Path) -> std::io::Result<()> {
    for node in NODES {
        let (host, here) = (Path::new("/dev").join(node), dev.join(node));
        if host.symlink_metadata().is_ok() {
            std::fs::write(&here, b"")?;
            rustix::mount::mount_bind(&host, &here)?;
        }
    }
    for (name, target) in LINKS {
        symlink(target, dev.join(name))?;
    }
    for name in ["pts", "shm"] {
        let (host, here) = (Path::new("/dev").join(name), dev.join(name));
        if host.is_dir() {
            std::fs::create_dir(&here)?;
            rustix::mount::mount_bind_recursive(&host, &here)?;
        }
    }
    Ok(())
}
