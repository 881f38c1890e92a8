//! User namespaces of unprivileged users: creating one together with a mount namespace, and entering those of another
//! process.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags, fstat};
use rustix::ioctl::{Getter, Ioctl, IoctlOutput, Opcode};
use rustix::mount::MountPropagationFlags;
use rustix::thread::{CapabilitySet, capabilities};

use crate::error::Result;

/// The ioctl NS_GET_OWNER_UID.
const GET_OWNER: Opcode = rustix::ioctl::opcode::none(0xb7, 4);

/// An ioctl on a namespace without an argument, which returns a descriptor of a user namespace.
#[derive(Clone, Copy)]
enum GetUsers {
    /// NS_GET_USERNS: the user namespace that owns it.
    Owner,
    /// NS_GET_PARENT: the parent of a user namespace.
    Parent,
}

// SAFETY: the requests have no argument, so the kernel accesses no memory, and their result is a new descriptor.
unsafe impl Ioctl for GetUsers {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        let number = match self {
            Self::Owner => 1,
            Self::Parent => 2,
        };
        rustix::ioctl::opcode::none(0xb7, number)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _argument: *mut c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the kernel has just opened the descriptor for this process, and nothing else knows its number.
        Ok(unsafe { OwnedFd::from_raw_fd(RawFd::from(output)) })
    }
}

/// Returns whether this process is root of the system, or of a container with a root filesystem of its own.
///
/// Root of a user namespace that a plain user created is that user: system directories such as /var/lib belong to
/// another user, which has no id in the namespace.
pub fn is_system_root() -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let is_mapped_completely = std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]));
    is_mapped_completely || std::fs::metadata("/").is_ok_and(|meta| meta.uid() == 0)
}

/// The user namespace and the mount namespace of a process.
#[derive(Debug)]
pub struct UserNamespace {
    user: OwnedFd,
    mounts: OwnedFd,
    processes: OwnedFd,
}

impl UserNamespace {
    /// Opens the namespaces of a process.
    pub fn of(pid: u32) -> Result<Self> {
        let open = |name| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, format!("/proc/{pid}/ns/{name}"), flags, Mode::empty())
        };
        Ok(Self {
            user: open("user")?,
            mounts: open("mnt")?,
            processes: open("pid")?,
        })
    }

    /// Returns the user that created the user namespace, as an id of this process's user namespace.
    pub fn owner(&self) -> Result<u32> {
        // SAFETY: the kernel writes a uid_t, an u32, to the address that this request passes.
        let request = unsafe { Getter::<GET_OWNER, u32>::new() };
        // SAFETY: the descriptor is open, and the request only writes to the memory that it contains.
        Ok(unsafe { rustix::ioctl::ioctl(&self.user, request) }?)
    }

    /// Returns whether the user namespace was created in the one of this process, which is not the case for that
    /// namespace itself.
    pub fn is_child(&self) -> Result<bool> {
        // SAFETY: the descriptor is open, and the request accesses no memory.
        match unsafe { rustix::ioctl::ioctl(&self.user, GetUsers::Parent) } {
            Ok(parent) => Ok(is_same(&parent, "user")?),
            // The parent is outside of the namespaces that this process may know.
            Err(rustix::io::Errno::PERM) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns whether this process is in both the user namespace and the mount namespace.
    pub fn is_current(&self) -> Result<bool> {
        Ok(is_same(&self.user, "user")? && is_same(&self.mounts, "mnt")?)
    }

    /// Returns whether the process was in the same pid namespace as this process, and not in that of a container.
    pub fn shares_processes(&self) -> Result<bool> {
        Ok(is_same(&self.processes, "pid")?)
    }

    /// Enters both namespaces. The process must have a single thread; its working directory becomes `/`.
    ///
    /// The kernel permits it to the user that created the namespace.
    pub fn enter(&self) -> Result<()> {
        setns(self.user.as_fd(), CloneFlags::CLONE_NEWUSER)?;
        self.enter_mounts()
    }

    /// Enters the mount namespace. The process must be in the user namespace, and its working directory becomes `/`.
    pub fn enter_mounts(&self) -> Result<()> {
        setns(self.mounts.as_fd(), CloneFlags::CLONE_NEWNS)?;
        Ok(())
    }

    /// Enters the user namespace, and a new mount namespace with the current mounts.
    pub fn enter_with_own_mounts(&self) -> Result<()> {
        setns(self.user.as_fd(), CloneFlags::CLONE_NEWUSER)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        Ok(())
    }
}

/// Returns whether a namespace belongs to the user namespace of this process, not to one that was created in it.
pub fn is_owned(namespace: impl AsFd) -> Result<bool> {
    // SAFETY: the descriptor is open, and the request accesses no memory.
    match unsafe { rustix::ioctl::ioctl(namespace, GetUsers::Owner) } {
        Ok(owner) => Ok(is_same(&owner, "user")?),
        // The owner is outside of the namespaces that this process may know.
        Err(rustix::io::Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Returns whether the descriptor is that of a namespace of this process.
fn is_same(namespace: &OwnedFd, name: &str) -> rustix::io::Result<bool> {
    let own = rustix::fs::stat(format!("/proc/self/ns/{name}"))?;
    let found = fstat(namespace)?;
    Ok((own.st_dev, own.st_ino) == (found.st_dev, found.st_ino))
}

/// Creates a user namespace and a mount namespace that belongs to it, and enters both. The process must have a single
/// thread.
pub fn create() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    Ok(())
}

/// Makes mounts elsewhere appear in this mount namespace, and none of its own appear elsewhere.
pub fn receive_mounts() -> Result<()> {
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change(Path::new("/"), slave)?)
}

/// Moves this process to a copy of its mount namespace, whose mounts do not affect others.
pub fn copy_mounts() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(rustix::mount::mount_change(Path::new("/"), private)?)
}

/// Returns whether this process may mount file systems.
pub fn may_mount() -> Result<bool> {
    Ok(capabilities(None)?
        .effective
        .contains(CapabilitySet::SYS_ADMIN))
}
