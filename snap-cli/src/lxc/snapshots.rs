//! Snapshots that LXC's own tools made: each is a whole container in a folder of its own,
//! `LXCPATH/NAME/snaps/snap<N>`, or `LXCPATHsnaps/NAME/snap<N>` where that folder of LXC 1.0 is there. What
//! their files say is [`layout`]'s to know. It knows nothing of stores and containers of cowl's.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::command::LxcContainer;
use super::layout::{self, Dependant, Rootfs};
use crate::error::{Error, Result};
use crate::host::files::{self, read_opt};
use cowl_layers::shown::Show as _;

/// The config of a snapshot that is being removed: without its config it is none any more, for LXC too.
pub const GOING: &str = "config.cowl-removed";

/// What the names of folders that are on their way out begin with.
const REMOVED: &str = ".cowl-removed.";

/// One snapshot of LXC's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LxcSnapshot {
    /// Its name: snap0, snap1, ...
    pub name: OsString,
    /// Its folder.
    pub dir: PathBuf,
    /// When it was taken, as its file says. LXC writes that file last: one without it was cut off.
    pub taken: Option<String>,
}

/// The folder of a container's snapshots; it need not be there.
pub fn folder(container: &LxcContainer) -> Result<PathBuf> {
    // The old place is the container folder's path with five letters more, whatever that gives.
    let mut old = container.lxcpath.clone().into_os_string();
    old.push("snaps");
    let old = PathBuf::from(old);
    match there(&old)? {
        true => Ok(old.join(&container.name)),
        false => Ok(container.dir().join("snaps")),
    }
}

fn there(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(false)
        }
        Err(error) => Err(Error::at("look at", path, error)),
    }
}

/// The names in a folder, none where it is not there.
fn names(folder: &Path) -> Result<Vec<OsString>> {
    let at = |error| Error::at("list", folder, error);
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(error)),
    };
    entries
        .map(|entry| entry.map(|entry| entry.file_name()).map_err(at))
        .collect()
}

/// The snapshots in a folder, by number.
pub fn list(folder: &Path) -> Result<Vec<LxcSnapshot>> {
    let mut found = Vec::new();
    for name in names(folder)? {
        let dir = folder.join(&name);
        if there(&dir.join("config"))? {
            let taken = read_opt(&dir.join("ts"))?.and_then(|text| layout::shown_time(&text));
            found.push(LxcSnapshot { name, dir, taken });
        }
    }
    found.sort_by_key(|tree| layout::order(&tree.name));
    Ok(found)
}

/// Where a snapshot's folder goes on its way out.
pub fn way_out(dir: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(REMOVED);
    name.push(dir.file_name()?);
    Some(dir.with_file_name(name))
}

/// Snapshots whose removal was cut off: those that are in their place still, and those on their way out.
pub fn going(folder: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut here, mut out) = (Vec::new(), Vec::new());
    for name in names(folder)? {
        let dir = folder.join(&name);
        if name.as_bytes().starts_with(REMOVED.as_bytes()) {
            out.push(dir);
        } else if there(&dir.join(GOING))? && !there(&dir.join("config"))? {
            here.push(dir);
        }
    }
    Ok((here, out))
}

/// The number after all those that LXC gave.
pub fn next_number(folder: &Path) -> Result<u64> {
    let numbers = names(folder)?;
    let last = numbers.iter().filter_map(|name| layout::number(name)).max();
    Ok(last.map_or(0, |last| last.saturating_add(1)))
}

impl LxcSnapshot {
    /// The text of its config.
    pub fn config(&self) -> Result<Vec<u8>> {
        files::read(&self.dir.join("config"))
    }

    /// What was said about it; nothing in general.
    pub fn comment(&self) -> Result<Vec<u8>> {
        Ok(read_opt(&self.dir.join("comment"))?.unwrap_or_default())
    }

    /// Where its files are. Only what lies in its own folder is its own.
    pub fn rootfs(&self) -> Result<Rootfs> {
        let text = self.config()?;
        let foreign =
            |what: &str| {
                Err(Error::failed(format!("{} can't be read: {what}", self.dir.shown())).hint(
                "LXC's own tools may know what to do with it: lxc-snapshot as LXC brings it",
            ))
            };
        let found = match layout::rootfs(&text) {
            None => return foreign("its config does not say where its files are"),
            Some(Rootfs::Other(kind)) => {
                return foreign(&format!("its files are kept by {}", kind.escape_ascii()));
            }
            Some(found) => found,
        };
        let Some(top) = found.top() else {
            return foreign("its config does not say where its files are");
        };
        // The folder of all containers may have moved since its config was written.
        if there(top)? && std::fs::canonicalize(top).is_ok_and(|top| self.holds(&top)) {
            return Ok(found);
        }
        let own = self.dir.join("rootfs");
        let moved = top.ends_with(Path::new(&self.name).join("rootfs"));
        match (&found, moved && there(&own)?) {
            (Rootfs::Folder(_), true) => Ok(Rootfs::Folder(own)),
            _ => foreign("its files are not in its folder"),
        }
    }

