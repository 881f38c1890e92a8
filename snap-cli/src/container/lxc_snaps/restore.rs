//! Going back to a snapshot of LXC's.
//!
//! To the same name: the files are copied beside those of now, put on the disk, and the two folders change
//! places in one call. To a new name: a whole container is made beside and renamed.

use std::ffi::OsString;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowl_layers::sys::dir;
use cowl_layers::sys::within::{self, Links, Named};
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};

use super::{Place, copy, lock_dir, refuse_base, refuse_unfinished};
use crate::delta::error::OnProgress;
use crate::error::{Error, Result};
use crate::host::files;
use crate::host::lxc::{Container, State, config, random_address};
use crate::host::lxc_snaps::Tree;
use crate::host::lxc_snaps::layout::{self, Rootfs};
use crate::host::{inside, mountinfo, users};
use crate::store::disk;
use crate::store::disk::remove_tree;
use cowl_layers::shown::Show as _;

/// What the names of folders that are being made begin with.
const STAGING: &str = ".cowl-restore.";

/// Files of a snapshot that belong to it and not to the container.
const OF_THE_SNAPSHOT: [&str; 7] = [
    "config",
    "ts",
    "comment",
    "partial",
    "lxc_rdepends",
    "lxc_snapshots",
    super::GOING,
];

/// The place beside `path` where what is to take its place is made.
fn staging(path: &Path) -> Option<PathBuf> {
    let mut name = OsString::from(STAGING);
    name.push(path.file_name()?);
    Some(path.with_file_name(name))
}

/// The folder that the container writes to, links followed; as it is where it is not there.
fn live_top(container: &Container) -> Result<Option<(Rootfs, PathBuf)>> {
    let file = container.config();
    let text = files::read(&file)?;
    let Some(rootfs) = layout::rootfs(&text) else {
        return Ok(None);
    };
    let Some(top) = rootfs.top() else {
        return Ok(None);
    };
    let top = match std::fs::canonicalize(top) {
        Ok(real) => real,
        Err(error) if error.kind() == ErrorKind::NotFound => top.to_path_buf(),
        Err(error) => return Err(Error::at("look at", top, error)),
    };
    Ok(Some((rootfs, top)))
}

impl Place {
    /// Removes what killed restores left: copies that were not ready, and files that one took the place of.
    pub(super) fn remove_staging(&self) -> Result<()> {
        let found = live_top(&self.container)?;
        if let Some(left) = found.and_then(|(_, top)| staging(&top)) {
            remove_tree(&left)?;
        }
        let lxcpath = &self.container.lxcpath;
        let _alone = lock_dir(lxcpath, self.patience)?;
        for name in disk::names(lxcpath)? {
            let left = lxcpath.join(&name);
            if name.starts_with(STAGING) && left != self.container.dir() && is_dead(&left)? {
                remove_tree(&left)?;
            }
        }
        Ok(())
    }

    /// Makes the container's files what they were at a snapshot. Its settings stay. Answers with what people
    /// should know.
    pub fn restore(&self, tree: &Tree, progress: OnProgress<'_>) -> Result<Vec<String>> {
        refuse_unfinished(tree)?;
        let from = tree.rootfs()?;
        let here = &self.container;
        if let State::Running { word, .. } = here.state()? {
            return Err(Error::busy(format!("{} is {word}", here.name))
                .hint(format!("stop it first: lxc-stop {}", here.options())));
        }
        refuse_base(&here.dir(), &here.name)?;
        let (from, top) = self.what_changes(from)?;
        refuse_used(&here.name, &top)?;
        let Some(new) = staging(&top) else {
            return Err(Error::failed(format!("{} names no folder", top.shown())));
        };
        let made = make_dir(&new)
            .and_then(|()| copy(&from, &new, progress))
            .and_then(|notes| disk::sync_all(&new).map(|()| notes));
        let mut notes = match made {
            Ok(notes) => notes,
            Err(error) => {
                remove_tree(&new)?;
                return Err(error);
            }
        };
        if let Err(error) = exchange(&new, &top) {
            remove_tree(&new)?;
            return Err(error);
        }
        // What was there until now. It is in nobody's way when it can't be removed.
        if let Err(error) = remove_tree(&new) {
            log::warn!("{error}; the next command will clean up");
        }
        notes.extend(self.other_settings(tree)?);
        Ok(notes)
    }

