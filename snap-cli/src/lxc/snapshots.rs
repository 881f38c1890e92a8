//! Snapshots that LXC's own tools made.
//!
//! Each is a whole container in its own directory, `LXCPATH/NAME/snaps/snap<N>`, or `LXCPATHsnaps/NAME/snap<N>`
//! if that directory of LXC 1.0 exists. [`layout`] has the format of their files.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::command::LxcContainer;
use super::layout::{self, Dependant, Rootfs};
use crate::error::{Error, Result};
use crate::host::files::{self, read_opt};
use cowl_layers::shown::Show as _;

/// The name of the config of a snapshot that is being removed.
///
/// Without `config` the directory is not a snapshot, neither for cowl nor for LXC.
pub const REMOVED_CONFIG: &str = "config.cowl-removed";

/// The prefix of directories that are being removed.
const REMOVED_PREFIX: &str = ".cowl-removed.";

/// An LXC snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LxcSnapshot {
    /// The name: snap0, snap1, ...
    pub name: OsString,
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// The time of creation. LXC writes it last: a snapshot without one is incomplete.
    pub taken: Option<String>,
}

/// Returns the directory of a container's snapshots, which need not exist.
pub fn snapshots_dir(container: &LxcContainer) -> Result<PathBuf> {
    // LXC 1.0 appends five letters to the directory of all containers, without a slash.
    let mut old = container.lxcpath.clone().into_os_string();
    old.push("snaps");
    let old = PathBuf::from(old);
    match exists(&old)? {
        true => Ok(old.join(&container.name)),
        false => Ok(container.dir().join("snaps")),
    }
}

fn exists(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(false)
        }
        Err(error) => Err(Error::at("inspect", path, error)),
    }
}

/// Returns the names in a directory, none if it does not exist.
fn names(snaps_dir: &Path) -> Result<Vec<OsString>> {
    let at = |error| Error::at("list", snaps_dir, error);
    let entries = match std::fs::read_dir(snaps_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(error)),
    };
    entries
        .map(|entry| entry.map(|entry| entry.file_name()).map_err(at))
        .collect()
}

/// Returns the snapshots in a directory, by number.
pub fn list(snaps_dir: &Path) -> Result<Vec<LxcSnapshot>> {
    let mut found = Vec::new();
    for name in names(snaps_dir)? {
        let dir = snaps_dir.join(&name);
        if exists(&dir.join("config"))? {
            let taken =
                read_opt(&dir.join("ts"))?.and_then(|text| layout::format_stored_time(&text));
            found.push(LxcSnapshot { name, dir, taken });
        }
    }
    found.sort_by_key(|snapshot| layout::sort_key(&snapshot.name));
    Ok(found)
}

/// Returns the path to which a snapshot's directory is renamed before it is removed.
pub fn removal_path(dir: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(REMOVED_PREFIX);
    name.push(dir.file_name()?);
    Some(dir.with_file_name(name))
}

/// Returns the snapshots whose removal was interrupted: before and after their rename.
pub fn interrupted_removals(snaps_dir: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut unrenamed, mut renamed) = (Vec::new(), Vec::new());
    for name in names(snaps_dir)? {
        let dir = snaps_dir.join(&name);
        if name.as_bytes().starts_with(REMOVED_PREFIX.as_bytes()) {
            renamed.push(dir);
        } else if exists(&dir.join(REMOVED_CONFIG))? && !exists(&dir.join("config"))? {
            unrenamed.push(dir);
        }
    }
    Ok((unrenamed, renamed))
}

/// Returns the number after the highest one in use.
pub fn next_number(snaps_dir: &Path) -> Result<u64> {
    let numbers = names(snaps_dir)?;
    let last = numbers
        .iter()
        .filter_map(|name| layout::parse_number(name))
        .max();
    Ok(last.map_or(0, |last| last.saturating_add(1)))
}

impl LxcSnapshot {
    /// Returns the text of the snapshot's config.
    pub fn config(&self) -> Result<Vec<u8>> {
        files::read(&self.dir.join("config"))
    }

