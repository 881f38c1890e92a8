//! Acting as the caller of a request: owner, group and umask of what a thread makes.
//!
//! With the caller's file system ids in place the layer's own file system does what it would do for
//! a plain folder: ownership, setgid folders, default ACLs, the drop of setgid for outsiders.

use std::cell::Cell;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, getegid, geteuid, setfsgid, setfsuid};
use rustix::fs::Mode;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::error::{Errno, Error, Result};

thread_local! {
    /// Whether this thread has its own umask (CLONE_FS undone), without which a change of it would
    /// be seen by every thread of the process.
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
    /// The file system ids of this thread, once they were set: to set what is there costs as much as a change.
    static IDS: Cell<Option<(Uid, Gid)>> = const { Cell::new(None) };
}

/// The file system ids that the calling thread has.
fn ids() -> (Uid, Gid) {
    // A thread starts with the effective ones, which this process does not change.
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

/// Who is behind a request, in the layers' ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// File system user id.
    pub uid: u32,
    /// File system group id.
    pub gid: u32,
    /// Bits that a new object's mode loses, unless the folder has a default ACL.
    pub umask: u32,
}

/// Puts the thread's own ids back, whatever happened in between.
struct Restore {
    uid: Uid,
    gid: Gid,
    umask: Mode,
}

impl Drop for Restore {
    fn drop(&mut self) {
        // The order matters: the user first, so that the right to set the group is back.
        set_user(self.uid);
        set_group(self.gid);
        rustix::process::umask(self.umask);
    }
}

fn enter(who: Identity) -> Result<Restore> {
    if !OWN_UMASK.get() {
        unshare(CloneFlags::CLONE_FS).map_err(Error::from)?;
        OWN_UMASK.set(true);
    }
    let umask = rustix::process::umask(Mode::from_raw_mode(who.umask & 0o777));
    let (uid, gid) = ids();
    set_group(Gid::from_raw(who.gid));
    set_user(Uid::from_raw(who.uid));
    Ok(Restore { uid, gid, umask })
}

/// Runs `make` as [`as_caller`] does, but keeps a setgid bit that is asked for: whether the caller may
/// have it was decided by the kernel, which knows the caller's supplementary groups.
pub fn as_creator<T>(who: Identity, mut make: impl FnMut() -> Result<T>) -> Result<T> {
    as_caller(who, || {
        if who.uid == 0 {
            make()
        } else {
            with_added(CapabilitySet::FSETID, &mut make)
        }
    })
}

/// Runs `make` with the caller's ids and umask. When the layer refuses it for lack of a right that
/// the kernel already granted to the caller (a process with CAP_DAC_OVERRIDE or CAP_MKNOD that is not
/// root), it is run once more with our own rights added.
pub fn as_caller<T>(who: Identity, mut make: impl FnMut() -> Result<T>) -> Result<T> {
    let _restore = enter(who)?;
    match make() {
        Err(Error::Errno(Errno::ACCESS | Errno::PERM)) if who.uid != 0 => with_added(
            CapabilitySet::DAC_OVERRIDE | CapabilitySet::MKNOD | CapabilitySet::FOWNER,
            make,
        ),
        other => other,
    }
}

/// Runs `act` without CAP_FSETID, so that the layer drops setuid and setgid as it does for a caller
/// without that right; as a member of `group`, which keeps the setgid bit of a file that belongs to it
/// and that the group may not execute.
pub fn dropping_setid<T>(group: u32, act: impl FnOnce() -> Result<T>) -> Result<T> {
    struct Back(Gid);
    impl Drop for Back {
        fn drop(&mut self) {
            set_group(self.0);
        }
    }
    let _back = Back(ids().1);
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
