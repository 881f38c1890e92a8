//! The inner process of exec.
//!
//! It makes the mounted container the root of a private mount namespace, with the host's /proc, /sys and /dev, and
//! executes the command. With an id map, and as a user of the container, the command also has a pid namespace and a /proc
//! of its own.
//!
//! The old root is detached, so that the namespace has no copy of any other mount: a command that runs here
//! keeps no other mount busy. Mount points in the container are opened without following symbolic links,
//! because a link in the container may point anywhere.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::SigSet;
use rustix::fs::{
    AtFlags, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxAttributes, StatxFlags,
};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use cowl_layers::shown::Show as _;
use cowl_layers::sys::pid_namespace::{self, Init};
use cowl_layers::sys::users::Device;
use cowl_layers::sys::{open, private};

use super::identity::Identity;
use super::mapping;
use crate::error::{Error, Result};
use crate::lxc::config::IdMap;

/// The exit code for a failure of cowl itself.
pub const FAILED: u8 = 125;
/// The exit code for a command that cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;
/// The exit code for a command that does not exist.
pub const NOT_FOUND: u8 = 127;

/// Device nodes that programs expect.
const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Symbolic links in /dev that programs expect.
const LINKS: [(&str, &str); 5] = [
    // Not the host's node, which finds terminals only next to the original mount.
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// The settings of a command that is the process of the container's image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessSettings {
    /// Whether the command is that process. Its environment contains nothing of the caller's.
    pub is_of_image: bool,
    /// The variables of the environment, as `NAME=VALUE`.
    pub environment: Vec<String>,
    /// `USER[:GROUP]`, names or numbers.
    pub user: Option<String>,
    /// The working directory.
    pub directory: Option<String>,
}

impl ProcessSettings {
    /// Changes this process, whose root is the container, and the environment of the command.
    fn apply(&self, identity: Option<&Identity>, command: &mut Command) -> Result<()> {
        if let Some(directory) = &self.directory {
            let path = Path::new("/").join(directory);
            enter_directory(&path).map_err(|error| {
                let error = std::io::Error::from(error);
                Error::at("enter the directory of the image", &path, error)
            })?;
        }
        if let Some(identity) = identity {
            command.env("HOME", &identity.home);
            match &identity.name {
                Some(name) => command.env("USER", name),
                None => command.env_remove("USER"),
            };
            identity.take()?;
            // The new keyring belongs to the new user.
            mapping::leave_session_keyring()?;
        }
        let split = self
            .environment
            .iter()
            .filter_map(|one| one.split_once('='));
        command.envs(split);
        Ok(())
    }
}

/// Makes a directory of the container the current one. The links in /proc, which lead out of it, are not followed.
fn enter_directory(path: &Path) -> rustix::io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open("/", flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let directory = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve)?;
    rustix::process::fchdir(&directory)
}

/// Executes `command` inside the mount at `mountpoint`, in a user namespace with this map unless it is empty. `device` is
/// the file system that must be mounted there: major and minor number, separated by a colon.
///
/// Returns only on failure, with the exit code and the error.
pub fn enter(
    (mountpoint, device): (&Path, Option<&str>),
    map: &IdMap,
    command: &[OsString],
    process: &ProcessSettings,
) -> (u8, Error) {
    let Some((program, args)) = command.split_first() else {
        return (FAILED, Error::usage("no command to run"));
    };
    let entered = change_root((mountpoint, device), map, process.user.as_deref());
    let started = entered.and_then(|(init, identity)| {
        if let Some(init) = init {
            init.start_command().map_err(|error| {
                Error::failed("cannot start a process for the command").because(error)
            })?;
            mapping::leave_session()?;
        }
        Ok(identity)
    });
    let identity = match started {
        Ok(identity) => identity,
        Err(error) => return (FAILED, error),
    };
    // `exec` blocks signals in its own process, and a child inherits the mask.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        let message = "cannot unblock signals for the command";
        return (FAILED, Error::failed(message).because(error));
    }
    let mut command = Command::new(program);
    if !map.is_empty() || process.is_of_image {
        command.env_clear().envs(mapping::environment());
    }
    if let Err(error) = process.apply(identity.as_ref(), &mut command) {
        return (FAILED, error);
    }
    let error = command.args(args).exec();
    let code = match error.kind() {
        ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    };
    let message = format!("cannot run {} in the container", program.shown());
    (code, Error::failed(message).because(error))
}

