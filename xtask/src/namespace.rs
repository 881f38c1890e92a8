//! A mount namespace of the tests' own: what other programs of the machine do meanwhile, such as making mount
//! namespaces, copies none of the tests' mounts, so that no file system of a test stays busy by it.

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::run::note;

/// Moves this process, and all that it starts, to a mount namespace of its own. What is mounted outside
/// meanwhile appears in it; what is mounted in it shows nowhere else. Without the right to it, nothing changes.
pub(crate) fn enter() {
    let was_shared = root_is_shared();
    let moved = unshare(CloneFlags::CLONE_NEWNS)
        .map_err(std::io::Error::from)
        .and_then(|()| {
            let all = MountPropagationFlags::REC;
            mount_change("/", MountPropagationFlags::DOWNSTREAM | all)?;
            // Namespaces that tests make in turn follow this one as they follow the machine's own.
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
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut mounts = table.lines().map(|line| line.split(' '));
    mounts.any(|mut fields| {
        fields.nth(4) == Some("/") && fields.any(|field| field.starts_with("shared:"))
    })
}