    /// Returns the snapshot's comment, which is empty by default.
    pub fn comment(&self) -> Result<Vec<u8>> {
        Ok(read_opt(&self.dir.join("comment"))?.unwrap_or_default())
    }

    /// Returns the location of the snapshot's files.
    ///
    /// Fails if they are outside of its directory.
    pub fn rootfs(&self) -> Result<Rootfs> {
        let text = self.config()?;
        let foreign = |reason: &str| {
            let message = format!(
                "cannot read the LXC snapshot {}: {reason}",
                self.dir.shown()
            );
            Err(Error::failed(message).hint("restore it with LXC's own lxc-snapshot"))
        };
        let found = match layout::rootfs(&text) {
            None => return foreign("its config has no root filesystem"),
            Some(Rootfs::Other(kind)) => {
                return foreign(&format!("its backing store is {}", kind.shown()));
            }
            Some(found) => found,
        };
        let Some(top) = found.top() else {
            return foreign("its config has no root filesystem");
        };
        // The directory of all containers may have been moved since its config was written.
        if exists(top)? && std::fs::canonicalize(top).is_ok_and(|top| self.contains(&top)) {
            return Ok(found);
        }
        let own = self.dir.join("rootfs");
        let moved = top.ends_with(Path::new(&self.name).join("rootfs"));
        match (&found, moved && exists(&own)?) {
            (Rootfs::Dir(_), true) => Ok(Rootfs::Dir(own)),
            _ => foreign("its files are outside of its directory"),
        }
    }

    fn contains(&self, path: &Path) -> bool {
        std::fs::canonicalize(&self.dir).is_ok_and(|dir| path.starts_with(dir))
    }
}

/// Returns the existing containers that depend on the files in `dir`, the directory of a container or a snapshot.
pub fn dependants(dir: &Path) -> Result<Vec<Dependant>> {
    let Some(text) = read_opt(&dir.join("lxc_snapshots"))? else {
        return Ok(Vec::new());
    };
    let mut living = Vec::new();
    for dependant in layout::parse_dependants(&text) {
        let is_removed = match &dependant {
            Dependant::Container(path, name) => !exists(&path.join(name).join("config"))?,
            Dependant::Count(_) => false,
        };
        if !is_removed {
            living.push(dependant);
        }
    }
    Ok(living)
}