    fn holds(&self, path: &Path) -> bool {
        std::fs::canonicalize(&self.dir).is_ok_and(|dir| path.starts_with(dir))
    }
}

/// Containers that LXC made over the files in `dir`, a container's or a snapshot's folder, and that are
/// still there.
pub fn dependants(dir: &Path) -> Result<Vec<Dependant>> {
    let Some(text) = read_opt(&dir.join("lxc_snapshots"))? else {
        return Ok(Vec::new());
    };
    let mut living = Vec::new();
    for known in layout::pairs(&text) {
        let gone = match &known {
            Dependant::Container(path, name) => !there(&path.join(name).join("config"))?,
            Dependant::Count(_) => false,
        };
        if !gone {
            living.push(known);
        }
    }
    Ok(living)
}

/// Takes what lies in `dir` off the lists of those whose files it was made over.
pub fn forget_dependant(dir: &Path) -> Result<()> {
    let (Some(text), Some(parent), Some(name)) = (
        read_opt(&dir.join("lxc_rdepends"))?,
        dir.parent(),
        dir.file_name(),
    ) else {
        return Ok(());
    };
    for above in layout::pairs(&text) {
        let Dependant::Container(path, base) = above else {
            continue;
        };
        let file = path.join(base).join("lxc_snapshots");
        let Some(old) = read_opt(&file)? else {
            continue;
        };
        let new = layout::without_pair(&old, parent.as_os_str().as_bytes(), name.as_bytes());
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

    fn world() -> (tempfile::TempDir, LxcContainer) {
        let dir = tempfile::tempdir().unwrap();
        let container = LxcContainer {
            lxcpath: dir.path().join("l"),
            name: "c1".to_owned(),
        };
        std::fs::create_dir_all(container.dir().join("snaps")).unwrap();
        (dir, container)
    }

    fn tree(folder: &Path, name: &str, time: Option<&str>) {
        let dir = folder.join(name);
        let rootfs = dir.join("rootfs");
        std::fs::create_dir_all(&rootfs).unwrap();
        let config = format!("lxc.rootfs.path = dir:{}\n", rootfs.shown());
        std::fs::write(dir.join("config"), config).unwrap();
        if let Some(time) = time {
            std::fs::write(dir.join("ts"), time).unwrap();
        }
    }

    #[test]
    fn they_are_listed_by_number_and_a_cut_off_one_has_no_time() {
        let (_dir, container) = world();
        let folder = folder(&container).unwrap();
        assert_eq!(folder, container.dir().join("snaps"));
        for name in ["snap10", "snap9", "snap2"] {
            tree(&folder, name, Some("2026:11:23 13:02:05"));
        }
        tree(&folder, "snap3", None);
        std::fs::create_dir(folder.join("no-snapshot")).unwrap();
        let found = list(&folder).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|tree| tree.name.to_str().unwrap())
            .collect();
        assert_eq!(names, ["snap2", "snap3", "snap9", "snap10"]);
        assert_eq!(found[0].taken.as_deref(), Some("2026:11:23 13:02:05"));
        assert_eq!(found[1].taken, None);
        assert_eq!(next_number(&folder).unwrap(), 11);
        assert_eq!(
            found[0].rootfs().unwrap(),
            Rootfs::Folder(folder.join("snap2/rootfs"))
        );
        assert_eq!(list(&folder.join("nothing")).unwrap(), []);
    }

    #[test]
    fn the_old_place_counts_where_it_is() {
        let (dir, container) = world();
        std::fs::create_dir_all(dir.path().join("lsnaps")).unwrap();
        assert_eq!(folder(&container).unwrap(), dir.path().join("lsnaps/c1"));
    }

    #[test]
    fn files_elsewhere_are_not_a_snapshots_own() {
        let (dir, container) = world();
        let folder = folder(&container).unwrap();
        tree(&folder, "snap0", Some("2026:11:23 13:02:05"));
        let one = list(&folder).unwrap().remove(0);
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
        assert_eq!(
            one.rootfs().unwrap(),
            Rootfs::Folder(one.dir.join("rootfs"))
        );
    }

    #[test]
    fn who_depends_on_what() {
        let (_dir, container) = world();
        let snaps = container.dir().join("snaps");
        tree(&snaps, "snap0", None);
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
