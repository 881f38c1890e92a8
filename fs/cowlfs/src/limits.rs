//! The limits and privileges of the daemon, which must not depend on the shell that started it.
//!
//! Otherwise the shell's `ulimit -f` kills the daemon with SIGXFSZ when a program in the container writes a large file.

use cowl_layers::sys::limits;
use rustix::process::Resource;
use rustix::thread::CapabilitySet;

/// The limits that are removed, with the names that `status` reports if they cannot be.
const REMOVED: [(Resource, &str); 7] = [
    // SIGXFSZ, or EFBIG for a file that the user of the mount may write.
    (Resource::Fsize, "no-limit-fsize"),
    // SIGXCPU after that much CPU time.
    (Resource::Cpu, "no-limit-cpu"),
    // No thread can be started.
    (Resource::Nproc, "no-limit-nproc"),
    // Allocations fail, which ends the process.
    (Resource::As, "no-limit-as"),
    (Resource::Data, "no-limit-data"),
    (Resource::Memlock, "no-limit-memlock"),
    (Resource::Locks, "no-limit-locks"),
];

/// The adjustment of the OOM score. The process is killed only if nothing else can be: every program in the container
/// depends on it.
const OOM_SCORE: i32 = -900;

/// The capabilities that the daemon needs.
///
/// CAP_SYS_RESOURCE is not among them. As with kernel overlayfs, the disk quota of a user and the reserved blocks of a
/// file system hold for writes through the mount.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    // open_by_handle_at(2).
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    // The signal that requests another daemon to check its mount.
    .union(CapabilitySet::KILL)
    // File system ids of the caller of a request.
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    // security.capability.
    .union(CapabilitySet::SETFCAP)
    // trusted.* xattrs, mounts, namespaces, passthrough.
    .union(CapabilitySet::SYS_ADMIN)
    // setns(2) to a mount namespace.
    .union(CapabilitySet::SYS_CHROOT)
    // /proc/PID of the callers of requests: groups, capabilities, user namespace.
    .union(CapabilitySet::SYS_PTRACE)
    // Labels of security modules.
    .union(CapabilitySet::MAC_ADMIN)
    .union(CapabilitySet::MAC_OVERRIDE);

/// Sets the limits of this process and drops the privileges that it does not need.
///
/// Returns the names of the settings that it may not change, as a plain user's process or one in a user namespace. To be
/// called before the process has a second thread.
pub(crate) fn set_up() -> Vec<String> {
    let mut lacking = Vec::new();
    let mut note = |name: &str, is_set: bool| {
        if !is_set {
            lacking.push(name.to_owned());
        }
    };
    limits::raise_open_files();
    for (resource, name) in REMOVED {
        note(name, limits::remove_limit(resource));
    }
    if let Err(error) = limits::ignore_limit_signals() {
        log::warn!("cannot ignore the signals of resource limits: {error}");
    }
    note("oom-score", limits::set_oom_score(OOM_SCORE).is_ok());
    note("io-flusher", limits::set_io_flusher().is_ok());
    if let Err(error) = limits::keep_capabilities(CAPABILITIES) {
        log::warn!("cannot drop capabilities: {error}");
        note("drop-capabilities", false);
    }
    lacking
}