/// Makes the mounted container the root directory. With an id map, or for a user of the container, continues in the init of
/// a new pid namespace. Returns the ids of that user.
fn change_root(
    (mountpoint, device): (&Path, Option<&str>),
    map: &IdMap,
    user: Option<&str>,
) -> Result<(Option<Init>, Option<Identity>)> {
    let failed =
        |message: &str, error: std::io::Error| Error::failed(message.to_owned()).because(error);
    unshare_namespace()?;
    let recursive = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", recursive).map_err(private_error)?;
    let (mut root, mut init) = (open_root(mountpoint)?, None);
    require_mounted(&root, mountpoint, device)?;
    let is_mapped = !map.is_empty();
    honor_privileges(&root, map)
        .map_err(|e| failed("cannot enable set-user-ID programs", e.into()))?;
    // Needs the host's /proc.
    let identity = user.map(|user| Identity::resolve(root.as_fd(), user));
    let identity = identity.transpose()?;
    let namespace_error = |error: std::io::Error| failed("cannot create a pid namespace", error);
    if let (Some(identity), false) = (&identity, is_mapped) {
        // The user of the image is not trusted by the user of this process either.
        mapping::hide_descriptors()?;
        mapping::deny_input_to_terminals()?;
        identity.own_terminal()?;
        init = Some(pid_namespace::enter().map_err(namespace_error)?);
    }
    if is_mapped {
        mapping::hide_descriptors()?;
        mapping::enter_namespace(map)?;
        // The namespace has copies of the mounts, which cannot be moved. The descriptor refers to the original.
        rustix::mount::mount_bind_recursive(mountpoint, mountpoint)
            .map_err(|e| failed("cannot mount the container in its namespace", e.into()))?;
        root = open_root(mountpoint)?;
        require_mounted(&root, mountpoint, device)?;
        mapping::become_root()?;
        if let Some(identity) = &identity {
            identity.own_terminal()?;
        }
        init = Some(pid_namespace::enter().map_err(namespace_error)?);
    }
    match &init {
        None => bind_proc(&root),
        Some(_) => mount_own_proc(&root),
    }?;
    mount_sys_and_dev(&root, map)?;
    rustix::process::fchdir(&root)
        .map_err(|e| Error::at("enter", mountpoint, std::io::Error::from(e)))?;
    drop(root);
    match rustix::process::pivot_root(".", ".") {
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH)
            .map_err(|e| failed("cannot unmount the old root", e.into()))?,
        // The initial ramfs cannot be moved by pivot_root.
        Err(rustix::io::Errno::INVAL) if !is_mapped => rustix::process::chroot(".")
            .map_err(|e| failed("cannot make the container the root", e.into()))?,
        Err(e) => return Err(failed("cannot make the container the root", e.into())),
    }
    std::env::set_current_dir("/").map_err(|e| failed("cannot enter the new root", e))?;
    Ok((init, identity))
}

fn private_error(error: rustix::io::Errno) -> Error {
    let failed = Error::failed("cannot make the namespace's mounts private")
        .because(std::io::Error::from(error));
    match error {
        rustix::io::Errno::INVAL => failed.hint(
            "cowl runs in a chroot whose root directory is not a mount point: leave it, type \
             `mount --bind DIR DIR` with its directory, and enter it again",
        ),
        _ => failed,
    }
}

fn proc_error(error: rustix::io::Errno) -> Error {
    Error::failed("cannot mount /proc").because(std::io::Error::from(error))
}

/// Mounts the host's /proc.
fn bind_proc(root: &OwnedFd) -> Result<()> {
    if let Some(at) = open_dir(root, "proc")? {
        rustix::mount::mount_bind_recursive("/proc", &at.path).map_err(proc_error)?;
    }
    Ok(())
}