    /// What is copied, and the folder that it takes the place of.
    fn what_changes(&self, from: Rootfs) -> Result<(Rootfs, PathBuf)> {
        let elsewhere = |what: &str| {
            Err(Error::failed(format!(
                "{} can't be restored where it is: {what}",
                self.container.name
            ))
            .hint("restore to a new name: -r SNAP -N NEW"))
        };
        match (from, live_top(&self.container)?) {
            (from, Some((Rootfs::Folder(_), top))) => Ok((from, top)),
            (
                Rootfs::Overlay { delta, lowers },
                Some((Rootfs::Overlay { lowers: live, .. }, top)),
            ) if lowers == live => {
                // Only what was written over the others changes: it is copied with all its marks.
                Ok((Rootfs::Folder(delta), top))
            }
            (_, Some((Rootfs::Overlay { .. }, _))) => {
                elsewhere("it stands on other files than the snapshot")
            }
            (_, Some((Rootfs::Other(_), _)) | None) => elsewhere("its files are in no folder"),
        }
    }

    /// Says so when its settings are not those of the snapshot.
    fn other_settings(&self, tree: &Tree) -> Result<Option<String>> {
        let here = &self.container;
        let file = here.config();
        let live = files::read(&file)?;
        let then = tree.config()?;
        if layout::same_settings((&live, &here.dir()), (&then, &tree.dir)) {
            return Ok(None);
        }
        Ok(Some(format!(
            "its settings stay as they are; those of {} are in {}",
            tree.name.as_encoded_bytes().escape_ascii(),
            tree.dir.join("config").shown()
        )))
    }

    /// Makes a new container of a snapshot, with files of its own. Answers with what people should know.
    pub fn restore_as(
        &self,
        tree: &Tree,
        new: &str,
        progress: OnProgress<'_>,
    ) -> Result<Vec<String>> {
        refuse_unfinished(tree)?;
        let from = tree.rootfs()?;
        let new = Container {
            lxcpath: self.container.lxcpath.clone(),
            name: checked_name(new)?.to_owned(),
        };
        let target = new.dir();
        let taken = || {
            Error::failed(format!("{} exists already", target.shown()))
                .hint("nothing was changed; choose another name")
        };
        if disk::is_there(&target)? {
            return Err(taken());
        }
        let Some(made) = staging(&target) else {
            return Err(Error::usage("the new container has no name"));
        };
        let _making = alone_in(&made, &new.name, self.patience)?;
        let filled = self
            .fill(tree, &from, &made, &new, progress)
            .and_then(|notes| {
                disk::sync_all(&made)?;
                renameat_with(CWD, &made, CWD, &target, RenameFlags::NOREPLACE).map_err(
                    |error| match error {
                        rustix::io::Errno::EXIST => taken(),
                        other => Error::at("make", &target, std::io::Error::from(other)),
                    },
                )?;
                Ok(notes)
            });
        match filled {
            Ok(notes) => {
                disk::sync_parent(&target)?;
                Ok(notes)
            }
            Err(error) => {
                remove_tree(&made)?;
                Err(error)
            }
        }
    }

    fn fill(
        &self,
        tree: &Tree,
        from: &Rootfs,
        made: &Path,
        new: &Container,
        progress: OnProgress<'_>,
    ) -> Result<Vec<String>> {
        let rootfs = made.join("rootfs");
        make_dir(&rootfs)?;
        let mut notes = copy(from, &rootfs, progress)?;
        rename_host(&rootfs, &self.container.name, &new.name)?;
        // Scripts and tables that LXC copied into the snapshot.
        let at = |error| Error::at("list", &tree.dir, error);
        for entry in std::fs::read_dir(&tree.dir).map_err(at)? {
            let entry = entry.map_err(at)?;
            let name = entry.file_name();
            let own = OF_THE_SNAPSHOT.iter().any(|own| name == *own);
            if !own && entry.file_type().map_err(at)?.is_file() {
                files::copy_new(&entry.path(), &made.join(&name))?;
            }
        }
        // Last: what has a config counts as a container.
        disk::sync_all(made)?;
        let target = new.dir();
        let how = config::Renamed {
            from: tree.dir.as_os_str().as_bytes(),
            to: target.as_os_str().as_bytes(),
            name: &new.name,
        };
        let text = layout::with_folder(&tree.config()?, &target.join("rootfs"));
        let (text, more) = config::renamed(&text, &how, random_address);
        notes.extend(more);
        let file = made.join("config");
        files::replace_name(&file, &text, 0o644)?;
        Ok(notes)
    }
}

