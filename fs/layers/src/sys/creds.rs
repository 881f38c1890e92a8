//! Impersonates the caller of a request: file system user and group id, and umask, of the current thread.
//!
//! With the caller's file system ids, the layer's file system itself applies ownership, setgid directories, default
//! ACLs, and the clearing of setgid for callers outside of the group, as in a plain directory.

use std::cell::Cell;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getegid, geteuid, setfsgid, setfsuid};
use rustix::fs::Mode;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::error::{Errno, Error, Result};

thread_local! {
    /// The umask of this thread, if it has its own (unshare(2) with CLONE_FS).
    ///
    /// Otherwise a change would affect all threads of the process.
    static UMASK: Cell<Option<Mode>> = const { Cell::new(None) };
    /// The file system ids of this thread, once they were set. Setting an unchanged id costs as much as a change.
    static IDS: Cell<Option<(Uid, Gid)>> = const { Cell::new(None) };
}

/// Returns the file system ids of the current thread.
fn ids() -> (Uid, Gid) {
    // They initially equal the effective ids, which this process does not change.
    IDS.get().unwrap_or_else(|| (geteuid(), getegid()))
}

fn set_user(uid: Uid) {
    let (before, gid) = ids();
    if before != uid {
        setfsuid(uid);
    }
    IDS.set(Some((uid, gid)));
}

fn set_group(gid: Gid) {
    let (uid, before) = ids();
    if before != gid {
        setfsgid(gid);
    }
    IDS.set(Some((uid, gid)));
}

/// Returns the umask of this thread, which has its own from now on.
fn umask() -> Result<Mode> {
    if let Some(umask) = UMASK.get() {
        return Ok(umask);
    }
    unshare(CloneFlags::CLONE_FS).map_err(Error::from)?;
    // umask(2) returns the value only when it changes it.
    let umask = rustix::process::umask(Mode::RWXU | Mode::RWXG | Mode::RWXO);
    rustix::process::umask(umask);
    UMASK.set(Some(umask));
    Ok(umask)
}

/// Sets the umask of a thread that has its own.
fn set_umask(umask: Mode) {
    if UMASK.replace(Some(umask)) != Some(umask) {
        rustix::process::umask(umask);
    }
}

/// The caller of a request, with ids as in the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The file system user id.
    pub uid: u32,
    /// The file system group id.
    pub gid: u32,
    /// The umask, which does not apply if the directory has a default ACL.
    pub umask: u32,
}

/// Restores the ids and the umask of the thread when it is dropped, also on errors and panics.
struct Restore {
    uid: Uid,
    gid: Gid,
    umask: Mode,
}

impl Drop for Restore {
    fn drop(&mut self) {
        // Restore the user first, because setting the group needs its capabilities.
        set_user(self.uid);
        set_group(self.gid);
        set_umask(self.umask);
    }
}

fn enter(caller: Identity) -> Result<Restore> {
    let umask = umask()?;
    let (uid, gid) = ids();
    set_umask(Mode::from_raw_mode(caller.umask & 0o777));
    set_group(Gid::from_raw(caller.gid));
    set_user(Uid::from_raw(caller.uid));
    Ok(Restore { uid, gid, umask })
}

/// Runs `make`, which creates an object with the mode that it gets, like [`as_caller`], but retains a setgid bit in it.
///
/// The kernel has already decided whether the caller may set it, and unlike the layer's file system it knows the
/// caller's supplementary groups.
pub fn as_creator<T>(
    caller: Identity,
    mode: u32,
    mut make: impl FnMut(u32) -> Result<T>,
) -> Result<T> {
    as_caller(caller, || {
        // Each change of the capabilities takes as long as several other system calls.
        if caller.uid == 0 || !Mode::from_raw_mode(mode).contains(Mode::SGID) {
            make(mode)
        } else {
            with_added(CapabilitySet::FSETID, || make(mode))
        }
    })
}

/// Runs `make` with the caller's ids and umask.
///
/// If it fails with EACCES or EPERM for a caller other than root, it is retried with capabilities of the daemon: the
/// kernel has already granted the operation to the caller, which may have CAP_DAC_OVERRIDE or CAP_MKNOD.
pub fn as_caller<T>(caller: Identity, mut make: impl FnMut() -> Result<T>) -> Result<T> {
    let _restore = enter(caller)?;
    match make() {
        Err(Error::Errno(Errno::ACCESS | Errno::PERM)) if caller.uid != 0 => with_added(
            CapabilitySet::DAC_OVERRIDE | CapabilitySet::MKNOD | CapabilitySet::FOWNER,
            make,
        ),
        other => other,
    }
}

/// Runs `act` without CAP_FSETID and with `group` as the file system group id.
///
/// The layer's file system then clears setuid and setgid as for a caller without that capability. For a member of the
/// file's group it retains the setgid bit of a file that is not group-executable.
pub fn dropping_setid<T>(group: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    struct RestoreGroup(Gid);
    impl Drop for RestoreGroup {
        fn drop(&mut self) {
            set_group(self.0);
        }
    }
    let _restore = RestoreGroup(ids().1);
    set_group(Gid::from_raw(group));
    without_setid(act)
}

/// Runs `act` without CAP_FSETID.
pub fn without_setid<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = capabilities(None)?;
    let mut less = before;
    less.effective -= CapabilitySet::FSETID;
    set_capabilities(None, less)?;
    let result = act();
    set_capabilities(None, before)?;
    result
}

fn with_added<T>(more: CapabilitySet, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = capabilities(None)?;
    let mut raised = before;
    raised.effective |= more & before.permitted;
    set_capabilities(None, raised)?;
    let result = act();
    set_capabilities(None, before)?;
    result
}