/// The parts of /proc by which the whole machine is changed.
const READ_ONLY_IN_PROC: [&str; 2] = ["sys", "sysrq-trigger"];

/// Mounts a /proc of the pid namespace, whose /proc/sys and /proc/sysrq-trigger are read-only.
fn mount_own_proc(root: &OwnedFd) -> Result<()> {
    let Some(at) = open_dir(root, "proc")? else {
        return Ok(());
    };
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    match rustix::mount::mount("proc", &at.path, "proc", flags, c"") {
        // A user namespace may not mount a /proc that shows more than the one it has, of which a container hides parts.
        Err(rustix::io::Errno::PERM) => {
            log::warn!(
                "the command sees the processes of the machine in /proc: a part of /proc is hidden here, so the kernel \
                 permits no new one"
            );
            return bind_proc(root);
        }
        other => other.map_err(proc_error)?,
    }
    // The descriptor refers to the directory below the new mount, so open it again.
    let Some(mounted) = open_dir(root, "proc")? else {
        return Ok(());
    };
    for name in READ_ONLY_IN_PROC {
        let open = || {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(mounted.fd.as_fd(), name, flags, Mode::empty())
        };
        let path = |fd: &OwnedFd| format!("/proc/self/fd/{}", fd.as_raw_fd());
        match open() {
            Ok(below) => {
                rustix::mount::mount_bind(path(&below), path(&below)).map_err(proc_error)?;
            }
            // A kernel without SysRq.
            Err(rustix::io::Errno::NOENT) => continue,
            Err(error) => return Err(proc_error(error)),
        }
        let mounted = open().map_err(proc_error)?;
        remount_read_only(Path::new(&path(&mounted))).map_err(proc_error)?;
    }
    Ok(())
}

/// Mounts /sys read-only, and a small /dev.
fn mount_sys_and_dev(root: &OwnedFd, map: &IdMap) -> Result<()> {
    let failed =
        |message: &str, error: std::io::Error| Error::failed(message.to_owned()).because(error);
    if let Some(at) = open_dir(root, "sys")? {
        let failed = |e: rustix::io::Errno| failed("cannot mount /sys", e.into());
        match rustix::mount::mount_bind("/sys", &at.path) {
            Ok(()) => {
                // The descriptor refers to the directory below the new mount, so open it again.
                if let Some(mounted) = open_dir(root, "sys")? {
                    remount_read_only(&mounted.path).map_err(failed)?;
                }
            }
            // A user namespace may bind /sys only together with the mounts below it.
            Err(rustix::io::Errno::INVAL) => {
                rustix::mount::mount_bind_recursive("/sys", &at.path).map_err(failed)?;
                if let Some(mounted) = open_dir(root, "sys")? {
                    let restricted = private::restrict_tree(mounted.fd.as_fd());
                    let message = "cannot make /sys read-only";
                    restricted.map_err(|e| Error::failed(message).because(e))?;
                }
            }
            Err(error) => return Err(failed(error)),
        }
    }
    if let Some(at) = open_dir(root, "dev")? {
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        let size = c"mode=755,size=64k";
        rustix::mount::mount("tmpfs", &at.path, "tmpfs", flags, size)
            .map_err(|e| failed("cannot mount /dev", e.into()))?;
        if let Some(mounted) = open_dir(root, "dev")? {
            populate_dev(&mounted.path, map).map_err(|e| failed("cannot populate /dev", e))?;
        }
    }
    Ok(())
}

/// Opens the root directory of the mounted container. The path has no symbolic links.
fn open_root(mountpoint: &Path) -> Result<OwnedFd> {
    open::exact_dir(mountpoint).map_err(|error| {
        let error = std::io::Error::from_raw_os_error(error.errno().raw_os_error());
        Error::at("enter", mountpoint, error)
    })
}

