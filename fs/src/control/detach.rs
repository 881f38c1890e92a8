//! Ending a mount at once, whatever the size of its caches, but only when nobody uses it anywhere.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;

use super::{Answer, Place};
use crate::error::Errno;
use crate::overlay::Overlay;
use crate::shown::Show as _;
use crate::sys;

/// Unmounts. What is returned beside the answer is to be dropped after the answer was sent: it keeps
/// the file system alive, and with it this process.
pub(super) fn detach(overlay: &Overlay, place: &Place) -> (Answer, Option<OwnedFd>) {
    match try_detach(overlay, place) {
        Ok(alive) => (Answer::Done, Some(alive)),
        Err(answer) => (answer, None),
    }
}

fn try_detach(overlay: &Overlay, place: &Place) -> Result<OwnedFd, Answer> {
    let failed = |what: &'static str| {
        move |error: crate::Error| Answer::Failed {
            why: format!("cannot {what} {}: {error}", place.path.shown()),
        }
    };
    if !place.is_ours() {
        let why = format!("{} is not this mount any more", place.path.shown());
        return Err(Answer::Failed { why });
    }
    // Copies in other mount namespaces would go on being written. Those that follow this one are
    // unmounted with it, so what counts is what is left afterwards; this first look spares a needless
    // unmount.
    let before = users_elsewhere(place.device);
    // A second mount of the same file system keeps it alive, so that the unmount need not wait until
    // the kernel has dropped every cached inode.
    let alive = sys::mount::keep_alive(&place.path).map_err(failed("hold"))?;
    match sys::mount::unmount(&place.path) {
        Ok(()) => {}
        Err(error) if error.errno() == Errno::BUSY => {
            return Err(Answer::InUse { pids: Vec::new() });
        }
        Err(error) => return Err(failed("unmount")(error)),
    }
    let elsewhere = if before.len() > 1 {
        users_elsewhere(place.device)
    } else {
        Vec::new()
    };
    let refused = if !elsewhere.is_empty() {
        Some(Answer::InUse { pids: elsewhere })
    } else {
        let writing = overlay.retire().err();
        writing.map(|writers| Answer::Busy { writers })
    };
    match refused {
        None => Ok(alive),
        Some(answer) => {
            sys::mount::attach(&alive, &place.path).map_err(failed("put back the mount at"))?;
            Err(answer)
        }
    }
}

/// One process of each mount namespace that has a mount of this device.
fn users_elsewhere(dev: u64) -> Vec<u32> {
    let device = format!("{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    let mut seen: HashSet<OsString> = HashSet::new();
    let mut users = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else {
        return users;
    };
    // A process that ends meanwhile uses nothing: what can't be read is passed over.
    for process in processes.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(namespace) = fs::read_link(process.path().join("ns/mnt")) else {
            continue;
        };
        if !seen.insert(namespace.into_os_string()) {
            continue;
        }
        let Ok(mounts) = fs::read_to_string(process.path().join("mountinfo")) else {
            continue;
        };
        if mounts
            .lines()
            .any(|line| line.split(' ').nth(2) == Some(&device))
        {
            users.push(pid);
        }
    }
    users
}
