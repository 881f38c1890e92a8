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
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::manifest::ContainerId;
use super::{Store, disk};
use crate::error::{Error, Result};

/// Mount points that only the store's owner can reach.
pub(super) const MNT: &str = "mnt";
/// Mount points that a mapped root can reach as well.
pub(super) const MAPPED: &str = "mapped";
/// The mount point in a directory of `mapped`.
const ROOTFS: &str = "rootfs";

const PRIVATE: u32 = 0o700;
const GROUP_PASSES: u32 = 0o710;
const ALL_PASS: u32 = 0o711;

impl Store {
    /// Returns the default mount point of a container.
    pub fn mount_dir(&self, id: ContainerId) -> PathBuf {
        self.root.join(MNT).join(id.to_string())
    }

    fn mapped_parent(&self, id: ContainerId) -> PathBuf {
        self.root.join(MAPPED).join(id.to_string())
    }

    /// Returns the mount point of a container with an id map, for LXC.
    pub fn mapped_dir(&self, id: ContainerId) -> PathBuf {
        self.mapped_parent(id).join(ROOTFS)
    }

    /// Creates `place`, one of the two mount points above. `group` is the host gid of the container's root, which may
    /// reach a mapped one.
    pub fn make_place(&self, id: ContainerId, place: &Path, group: Option<u32>) -> Result<()> {
        if place == self.mapped_dir(id) {
            let parent = self.mapped_parent(id);
            disk::ensure_dir(&self.root.join(MAPPED))?;
            set_mode(&self.root.join(MAPPED), ALL_PASS)?;
            disk::ensure_dir(&parent)?;
            admit(&parent, group)?;
        }
        disk::ensure_dir(place)
    }

    /// Lets the root of a container with an id map pass through `mnt`, for one start of a container whose config
    /// names a mount point there, as configs of older versions do.
    pub fn admit_to_mnt(&self, group: u32) -> Result<()> {
        admit(&self.root.join(MNT), Some(group))
    }

    /// Closes `mnt`: to all users, for a store of an older version; with `mapped`, also to the mapped root that was
    /// admitted last.
    pub fn close_mnt(&self, mapped: bool) -> Result<()> {
        let dir = self.root.join(MNT);
        let meta = match std::fs::symlink_metadata(&dir) {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::at("inspect", &dir, error)),
        };
        let open = if mapped { 0o077 } else { 0o007 };
        match meta.mode() & open {
            0 => Ok(()),
            _ => admit(&dir, None),
        }
    }

    /// Whether the path is in one of the two directories of mount points.
    pub(super) fn is_place(&self, path: &Path) -> bool {
        [MNT, MAPPED]
            .iter()
            .any(|places| path.starts_with(self.root.join(places)))
    }

    /// Removes a container's mount points.
    pub fn remove_places(&self, id: ContainerId) -> Result<()> {
        remove_place(&self.mount_dir(id))?;
        remove_place(&self.mapped_parent(id))
    }
}

/// Removes a container's directory in one of the two directories of mount points. Only empty directories are removed,
/// because a container may still be mounted there.
pub(super) fn remove_place(dir: &Path) -> Result<()> {
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
        store.admit_to_mnt(group).unwrap();
        let store = Store::open(&root, session()).unwrap();
        assert_eq!(mode(&mnt), GROUP_PASSES);
        store.close_mnt(true).unwrap();
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
        store.close_mnt(false).unwrap_err();
        assert_eq!(mode(&other), 0o755);
    }

    #[test]
    fn a_mapped_place_is_below_a_directory_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = ContainerId::fresh();
        let place = store.mapped_dir(id);
        let group = rustix::process::getegid().as_raw();
        for (group, expected) in [(Some(group), GROUP_PASSES), (None, PRIVATE)] {
            store.make_place(id, &place, group).unwrap();
            assert!(place.is_dir());
            assert_eq!(mode(place.parent().unwrap()), expected);
            assert_eq!(mode(&store.root().join(MAPPED)), ALL_PASS);
        }
        store.remove_places(id).unwrap();
        assert_eq!(disk::names(&store.root().join(MAPPED)).unwrap().len(), 0);
        // What stands in the way in `mnt` is a container's, and stays.
        let own = store.mount_dir(id).join(ROOTFS);
        std::fs::create_dir_all(&own).unwrap();
        store.remove_places(id).unwrap_err();
        assert!(own.is_dir());
    }
}
