//! The default mount points of containers, and access to them.
//!
//! A container's root can create set-user-ID programs and device nodes in its root filesystem; any other user of the
//! host with access to them would become root. So only the store's owner has access to `mnt`. For a container with an
//! id map, LXC resolves the path as the container's root, which is an ordinary user of the host. Such a container is
//! mounted in its own directory, `mapped/<id>`, whose group is that of the container's root. No other user, and no
//! other container's root, can search it. (A group works on every file system; an ACL does not.)

use std::fs::{File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use rustix::fs::OFlags;

use super::disk;
use super::manifest::ContainerId;
use super::paths::{MAPPED, MNT, Paths, ROOTFS};
use crate::error::{Error, Result};

const PRIVATE: u32 = 0o700;
const GROUP_PASSES: u32 = 0o710;
const ALL_PASS: u32 = 0o711;

/// Creates `mount_point`, one of the container's two mount points.
///
/// `group` is the host gid of the container's root, which gets access to the mount point in `mapped`.
pub fn create(
    paths: &Paths,
    id: ContainerId,
    mount_point: &Path,
    group: Option<u32>,
) -> Result<()> {
    if mount_point == paths.mapped_dir(id) {
        let parent = paths.mapped_parent(id);
        disk::ensure_dir(&paths.root().join(MAPPED))?;
        set_mode(&paths.root().join(MAPPED), ALL_PASS)?;
        disk::ensure_dir(&parent)?;
        admit(&parent, group)?;
    }
    disk::ensure_dir(mount_point)
}

/// Grants the root of a container with an id map search permission on `mnt`, for one start of the container.
///
/// Needed if the LXC config names a mount point in `mnt`, as configs of older versions do.
pub fn admit_to_mnt(paths: &Paths, group: u32) -> Result<()> {
    admit(&paths.root().join(MNT), Some(group))
}

/// The users whose access to `mnt` is revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedTo {
    /// All users but the owner and an admitted mapped root. In a store of an older version, others may have access.
    OtherUsers,
    /// All users but the owner.
    MappedRoots,
}

/// Revokes access to `mnt`.
pub fn close_mnt(paths: &Paths, closed: ClosedTo) -> Result<()> {
    let dir = paths.root().join(MNT);
    let meta = match std::fs::symlink_metadata(&dir) {
        Ok(meta) => meta,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::at("inspect", &dir, error)),
    };
    let open = match closed {
        ClosedTo::OtherUsers => 0o007,
        ClosedTo::MappedRoots => 0o077,
    };
    match meta.mode() & open {
        0 => Ok(()),
        _ => admit(&dir, None),
    }
}

/// Returns whether the path is in one of the two directories of mount points.
pub(super) fn is_mount_point(paths: &Paths, path: &Path) -> bool {
    [MNT, MAPPED]
        .iter()
        .any(|dir| path.starts_with(paths.root().join(dir)))
}

/// Removes a container's mount points.
pub fn remove(paths: &Paths, id: ContainerId) -> Result<()> {
    remove_dir(&paths.mount_dir(id))?;
    remove_dir(&paths.mapped_parent(id))
}

/// Removes a container's directory in one of the two directories of mount points.
///
/// Removes only empty directories, because a container may still be mounted there.
pub(super) fn remove_dir(dir: &Path) -> Result<()> {
    // Only below `mapped`: in `mnt`, this path would be inside the container if it were still mounted.
    let inner = dir.parent().filter(|parent| parent.ends_with(MAPPED));
    let inner = inner.map(|_| dir.join(ROOTFS));
    for empty in inner.as_deref().into_iter().chain([dir]) {
        match std::fs::remove_dir(empty) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::at("remove", empty, error));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Opens a directory to change its mode. Does not follow a symlink, which would lead out of the store.
fn open(dir: &Path) -> Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags.bits().cast_signed());
    options
        .open(dir)
        .map_err(|error| Error::at("open the directory", dir, error))
}

fn set_mode(dir: &Path, mode: u32) -> Result<()> {
    open(dir)?
        .set_permissions(Permissions::from_mode(mode))
        .map_err(|error| Error::at("set the mode of", dir, error))
}

/// Restricts search permission to the owner and, if given, a group.
fn admit(dir: &Path, group: Option<u32>) -> Result<()> {
    let opened = open(dir)?;
    let mode = |mode| {
        let set = opened.set_permissions(Permissions::from_mode(mode));
        set.map_err(|error| Error::at("set the mode of", dir, error))
    };
    // Close it first, so that the old group does not get access between the two changes.
    mode(PRIVATE)?;
    let owners = rustix::process::getegid().as_raw();
    fchown(&opened, None, Some(group.unwrap_or(owners)))
        .map_err(|error| Error::at("set the group of", dir, error))?;
    match group {
        Some(_) => mode(GROUP_PASSES),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::tests::session;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn opening_a_store_of_an_older_version_revokes_access_of_other_users() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("s");
        let store = Store::open_or_make(&root, session()).unwrap();
        let mnt = root.join(MNT);
        assert_eq!(mode(&mnt), PRIVATE);
        set_mode(&mnt, ALL_PASS).unwrap();
        drop(store);
        let store = Store::open(&root, session()).unwrap();
        assert_eq!(mode(&mnt), PRIVATE);
        // An admitted mapped root has access until the start of its container is over.
        let group = rustix::process::getegid().as_raw();
        admit_to_mnt(store.paths(), group).unwrap();
        let store = Store::open(&root, session()).unwrap();
        assert_eq!(mode(&mnt), GROUP_PASSES);
        close_mnt(store.paths(), ClosedTo::MappedRoots).unwrap();
        assert_eq!(mode(&mnt), PRIVATE);
    }

    #[test]
    fn a_symlink_in_place_of_mnt_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (root, other) = (dir.path().join("s"), dir.path().join("other"));
        drop(Store::open_or_make(&root, session()).unwrap());
        std::fs::create_dir(&other).unwrap();
        set_mode(&other, 0o755).unwrap();
        std::fs::remove_dir(root.join(MNT)).unwrap();
        std::os::unix::fs::symlink(&other, root.join(MNT)).unwrap();
        let store = Store::open(&root, session()).unwrap();
        close_mnt(store.paths(), ClosedTo::OtherUsers).unwrap_err();
        assert_eq!(mode(&other), 0o755);
    }

    #[test]
    fn a_mapped_mount_point_is_in_its_own_directory() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        let mount_point = store.paths().mapped_dir(id);
        let group = rustix::process::getegid().as_raw();
        for (group, expected) in [(Some(group), GROUP_PASSES), (None, PRIVATE)] {
            create(store.paths(), id, &mount_point, group).unwrap();
            assert!(mount_point.is_dir());
            assert_eq!(mode(mount_point.parent().unwrap()), expected);
            assert_eq!(mode(&store.root().join(MAPPED)), ALL_PASS);
        }
        remove(store.paths(), id).unwrap();
        assert_eq!(disk::names(&store.root().join(MAPPED)).unwrap().len(), 0);
        // Files in a mount point in `mnt` may belong to a mounted container, and are retained.
        let own = store.paths().mount_dir(id).join(ROOTFS);
        std::fs::create_dir_all(&own).unwrap();
        remove(store.paths(), id).unwrap_err();
        assert!(own.is_dir());
    }
}
