//! Restores LXC snapshots, to the same container or to a new one.
//!
//! To the same name: the files are copied into a staging directory and synced, and one call exchanges the two
//! directories. To a new name: a whole container is prepared in a staging directory and renamed.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::shown::Show as _;
use cowl_layers::sys::dir;
use cowl_layers::sys::within::{self, OpenedObject, SymlinkPolicy};
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};

use super::command::{LxcContainer, LxcState, random_address};
use super::config;
use super::copy::copy;
use super::layout::{self, Rootfs};
use super::locked::{LockedSnapshots, refuse_base, refuse_unfinished};
use super::snapshots::{LxcSnapshot, REMOVED_CONFIG};
use super::staging::{create_locked, live_top, make_dir, staging_path};
use crate::error::{Error, Result};
use crate::host::{dir_users, files, mountinfo, users};
use crate::shell::quoted;
use crate::store::disk;
use crate::store::disk::remove_tree;
use crate::tree::error::OnProgress;

/// Files that belong to a snapshot and not to the container.
const SNAPSHOT_FILES: [&str; 7] = [
    "config",
    "ts",
    "comment",
    "partial",
    "lxc_rdepends",
    "lxc_snapshots",
    REMOVED_CONFIG,
];

impl LockedSnapshots {
    /// Restores the container's files, and not its settings.
    ///
    /// Returns notes for the user.
    pub fn restore(&self, snapshot: &LxcSnapshot, progress: OnProgress<'_>) -> Result<Vec<String>> {
        refuse_unfinished(snapshot)?;
        let from = snapshot.rootfs()?;
        let here = &self.container;
        if let LxcState::Running { word, .. } = here.state()? {
            return Err(Error::busy(format!("{} is {word}", here.name))
                .hint(format!("stop it first: lxc-stop {}", here.options())));
        }
        refuse_base(&here.dir(), &here.name)?;
        let (from, top) = self.find_replaced_dir(from)?;
        refuse_used(&here.name, &top)?;
        let Some(new) = staging_path(&top) else {
            return Err(Error::failed(format!(
                "cannot restore to {}: it is not a directory",
                top.shown()
            )));
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
        // The staging directory has the previous files now. They are harmless if they cannot be removed.
        if let Err(error) = remove_tree(&new) {
            log::warn!("{error}; the next command will clean up");
        }
        notes.extend(self.compare_settings(snapshot)?);
        Ok(notes)
    }

    /// Returns the files to copy and the directory that they replace.
    fn find_replaced_dir(&self, from: Rootfs) -> Result<(Rootfs, PathBuf)> {
        let refuse = |reason: &str| {
            Err(Error::failed(format!(
                "cannot restore {} to the same name: {reason}",
                self.container.name
            ))
            .hint("restore to a new name: -r SNAP -N NEW"))
        };
        match (from, live_top(&self.container)?) {
            (from, Some((Rootfs::Dir(_), top))) => Ok((from, top)),
            (
                Rootfs::Overlay { delta, lowers },
                Some((Rootfs::Overlay { lowers: live, .. }, top)),
            ) if lowers == live => {
                // Only the upper directory changes: it is copied with all markers.
                Ok((Rootfs::Dir(delta), top))
            }
            (_, Some((Rootfs::Overlay { .. }, _))) => {
                refuse("it has other lower directories than the snapshot")
            }
            (_, Some((Rootfs::Other(_), _)) | None) => {
                refuse("its root filesystem is not a directory")
            }
        }
    }

    /// Returns a note if the container's settings differ from those of the snapshot.
    fn compare_settings(&self, snapshot: &LxcSnapshot) -> Result<Option<String>> {
        let here = &self.container;
        let file = here.config();
        let live = files::read(&file)?;
        let then = snapshot.config()?;
        if layout::has_same_settings((&live, &here.dir()), (&then, &snapshot.dir)) {
            return Ok(None);
        }
        Ok(Some(format!(
            "its settings are not restored; those of {} are in {}",
            snapshot.name.shown(),
            snapshot.dir.join("config").shown()
        )))
    }

    /// Creates a new container from a snapshot, with its own copy of the files.
    ///
    /// Returns notes for the user.
    pub fn restore_as(
        &self,
        snapshot: &LxcSnapshot,
        new: &str,
        progress: OnProgress<'_>,
    ) -> Result<Vec<String>> {
        refuse_unfinished(snapshot)?;
        let from = snapshot.rootfs()?;
        let new = LxcContainer {
            lxcpath: self.container.lxcpath.clone(),
            name: check_name(new)?.to_owned(),
        };
        let target = new.dir();
        let taken = || {
            Error::failed(format!("{} already exists", target.shown())).hint("choose another name")
        };
        if disk::exists(&target)? {
            return Err(taken());
        }
        let Some(made) = staging_path(&target) else {
            return Err(Error::usage("the name of the new container is empty"));
        };
        let _making = create_locked(&made, &new.name, self.patience)?;
        let filled = self
            .fill(snapshot, &from, &made, &new, progress)
            .and_then(|notes| {
                disk::sync_all(&made)?;
                renameat_with(CWD, &made, CWD, &target, RenameFlags::NOREPLACE).map_err(
                    |error| match error {
                        rustix::io::Errno::EXIST => taken(),
                        other => Error::at("create", &target, std::io::Error::from(other)),
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
        snapshot: &LxcSnapshot,
        from: &Rootfs,
        made: &Path,
        new: &LxcContainer,
        progress: OnProgress<'_>,
    ) -> Result<Vec<String>> {
        let rootfs = made.join("rootfs");
        make_dir(&rootfs)?;
        let mut notes = copy(from, &rootfs, progress)?;
        rename_host(&rootfs, &self.container.name, &new.name)?;
        // Copy the scripts and tables that LXC copied into the snapshot.
        let at = |error| Error::at("list", &snapshot.dir, error);
        for entry in std::fs::read_dir(&snapshot.dir).map_err(at)? {
            let entry = entry.map_err(at)?;
            let name = entry.file_name();
            let own = SNAPSHOT_FILES.iter().any(|own| name == *own);
            if !own && entry.file_type().map_err(at)?.is_file() {
                files::copy_new(&entry.path(), &made.join(&name))?;
            }
        }
        // The config is written last, because it makes the directory a container.
        disk::sync_all(made)?;
        let target = new.dir();
        let rewrite = config::CopyRewrite {
            from: snapshot.dir.as_os_str().as_bytes(),
            to: target.as_os_str().as_bytes(),
            name: &new.name,
        };
        let text = layout::with_rootfs_dir(&snapshot.config()?, &target.join("rootfs"));
        let (text, more) = config::rewrite_for_copy(&text, &rewrite, random_address);
        notes.extend(more);
        let file = made.join("config");
        files::replace_name(&file, &text, 0o644)?;
        Ok(notes)
    }
}

/// Checks that LXC accepts a name for a container.
fn check_name(name: &str) -> Result<&str> {
    let plain = |c: char| !c.is_control() && c != '/';
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(
            Error::usage(format!("invalid container name \"{}\"", name.shown()))
                .hint("choose a name without '/' that does not begin with '.'"),
        );
    }
    Ok(name)
}

/// Exchanges the directories `new` and `top`, or renames `new` if `top` does not exist.
fn exchange(new: &Path, top: &Path) -> Result<()> {
    let flags = match disk::exists(top)? {
        true => RenameFlags::EXCHANGE,
        // A failed restore by LXC's own tool leaves no directory.
        false => RenameFlags::NOREPLACE,
    };
    renameat_with(CWD, new, CWD, top, flags).map_err(|error| {
        Error::at(
            "move the restored files to",
            top,
            std::io::Error::from(error),
        )
        .hint("nothing was changed")
    })?;
    disk::sync_parent(top)
}

/// Fails if a file system is mounted in the directory, or a process uses it.
fn refuse_used(name: &str, top: &Path) -> Result<()> {
    let mounts = mountinfo::read()?;
    let inside = mountinfo::topmost(&mounts, top).or_else(|| mountinfo::below(&mounts, top).last());
    if let Some(mount) = inside {
        let at = quoted(&mount.at);
        return Err(Error::busy(format!(
            "{name} is in use: a file system is mounted at {at}"
        ))
        .hint(format!("unmount it first: umount {at}")));
    }
    if !disk::exists(top)? {
        return Ok(());
    }
    let found = dir_users::list(top)?;
    if found.is_empty() {
        return Ok(());
    }
    let pids: Vec<_> = found.iter().map(|user| user.pid.to_string()).collect();
    Err(
        Error::busy(format!("{name} is in use by {}", users::describe(&found)))
            .hint(format!("stop them first: kill {}", pids.join(" "))),
    )
}

/// Replaces the old host name in the copy's own /etc/hostname.
fn rename_host(rootfs: &Path, old: &str, new: &str) -> Result<()> {
    let file = rootfs.join("etc/hostname");
    let at = |error| Error::at("open", &file, error);
    let root = dir::open_root(rootfs).map_err(at)?;
    // A symbolic link is not followed: an absolute one leads to a file of the host.
    let found = within::open(
        root.as_fd(),
        b"etc/hostname",
        SymlinkPolicy::Refused,
        OFlags::RDWR,
    );
    let mut hostname = match found.map_err(at)? {
        OpenedObject::File(file) => std::fs::File::from(file),
        OpenedObject::Nothing | OpenedObject::Other(_) => return Ok(()),
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
