//! The file system of the store: space, xattrs, shared blocks, whiteouts.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;

use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;

use super::Finding;
use crate::host::mountinfo;

/// The free space below which a warning is given, in bytes.
const LITTLE: u64 = 1 << 30;

/// The name of the xattr that is tried. Layers have their markers in the same namespace.
const MARK: [&[u8]; 2] = [b"user.overlay.doctor", b"trusted.overlay.doctor"];

pub(super) fn examine(dir: &Path) -> Vec<Finding> {
    let mut found = vec![space(dir)];
    match tempfile::tempdir_in(dir) {
        Ok(scratch) => found.extend([
            xattrs(scratch.path()),
            shared_blocks(scratch.path()),
            whiteouts(scratch.path()),
        ]),
        Err(error) => found.push(
            Finding::broken(
                "store",
                format!("cannot create a directory in {}: {error}", dir.shown()),
            )
            .remedy("choose another directory: cowl --store DIR, or COWL_STORE; or run as root"),
        ),
    }
    found
}

fn space(dir: &Path) -> Finding {
    let kind = file_system(dir);
    let free = match rustix::fs::statvfs(dir) {
        Ok(found) => found.f_bavail.saturating_mul(found.f_frsize),
        Err(error) => {
            let detail = format!("cannot inspect {}: {error}", dir.shown());
            return Finding::broken("space", detail);
        }
    };
    let detail = format!("{} on {kind}: {} MiB free", dir.shown(), free >> 20);
    match free < LITTLE {
        false => Finding::works("space", detail),
        true => Finding::limited("space", detail, "changes in containers may fail soon").remedy(
            "free space: cowl du; cowl prune NAME; cowl gc --empty-trash --empty-transfers",
        ),
    }
}

/// Returns the type of the file system that contains `dir`.
fn file_system(dir: &Path) -> String {
    mountinfo::find_containing(dir).map_or_else(
        |_| "an unknown file system".to_owned(),
        |mount| mount.kind.shown().to_string(),
    )
}

fn xattrs(scratch: &Path) -> Finding {
    let is_root = crate::host::rootless::is_system_root();
    let tried = MARK.map(|name| (name, set_mark(scratch, name)));
    let failed: Vec<_> = tried
        .iter()
        .filter_map(|(name, done)| Some((name, done.as_ref().err()?)))
        .collect();
    match failed.as_slice() {
        [] => Finding::works("xattrs", "user.* and trusted.* xattrs can be set"),
        [(name, _)] if **name == MARK[1] && !is_root => {
            Finding::works("xattrs", "user.* xattrs can be set")
        }
        [(name, error)] if **name == MARK[0] => Finding::limited(
            "xattrs",
            format!("user.* xattrs cannot be set: {error}"),
            "programs in containers cannot set user.* xattrs",
        )
        .remedy("mount the file system with user_xattr, or use another one"),
        [(_, error), ..] => Finding::broken("xattrs", format!("xattrs cannot be set: {error}"))
            .remedy("use a store on ext4, XFS, btrfs, or tmpfs of Linux 6.6 or later"),
    }
}

fn set_mark(dir: &Path, name: &[u8]) -> cowl_layers::error::Result<()> {
    let dir = sys::dir::open_root(dir)?;
    sys::xattr::set(dir.as_fd(), name, b"y")
}

fn shared_blocks(scratch: &Path) -> Finding {
    let clone = || {
        let mut from = tempfile::tempfile_in(scratch)?;
        from.write_all(&[1; 4096])?;
        let to = tempfile::tempfile_in(scratch)?;
        Ok::<_, std::io::Error>(rustix::fs::ioctl_ficlone(&to, &from)?)
    };
    match clone() {
        Ok(()) => Finding::works("reflinks", "copies share blocks"),
        Err(_) => Finding::limited(
            "reflinks",
            "copies do not share blocks",
            "the first change of a large file in a lower layer copies all of it",
        )
        .remedy("for containers with large files, use a store on XFS or btrfs"),
    }
}

fn whiteouts(scratch: &Path) -> Finding {
    let made = sys::dir::open_root(scratch)
        .and_then(|dir| sys::node::mknod(dir.as_fd(), b"whiteout", FileKind::CharDevice, 0, 0));
    match made {
        Ok(()) => Finding::works(
            "whiteouts",
            "removed names are stored as devices, as by kernel overlayfs",
        ),
        Err(error) => Finding::limited(
            "whiteouts",
            format!("devices cannot be created: {error}"),
            "removed names are stored as marked files, which only Linux 6.7 or later reads",
        ),
    }
}
