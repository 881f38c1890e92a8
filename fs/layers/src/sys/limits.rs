//! The resource limits, the OOM score and the capabilities of this process.
//!
//! They are inherited by threads that are started later, so they are set before the first one.
#![allow(unsafe_code)]

use std::os::fd::BorrowedFd;

use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::process::{Resource, Rlimit, configure_io_flusher_behavior, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};

use crate::error::Result;

/// The largest useful number of open files: the default of fs.nr_open, the kernel's limit for RLIMIT_NOFILE.
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Removes a resource limit, or raises its soft limit to the hard limit. Returns whether no limit is left.
pub fn remove_limit(resource: Resource) -> bool {
    let limit = getrlimit(resource);
    if limit.current.is_none() {
        return true;
    }
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    if setrlimit(resource, unlimited).is_ok() {
        return true;
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(resource, raised).is_ok() && limit.maximum.is_none()
}

/// Raises the hard limit of open files to [`MAX_OPEN_FILES`] if permitted, and the soft limit to the hard one.
///
/// Returns the soft limit.
pub fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = |most: Option<u64>| Rlimit {
        current: most,
        maximum: most,
    };
    let most = limit.maximum.map(|hard| hard.max(MAX_OPEN_FILES));
    if setrlimit(Resource::Nofile, raised(most)).is_err()
        && setrlimit(Resource::Nofile, raised(limit.maximum)).is_err()
    {
        log::debug!("cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes the kernel's table of this process's descriptors large enough for the numbers below `count`.
///
/// In a process with several threads, the kernel waits for an RCU grace period, which is several milliseconds, each time
/// the table grows (`expand_fdtable`). So this must be called before a second thread is started.
pub fn expand_descriptor_table(any: BorrowedFd<'_>, count: u64) {
    let last = i32::try_from(count.saturating_sub(1)).unwrap_or(i32::MAX);
    if let Err(error) = rustix::io::fcntl_dupfd_cloexec(any, last) {
        // The table grows later then, beside requests.
        log::debug!("cannot expand the table of descriptors: {error}");
    }
}

/// Ignores the signals of resource limits that could not be removed.
///
/// Without SIGXFSZ, a write beyond the size limit fails with EFBIG. Without SIGXCPU, the process runs until the hard limit
/// of CPU time.
pub fn ignore_limit_signals() -> Result<()> {
    for limit in [Signal::SIGXFSZ, Signal::SIGXCPU] {
        // SAFETY: SIG_IGN installs no handler, so no code of this process runs in signal context.
        unsafe { signal(limit, SigHandler::SigIgn) }?;
    }
    Ok(())
}

/// Sets the adjustment of the OOM score, from -1000 (never killed) to 1000.
pub fn set_oom_score(adjustment: i32) -> std::io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", adjustment.to_string())
}

/// Marks the process as one that the kernel needs to write back dirty pages (PR_SET_IO_FLUSHER).
///
/// Its memory allocations then do not wait for writeback, which may wait for this process.
pub fn set_io_flusher() -> Result<()> {
    Ok(configure_io_flusher_behavior(true)?)
}

/// Drops all capabilities except these from every set of the calling thread.
pub fn keep_capabilities(kept: CapabilitySet) -> Result<()> {
    let mut sets = capabilities(None)?;
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        for dropped in (CapabilitySet::all() - kept).iter() {
            // An older kernel does not know the newest capabilities.
            if let Err(error) = remove_capability_from_bounding_set(dropped) {
                log::debug!("cannot drop {dropped:?} from the bounding set: {error}");
            }
        }
    }
    clear_ambient_capability_set()?;
    sets.effective &= kept;
    sets.permitted &= kept;
    sets.inheritable &= kept;
    Ok(set_capabilities(None, sets)?)
}