/// A name that LXC can use for a container.
fn checked_name(name: &str) -> Result<&str> {
    let plain = |c: char| !c.is_control() && c != '/';
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(Error::usage(format!(
            "\"{}\" can't be a container's name",
            name.escape_debug()
        ))
        .hint("a name is one word without '/' that does not begin with '.'"));
    }
    Ok(name)
}

fn make_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o770)
        .create(path)
        .map_err(|error| Error::at("make the folder", path, error))
}

/// Whether nobody is making a container in the folder any more.
fn is_dead(path: &Path) -> Result<bool> {
    let locked = dir::open_root(path).and_then(|opened| dir::lock_exclusive(opened.as_fd()));
    match locked {
        Ok(lock) => Ok(lock.is_some()),
        Err(error) if error.is_absent() => Ok(false),
        Err(error) => Err(Error::at("lock", path, error)),
    }
}

/// Makes the folder in which a container is made. Held for its lock, by which others tell that somebody is
/// at work there.
fn alone_in(path: &Path, name: &str, patience: Duration) -> Result<OwnedFd> {
    let _alone = lock_dir(path.parent().unwrap_or(path), patience)?;
    if disk::is_there(path)? {
        if !is_dead(path)? {
            return Err(Error::busy(format!("another command is making {name}"))
                .hint("try again when it has ended"));
        }
        remove_tree(path)?;
    }
    make_dir(path)?;
    lock_dir(path, patience)
}

/// Puts the folder `new` where `top` is, which comes to be where `new` was; or there is none.
fn exchange(new: &Path, top: &Path) -> Result<()> {
    let flags = match disk::is_there(top)? {
        true => RenameFlags::EXCHANGE,
        // What a restore of LXC's own that failed leaves.
        false => RenameFlags::NOREPLACE,
    };
    renameat_with(CWD, new, CWD, top, flags).map_err(|error| {
        Error::at(
            "put the restored files at",
            top,
            std::io::Error::from(error),
        )
        .hint("nothing was changed")
    })?;
    disk::sync_parent(top)
}

/// Refuses while anything is mounted in the folder, or somebody works in it.
fn refuse_used(name: &str, top: &Path) -> Result<()> {
    let mounts = mountinfo::read()?;
    let inside = mountinfo::topmost(&mounts, top).or_else(|| mountinfo::below(&mounts, top).last());
    if let Some(mount) = inside {
        let at = users::quoted(&mount.at);
        return Err(
            Error::busy(format!("{name} is in use: mounted in it: {at}"))
                .hint(format!("unmount it first: umount {at}")),
        );
    }
    if !disk::is_there(top)? {
        return Ok(());
    }
    let found = inside::of(top)?;
    if found.is_empty() {
        return Ok(());
    }
    let pids: Vec<_> = found.iter().map(|user| user.pid.to_string()).collect();
    Err(
        Error::busy(format!("{name} is in use by {}", users::describe(&found)))
            .hint(format!("end them first: kill {}", pids.join(" "))),
    )
}

/// Writes the new name where the old one stands: in the copy's own /etc/hostname, whatever links there are.
fn rename_host(rootfs: &Path, old: &str, new: &str) -> Result<()> {
    let file = rootfs.join("etc/hostname");
    let at = |error| Error::at("open", &file, error);
    let root = dir::open_root(rootfs).map_err(at)?;
    // A link is left alone: with an absolute one the name is another file's.
    let found = within::open(root.as_fd(), b"etc/hostname", Links::Refused, OFlags::RDWR);
    let mut hostname = match found.map_err(at)? {
        Named::File(file) => std::fs::File::from(file),
        Named::Nothing | Named::Other(_) => return Ok(()),
    };
    let mut write = || {
        let mut text = Vec::new();
        (&hostname).take(1 << 10).read_to_end(&mut text)?;
        if text.trim_ascii() == old.as_bytes() {
            hostname.set_len(0)?;
            std::io::Seek::rewind(&mut hostname)?;
            hostname.write_all(format!("{new}\n").as_bytes())?;
        }
        Ok(())
    };
    write().map_err(|error: std::io::Error| Error::at("write", &file, error))
}
