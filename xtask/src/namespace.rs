//! A mount namespace for the tests. Other programs that create mount namespaces do not copy the tests' mounts, which
//! would keep the tests' file systems busy.

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::run::note;

/// Moves this thread and the processes that it starts to a new mount namespace. Mounts of the host propagate into it, but not out of
/// it. Without the privilege, nothing changes.
pub(crate) fn enter() {
    let was_shared = root_is_shared();
    let moved = unshare(CloneFlags::CLONE_NEWNS)
        .map_err(std::io::Error::from)
        .and_then(|()| {
            let all = MountPropagationFlags::REC;
            mount_change("/", MountPropagationFlags::DOWNSTREAM | all)?;
            // Mount namespaces that tests create then relate to this one as they would to that of the host.
            if was_shared {
                mount_change("/", MountPropagationFlags::SHARED | all)?;
            }
            Ok(())
        });
    if let Err(error) = moved {
        note(&format!(
            "the tests share the machine's mount namespace: {error}"
        ));
    }
}

fn root_is_shared() -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let mut mounts = table.lines().map(|line| line.split(' '));
    mounts.any(|mut fields| {
        fields.nth(4) == Some("/") && fields.any(|field| field.starts_with("shared:"))
    })
}
