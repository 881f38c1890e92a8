//! The default mount points of containers, and access to them.
//!
//! A container's root can create setuid programs and device nodes in its root file system; any other user of the host
//! who could reach them would become root. `mnt` is therefore accessible only to the store's owner. For a container
//! with an id map, LXC resolves the path as the container's root, which is an ordinary user of the host. Such a
//! container is mounted in a directory of its own, `mapped/<id>`, whose group is that of the container's root. No
//! other user, and no other container's root, can search it. (A group works on every file system; an ACL does not.)

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

/// Creates `place`, one of the two mount points above. `group` is the host gid of the container's root, which may
/// reach a mapped one.
pub fn create(paths: &Paths, id: ContainerId, place: &Path, group: Option<u32>) -> Result<()> {
    if place == paths.mapped_dir(id) {
        let parent = paths.mapped_parent(id);
        disk::ensure_dir(&paths.root().join(MAPPED))?;
        set_mode(&paths.root().join(MAPPED), ALL_PASS)?;
        disk::ensure_dir(&parent)?;
        admit(&parent, group)?;
    }
    disk::ensure_dir(place)
}

/// Lets the root of a container with an id map pass through `mnt`, for one start of a container whose config
/// names a mount point there, as configs of older versions do.
pub fn admit_to_mnt(paths: &Paths, group: u32) -> Result<()> {
    admit(&paths.root().join(MNT), Some(group))
}

/// Users whose access to `mnt` is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClosedTo {
    /// All but the owner and a mapped root that was admitted: in a store of an older version others may have access.
    OtherUsers,
    /// All but the owner.
    MappedRoots,
}

/// Closes `mnt` to users that have access to it.
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

/// Whether the path is in one of the two directories of mount points.
pub(super) fn is_mount_point(paths: &Paths, path: &Path) -> bool {
    [MNT, MAPPED]
        .iter()
        .any(|places| path.starts_with(paths.root().join(places)))
}

/// Removes a container's mount points.
pub fn remove(paths: &Paths, id: ContainerId) -> Result<()> {
    remove_dir(&paths.mount_dir(id))?;
    remove_dir(&paths.mapped_parent(id))
}

/// Removes a container's directory in one of the two directories of mount points. Only empty directories are removed,
/// because a container may still be mounted there.
pub(super) fn remove_dir(dir: &Path) -> Result<()> {
    // In `mnt`, this name would be inside the container if it were still mounted.
    let inner = dir.parent().filter(|places| places.ends_with(MAPPED));
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

/// Opens a directory to change its mode. A link that lies there instead would lead out of the store.
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

/// Grants search permission to the owner and, if given, a group.
fn admit(dir: &Path, group: Option<u32>) -> Result<()> {
    let opened = open(dir)?;
    let mode = |mode| {
        let set = opened.set_permissions(Permissions::from_mode(mode));
        set.map_err(|error| Error::at("set the mode of", dir, error))
    };
    // Close it first: the old group must not pass in between.
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
    fn what_an_older_version_left_open_is_closed_when_the_store_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("s");
        let store = Store::open_or_make(&root, session()).unwrap();
        let mnt = root.join(MNT);
        assert_eq!(mode(&mnt), PRIVATE);
        set_mode(&mnt, ALL_PASS).unwrap();
        drop(store);
        let store = Store::open(&root, session()).unwrap();
        assert_eq!(mode(&mnt), PRIVATE);
        // One who was admitted stays so until that start is over.
        let group = rustix::process::getegid().as_raw();
        admit_to_mnt(store.paths(), group).unwrap();
        let store = Store::open(&root, session()).unwrap();
        assert_eq!(mode(&mnt), GROUP_PASSES);
        close_mnt(store.paths(), ClosedTo::MappedRoots).unwrap();
        assert_eq!(mode(&mnt), PRIVATE);
    }

    #[test]
    fn a_link_in_the_place_of_mnt_is_not_followed() {
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
    fn a_mapped_place_is_below_a_directory_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        let place = store.paths().mapped_dir(id);
        let group = rustix::process::getegid().as_raw();
        for (group, expected) in [(Some(group), GROUP_PASSES), (None, PRIVATE)] {
            create(store.paths(), id, &place, group).unwrap();
            assert!(place.is_dir());
            assert_eq!(mode(place.parent().unwrap()), expected);
            assert_eq!(mode(&store.root().join(MAPPED)), ALL_PASS);
        }
        remove(store.paths(), id).unwrap();
        assert_eq!(disk::names(&store.root().join(MAPPED)).unwrap().len(), 0);
        // What stands in the way in `mnt` is a container's, and stays.
        let own = store.paths().mount_dir(id).join(ROOTFS);
        std::fs::create_dir_all(&own).unwrap();
        remove(store.paths(), id).unwrap_err();
        assert!(own.is_dir());
    }
}
