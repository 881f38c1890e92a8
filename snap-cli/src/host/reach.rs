//! Determines which users can reach a path by the modes of the directories above it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowl_layers::error::Errno;
use cowl_layers::format::ACL_ACCESS;
use rustix::fs::{CWD, OFlags};

use crate::error::{Error, Result};

/// Search permission in the three classes.
const OWNER: u32 = 0o100;
const GROUP: u32 = 0o010;
const OTHERS: u32 = 0o001;

/// Returns whether a directory above `path` grants search permission only to root and to its owner, so that no other
/// user can reach mounts at `path`.
///
/// Uncertain cases (another group, an ACL) count as accessible.
pub fn is_private(path: &Path) -> Result<bool> {
    let own = rustix::process::geteuid().as_raw();
    for dir in path.ancestors().skip(1) {
        let meta = std::fs::symlink_metadata(dir).map_err(|e| Error::at("inspect", dir, e))?;
        let owner_is_trusted = meta.uid() == 0 || meta.uid() == own;
        let group_is_denied =
            meta.mode() & GROUP == 0 || (meta.gid() == 0 && own == 0 && !has_acl(dir)?);
        if owner_is_trusted && group_is_denied && meta.mode() & OTHERS == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the directory above `path` whose mode denies access to this user and group, if any. An ACL may still grant
/// it.
pub fn blocked_for(path: &Path, uid: u32, gid: u32) -> Result<Option<PathBuf>> {
    for dir in path.ancestors().skip(1) {
        let meta = std::fs::symlink_metadata(dir).map_err(|e| Error::at("inspect", dir, e))?;
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

/// Returns whether a directory has an access ACL, or may have one.
fn has_acl(dir: &Path) -> Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
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
    }
}