/// Removes the container in `dir` from the lists of those whose files it depended on.
pub fn forget_dependant(dir: &Path) -> Result<()> {
    let (Some(text), Some(parent), Some(name)) = (
        read_opt(&dir.join("lxc_rdepends"))?,
        dir.parent(),
        dir.file_name(),
    ) else {
        return Ok(());
    };
    for above in layout::parse_dependants(&text) {
        let Dependant::Container(path, base) = above else {
            continue;
        };
        let file = path.join(base).join("lxc_snapshots");
        let Some(old) = read_opt(&file)? else {
            continue;
        };
        let new = layout::remove_pair(&old, parent.as_os_str().as_bytes(), name.as_bytes());
        match (new == old, new.is_empty()) {
            (true, _) => {}
            (false, true) => {
                std::fs::remove_file(&file).map_err(|error| Error::at("remove", &file, error))?;
            }
            (false, false) => files::replace(&file, &new, 0o644)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_container() -> (tempfile::TempDir, LxcContainer) {
        let dir = tempfile::tempdir().unwrap();
        let container = LxcContainer {
            lxcpath: dir.path().join("l"),
            name: "c1".to_owned(),
        };
        std::fs::create_dir_all(container.dir().join("snaps")).unwrap();
        (dir, container)
    }

    fn create_snapshot(snaps_dir: &Path, name: &str, time: Option<&str>) {
        let dir = snaps_dir.join(name);
        let rootfs = dir.join("rootfs");
        std::fs::create_dir_all(&rootfs).unwrap();
        let config = format!("lxc.rootfs.path = dir:{}\n", rootfs.shown());
        std::fs::write(dir.join("config"), config).unwrap();
        if let Some(time) = time {
            std::fs::write(dir.join("ts"), time).unwrap();
        }
    }

    #[test]
    fn snapshots_are_listed_by_number_and_an_interrupted_one_has_no_time() {
        let (_dir, container) = new_container();
        let snaps_dir = snapshots_dir(&container).unwrap();
        assert_eq!(snaps_dir, container.dir().join("snaps"));
        for name in ["snap10", "snap9", "snap2"] {
            create_snapshot(&snaps_dir, name, Some("2026:11:23 13:02:05"));
        }
        create_snapshot(&snaps_dir, "snap3", None);
        std::fs::create_dir(snaps_dir.join("no-snapshot")).unwrap();
        let found = list(&snaps_dir).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|snapshot| snapshot.name.to_str().unwrap())
            .collect();
        assert_eq!(names, ["snap2", "snap3", "snap9", "snap10"]);
        assert_eq!(found[0].taken.as_deref(), Some("2026:11:23 13:02:05"));
        assert_eq!(found[1].taken, None);
        assert_eq!(next_number(&snaps_dir).unwrap(), 11);
        assert_eq!(
            found[0].rootfs().unwrap(),
            Rootfs::Dir(snaps_dir.join("snap2/rootfs"))
        );
        assert_eq!(list(&snaps_dir.join("nothing")).unwrap(), []);
    }

    #[test]
    fn the_directory_of_lxc_1_0_takes_precedence() {
        let (dir, container) = new_container();
        std::fs::create_dir_all(dir.path().join("lsnaps")).unwrap();
        assert_eq!(
            snapshots_dir(&container).unwrap(),
            dir.path().join("lsnaps/c1")
        );
    }

    #[test]
    fn files_outside_of_the_snapshot_are_refused() {
        let (dir, container) = new_container();
        let snaps_dir = snapshots_dir(&container).unwrap();
        create_snapshot(&snaps_dir, "snap0", Some("2026:11:23 13:02:05"));
        let one = list(&snaps_dir).unwrap().remove(0);
        let elsewhere = dir.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        for line in [
            format!("lxc.rootfs.path = dir:{}\n", elsewhere.shown()),
            "lxc.rootfs.path = zfs:pool/c1\n".to_owned(),
            "lxc.rootfs.path = dir:/\n".to_owned(),
            "# nothing\n".to_owned(),
        ] {
            std::fs::write(one.dir.join("config"), line).unwrap();
            assert!(one.rootfs().is_err());
        }
        // All containers were moved to another disk.
        let moved = "lxc.rootfs.path = dir:/old/c1/snaps/snap0/rootfs\n";
        std::fs::write(one.dir.join("config"), moved).unwrap();
        assert_eq!(one.rootfs().unwrap(), Rootfs::Dir(one.dir.join("rootfs")));
    }

    #[test]
    fn dependants_are_listed_and_forgotten() {
        let (_dir, container) = new_container();
        let snaps = container.dir().join("snaps");
        create_snapshot(&snaps, "snap0", None);
        let lxcpath = container.lxcpath.shown();
        let list = format!("{lxcpath}/c1/snaps\nsnap0\n{lxcpath}\ngone\n");
        std::fs::write(container.dir().join("lxc_snapshots"), list).unwrap();
        let found = dependants(&container.dir()).unwrap();
        assert_eq!(found, [Dependant::Container(snaps.clone(), "snap0".into())]);
        let above = format!("{lxcpath}\nc1\n");
        std::fs::write(snaps.join("snap0/lxc_rdepends"), above).unwrap();
        forget_dependant(&snaps.join("snap0")).unwrap();
        let left = std::fs::read_to_string(container.dir().join("lxc_snapshots")).unwrap();
        assert_eq!(left, format!("{lxcpath}\ngone\n"));
        assert_eq!(dependants(&container.dir()).unwrap(), []);
    }
}