/// Fails if the container is not mounted at the mount point.
///
/// Race: another command may have unmounted the container since `exec` has mounted it. Then the command would run in the
/// empty directory below. Or another user may have replaced a directory in the path, by one with programs of that user.
fn require_mounted(root: &OwnedFd, mountpoint: &Path, device: Option<&str>) -> Result<()> {
    let found = Device::from_fd(root).map_err(|error| {
        let error = std::io::Error::from_raw_os_error(error.errno().raw_os_error());
        Error::at("inspect", mountpoint, error)
    })?;
    if device.is_some_and(|device| device != format!("{}:{}", found.major, found.minor)) {
        return Err(unmounted(mountpoint));
    }
    let stat = rustix::fs::statx(root, "", AtFlags::EMPTY_PATH, StatxFlags::empty())
        .map_err(|e| Error::at("stat", mountpoint, std::io::Error::from(e)))?;
    let attribute = StatxAttributes::MOUNT_ROOT;
    // Linux before 5.8 does not report the attribute.
    if stat.stx_attributes.contains(attribute) || !stat.stx_attributes_mask.contains(attribute) {
        return Ok(());
    }
    Err(unmounted(mountpoint))
}

fn unmounted(mountpoint: &Path) -> Error {
    let message = format!(
        "the container is busy: another command has unmounted it from {}",
        mountpoint.shown()
    );
    Error::failed(message).hint("run the command again")
}

/// Enables set-user-ID programs such as sudo, and device nodes, in this namespace's copy of the mount.
///
/// Mounts that other users can reach disable them; no other user can reach this copy. With an id map, device nodes remain
/// disabled: the root of such a container cannot create any, and must not open those of an image.
fn honor_privileges(root: &OwnedFd, map: &IdMap) -> rustix::io::Result<()> {
    let now = rustix::fs::fstatvfs(root)?.f_flag;
    let without = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    if !rustix::process::geteuid().is_root() || (map.is_empty() && !now.intersects(without)) {
        return Ok(());
    }
    let mut flags = MountFlags::BIND;
    flags.set(MountFlags::NODEV, !map.is_empty());
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

/// Creates a mount namespace, and, unless run by root, a user namespace in which the caller is root.
fn unshare_namespace() -> Result<()> {
    let failed = |error: nix::Error| {
        Error::failed("cannot create a mount namespace")
            .because(error)
            .hint(
                "run as root, or allow users to create namespaces (sysctl user.max_user_namespaces)",
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

/// A directory to mount on.
struct MountTarget {
    path: PathBuf,
    fd: OwnedFd,
}

/// Opens the directory `name` of the container.
///
/// `None` if it does not exist or is not a directory.
fn open_dir(root: &OwnedFd, name: &str) -> Result<Option<MountTarget>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(root.as_fd(), name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(MountTarget {
            path: PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())),
            fd,
        })),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            log::info!("the container has no directory /{name}: it is not mounted");
            Ok(None)
        }
        Err(error) => Err(
            Error::failed(format!("cannot open /{name} in the container"))
                .because(std::io::Error::from(error)),
        ),
    }
}

fn remount_read_only(at: &Path) -> rustix::io::Result<()> {
    let flags = MountFlags::BIND
        | MountFlags::RDONLY
        | MountFlags::NOSUID
        | MountFlags::NODEV
        | MountFlags::NOEXEC;
    rustix::mount::mount_remount(at, flags, "")
}

/// Populates a small /dev: the device nodes that programs expect, terminals, and shared memory. With an id map, the last
/// two are not those of the host.
fn populate_dev(dev: &Path, map: &IdMap) -> std::io::Result<()> {
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
    if !map.is_empty() {
        return mapping::populate_dev(dev);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_does_not_run_below_an_unmounted_mount_point() {
        let open = |path: &Path| OwnedFd::from(std::fs::File::open(path).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let error = require_mounted(&open(dir.path()), dir.path(), None).unwrap_err();
        assert!(error.to_string().contains("busy"), "{error}");
        let proc = Path::new("/proc");
        require_mounted(&open(proc), proc, None).unwrap();
        require_mounted(&open(proc), proc, Some("1:1")).unwrap_err();
    }
}
