//! Determines which users can reach a path by the modes of the directories above it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowl_layers::error::Errno;
use cowl_layers::format::ACL_ACCESS;
use rustix::fs::{CWD, OFlags};

use crate::error::{Error, Result};
use crate::host::rootless;

/// Search permission in the three classes.
const OWNER: u32 = 0o100;
const GROUP: u32 = 0o010;
const OTHERS: u32 = 0o001;
/// Write permission for the group or for others.
const WRITE: u32 = 0o022;
/// Only the owner of an entry can rename it.
const STICKY: u32 = 0o1000;

/// Returns whether a directory above `path` grants search permission only to root and to its owner, so that no other
/// user can reach mounts at `path`, and other users cannot replace this directory by another one.
///
/// Uncertain cases (another group, an ACL) count as accessible. `path` must not contain symbolic links.
pub fn is_private(path: &Path) -> Result<bool> {
    let own = rustix::process::geteuid().as_raw();
    for dir in path.ancestors().skip(1) {
        let meta = inspect(dir)?;
        let owner_is_trusted = meta.uid() == 0 || meta.uid() == own;
        let group_is_denied =
            meta.mode() & GROUP == 0 || (meta.gid() == 0 && own == 0 && !has_acl(dir)?);
        if owner_is_trusted && group_is_denied && meta.mode() & OTHERS == 0 {
            return Ok(replaceable(dir)?.is_none());
        }
    }
    Ok(false)
}

/// Returns the directory in which other users than root and this one can rename what leads to `path`, and so replace
/// it; `None` if there is none. If a component is a symbolic link, its target has to be checked as well.
pub fn replaceable(path: &Path) -> Result<Option<PathBuf>> {
    let mut child = inspect(path)?;
    for dir in path.ancestors().skip(1) {
        let meta = inspect(dir)?;
        if meta.is_symlink() {
            // What it leads to is determined by the directory that contains it.
            child = meta;
            continue;
        }
        let is_sticky = meta.mode() & STICKY != 0 && is_trusted(&child);
        if !is_trusted(&meta) || meta.mode() & WRITE != 0 && !is_sticky {
            return Ok(Some(dir.to_owned()));
        }
        child = meta;
    }
    Ok(None)
}

/// Returns whether the owner is root or this user. In the namespace of a plain user, root has no id.
fn is_trusted(meta: &Metadata) -> bool {
    let own = rustix::process::geteuid().as_raw();
    meta.uid() == 0
        || meta.uid() == own
        || meta.uid() == rootless::UNMAPPED && !rootless::is_system_root()
}

fn inspect(path: &Path) -> Result<Metadata> {
    std::fs::symlink_metadata(path).map_err(|error| Error::at("inspect", path, error))
}

/// Returns the directory above `path` whose mode denies access to this user and group, if any. An ACL may still grant
/// it.
pub fn blocked_for(path: &Path, uid: u32, gid: u32) -> Result<Option<PathBuf>> {
    for dir in path.ancestors().skip(1) {
        let meta = inspect(dir)?;
        let class = match (meta.uid() == uid, meta.gid() == gid) {
            (true, _) => OWNER,
            (false, true) => GROUP,
            (false, false) => OTHERS,
        };
        if meta.mode() & class == 0 && !has_acl(dir)? {
            return Ok(Some(dir.to_owned()));
        }
    }
    Ok(None)
}

/// Returns whether a directory or a regular file has an access ACL, or may have one.
pub fn has_acl(dir: &Path) -> Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = rustix::fs::openat(CWD, dir, flags, rustix::fs::Mode::empty());
    let found = opened.and_then(|dir| rustix::fs::fgetxattr(&dir, ACL_ACCESS, &mut [0_u8; 0][..]));
    match found {
        Ok(_) => Ok(true),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        // The ACL cannot be read. Uncertain cases count as accessible.
        Err(Errno::ACCESS) => Ok(true),
        Err(error) => Err(Error::at("inspect", dir, std::io::Error::from(error))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn one_private_ancestor_suffices() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (above, target) = (root.join("above"), root.join("above/target"));
        std::fs::create_dir_all(&target).unwrap();
        let set = |path: &Path, mode: u32| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let (uid, gid) = (4242, 4242);
        for (top, mode, private) in [
            (0o755, 0o755, false),
            (0o755, 0o711, false),
            (0o755, 0o701, false),
            (0o755, 0o700, true),
            (0o700, 0o755, true),
        ] {
            set(&root, top);
            set(&above, mode);
            assert_eq!(is_private(&target).unwrap(), private, "{top:o} {mode:o}");
            let blocked = blocked_for(&target, uid, gid).unwrap();
            assert_eq!(blocked.is_some(), private, "{top:o} {mode:o}: {blocked:?}");
        }
        // The mode of the mount point itself is irrelevant, because the root of the mount covers it.
        set(&root, 0o755);
        set(&above, 0o755);
        set(&target, 0o700);
        assert!(!is_private(&target).unwrap());
        // The owner of a directory above the private one can replace it.
        set(&above, 0o700);
        let chown = |path: &Path, uid| std::os::unix::fs::chown(path, Some(uid), None).unwrap();
        if rustix::process::geteuid().is_root() {
            chown(&root, 4242);
            assert_eq!(replaceable(&target).unwrap(), Some(root.clone()));
            assert!(!is_private(&target).unwrap());
            chown(&root, 0);
            for (mode, private) in [
                (0o777, false),
                (0o1777, true),
                (0o775, false),
                (0o755, true),
            ] {
                set(&root, mode);
                assert_eq!(is_private(&target).unwrap(), private, "{mode:o}");
            }
            set(&root, 0o1777);
            chown(&above, 4242);
            assert_eq!(replaceable(&target).unwrap(), Some(above));
        }
    }
}
