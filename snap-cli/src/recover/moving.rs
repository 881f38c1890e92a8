//! Changes outside the store: a root filesystem that moves into or out of the store, and LXC's config.
//!
//! The manifest records the change before any file outside the store is modified, and each step is idempotent. So the
//! next command on the container can complete an interrupted change or roll it back.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::hostname::write_hostname;
use crate::container::external::{
    Leftover, MARKERS, marker_path, remove_marker, remove_readme, write_readme,
};
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::binding;
use crate::lxc::config;
use crate::lxc::mounts::{RootPaths, with_relative_targets};
use crate::lxc::own_files;
use crate::store::bytes::Blob;
use crate::store::collect;
use crate::store::deleted;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId};
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// The mode of a newly created config.
const CONFIG_MODE: u32 = 0o640;

/// Completes or rolls back all interrupted changes outside a store.
///
/// Skips containers that another command has locked. A failure is logged and does not affect other containers.
pub fn complete_all(store: &Store) -> Result<()> {
    for name in disk::names(&store.root().join(MARKERS))? {
        if let Err(error) = complete_marked(store, &name) {
            log::warn!("cannot complete an interrupted operation: {error}");
        }
    }
    Ok(())
}

/// Recovers the container of a marker, unless another command holds its lock.
fn complete_marked(store: &Store, name: &str) -> Result<()> {
    // A temporary file is not a marker yet: its change had not begun.
    let base = name.split('.').next().unwrap_or_default();
    let Some(id) = ContainerId::parse(base) else {
        return Ok(());
    };
    let Some(lock) = store.try_lock_container(id)? else {
        return Ok(());
    };
    if name != base {
        return disk::remove_if_exists(&store.root().join(MARKERS).join(name));
    }
    match store.container(id)? {
        Some(record) => {
            complete(Container::from_locked(store, id, record, lock))?;
            remove_marker(store, id)
        }
        None => {
            // The container was destroyed, or its creation was never committed.
            let path = marker_path(store, id);
            let bytes = std::fs::read(&path).map_err(|e| Error::at("read", &path, e))?;
            let rest: Leftover = serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                log::warn!(
                    "cannot remove the files of the destroyed container {id} outside the store: {}: {error}",
                    path.shown()
                );
                Leftover::default()
            });
            rest.remove(store, id)?;
            remove_marker(store, id)?;
            lock.remove()
        }
    }
}

/// Completes or rolls back an interrupted change. Returns `None` if the container does not exist any more then.
pub(crate) fn complete(mut container: Container<'_>) -> Result<Option<Container<'_>>> {
    container.resolve_pending()?;
    let Some(moving) = container.manifest().moving.clone() else {
        return Ok(Some(container));
    };
    match moving {
        Moving::Adopting => match is_moved_in(&container)? {
            true => {
                finish_adoption(&mut container)?;
                Ok(Some(container))
            }
            false => {
                roll_back_adoption(container)?;
                Ok(None)
            }
        },
        Moving::Releasing => {
            finish_release(container, None)?;
            Ok(None)
        }
        Moving::Writing { config, hostname } => {
            finish_writing(&mut container, &config, hostname.as_deref())?;
            Ok(Some(container))
        }
    }
}

/// Returns the bottom layer.
fn base_layer(container: &Container<'_>) -> Result<LayerId> {
    let last = container.manifest().stack.last();
    last.copied()
        .ok_or_else(|| Error::damaged(format!("{} has no layers", container.name())))
}

/// Returns the adopted directory in the manifest.
fn adopted(container: &Container<'_>) -> Result<Adopted> {
    let adopted = container.manifest().adopted.clone();
    adopted.ok_or_else(|| {
        Error::damaged(format!(
            "the manifest of {} does not name the directory that it was adopted from",
            container.name()
        ))
    })
}

/// Returns the inode number of `path`; `None` if it does not exist.
fn inode_number(path: &Path) -> Result<Option<u64>> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some(meta.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("inspect", path, error)),
    }
}

/// Returns whether the adopted root filesystem has been moved into the store.
fn is_moved_in(container: &Container<'_>) -> Result<bool> {
    let tree = container.store().paths().layer_tree(base_layer(container)?);
    Ok(inode_number(&tree)? == Some(adopted(container)?.inode))
}

/// Rolls back an adoption whose root filesystem has not been moved yet.
pub(crate) fn roll_back_adoption(container: Container<'_>) -> Result<()> {
    let (store, id) = (container.store(), container.id());
    deleted::discard(store, id)?;
    remove_marker(store, id)?;
    drop(container);
    collect::collect(store).map(drop)
}

/// Moves the root filesystem into the store: the step that commits an adoption.
pub(crate) fn move_in(container: &Container<'_>) -> Result<()> {
    let adopted = adopted(container)?;
    let tree = container.store().paths().layer_tree(base_layer(container)?);
    disk::rename(&adopted.rootfs, &tree)
}

/// Performs the steps of an adoption after the move.
pub(crate) fn finish_adoption(container: &mut Container<'_>) -> Result<()> {
    let name = container.name().clone();
    write_readme(&adopted(container)?.rootfs, &name)?;
    let mut next = container.manifest().clone();
    if let Some(link) = &mut next.lxc {
        let now = binding::read_config(link)?;
        let original = link
            .original
            .as_ref()
            .map_or(now.as_slice(), |text| &text.0);
        let roots = RootPaths::new(&link.dir(), original, &adopted(container)?.rootfs);
        let (now, _) = with_relative_targets(&now, &roots);
        let ours = binding::own_lines(
            container.store(),
            container.id(),
            &name,
            (&link.config(), &now),
        )?;
        let with = config::attach(&now, &ours);
        files::replace(&link.config(), &with, CONFIG_MODE)?;
        link.written = Blob(with);
    }
    commit_complete(container, next)
}

/// Commits a manifest without the change outside the store, and removes the marker.
fn commit_complete(container: &mut Container<'_>, next: ContainerManifest) -> Result<()> {
    let next = ContainerManifest {
        moving: None,
        ..next
    };
    container.commit(next, None, |_| Ok(Swap::Done))?;
    remove_marker(container.store(), container.id())
}

/// Moves the root filesystem out of the store, restores LXC's config, and removes the container. Returns notes for
/// the user.
///
/// `exclusive` is a lock that excludes other commands from the layer; it is released after the move.
pub(crate) fn finish_release(
    container: Container<'_>,
    exclusive: Option<Lock>,
) -> Result<Vec<String>> {
    let adopted = adopted(&container)?;
    let (store, id) = (container.store(), container.id());
    let tree = store.paths().layer_tree(base_layer(&container)?);
    let mut notes = Vec::new();
    if disk::exists(&tree)? {
        remove_readme(&adopted.rootfs)?;
        move_out(&tree, &adopted.rootfs, container.name().as_str())?;
    }
    drop(exclusive);
    if let Some(link) = &container.manifest().lxc {
        notes.extend(restore_config(link, &adopted.rootfs, &id.to_string())?);
    }
    deleted::discard(store, id)?;
    remove_marker(store, id)?;
    drop(container);
    collect::collect(store)?;
    Ok(notes)
}

/// Moves the root filesystem from a layer to the adopted directory, and syncs both parents.
fn move_out(tree: &Path, to: &Path, name: &str) -> Result<()> {
    std::fs::rename(tree, to).map_err(|error| {
        let what = format!("cannot move {} back to {}", tree.shown(), to.shown());
        let hint = match error.kind() {
            ErrorKind::DirectoryNotEmpty => {
                format!("move the files there to another directory, then type: cowl release {name}")
            }
            ErrorKind::NotFound => {
                format!("create the parent directory, then type: cowl release {name}")
            }
            _ => format!("fix the cause, then type: cowl release {name}"),
        };
        Error::failed(what).because(error).hint(hint)
    })?;
    disk::sync_parent(to)?;
    disk::sync_parent(tree)
}

/// Restores LXC's config. Returns a note if it was changed or removed since cowl wrote it.
fn restore_config(link: &Lxc, rootfs: &Path, id: &str) -> Result<Option<String>> {
    let path = link.config();
    let original = link.original.clone().unwrap_or_default();
    if !disk::exists(&path)? {
        return Ok(Some(format!(
            "{} no longer exists and was not restored",
            path.shown()
        )));
    }
    let now = binding::read_config(link)?;
    if now == original.0 || !config::has_own_lines(&now, id) {
        return Ok(None);
    }
    let back = config::detach(&now, Some(&original.0), id);
    let roots = RootPaths::new(&link.dir(), &original.0, rootfs);
    let (adopted, _) = with_relative_targets(&original.0, &roots);
    // The original's last line may lack a line break. Appending cowl's lines added one.
    if back.strip_suffix(b"\n").unwrap_or(&back) == adopted.strip_suffix(b"\n").unwrap_or(&adopted)
    {
        files::replace(&path, &original.0, CONFIG_MODE)?;
        return Ok(None);
    }
    files::replace(&path, &back, CONFIG_MODE)?;
    Ok(Some(format!(
        "{} was changed since it was adopted: removed only cowl's lines from it",
        path.shown()
    )))
}

/// Writes LXC's config. For a new LXC container, creates its directory and sets the host name first.
fn finish_writing(
    container: &mut Container<'_>,
    config: &Blob,
    hostname: Option<&str>,
) -> Result<()> {
    let mut next = container.manifest().clone();
    let Some(link) = &mut next.lxc else {
        return commit_complete(container, next);
    };
    if let Some(hostname) = hostname
        && let Err(error) = write_hostname(container, hostname)
    {
        log::warn!(
            "cannot change the host name in {}, which still has that of the original: {error}",
            container.name()
        );
    }
    if hostname.is_some() {
        // The host name must be durable before the manifest records the change as complete.
        disk::sync_all(
            &container
                .store()
                .paths()
                .layer_tree(container.manifest().head),
        )?;
    }
    binding::ensure_dir(link, &config.0)?;
    if let Some(adopted) = &next.adopted {
        write_readme(&adopted.rootfs, container.name())?;
    }
    own_files::write_missing(&link.files, &link.dir())?;
    files::replace(&link.config(), &config.0, CONFIG_MODE)?;
    link.written = config.clone();
    commit_complete(container, next)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::container::external::{README, write_marker};
    use crate::store::tests::session;

    #[test]
    fn an_operation_that_cannot_be_completed_affects_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = |digit: char| {
            let text = "00000000-0000-4000-8000-000000000000".replace('0', &digit.to_string());
            ContainerId::parse(&text).unwrap()
        };
        let leftover = |rootfs: PathBuf| {
            let name = crate::store::name::ContainerName::parse("web").unwrap();
            let mut manifest = ContainerManifest::new(name, LayerId::fresh(), &[]);
            manifest.adopted = Some(Adopted {
                rootfs,
                inode: 0,
                extra: serde_json::Map::new(),
            });
            Leftover::from_manifest(&manifest)
        };
        // A name that exceeds NAME_MAX cannot be inspected.
        write_marker(&store, id('1'), &leftover(dir.path().join("x".repeat(300)))).unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        std::fs::write(rootfs.join(README), "").unwrap();
        write_marker(&store, id('2'), &leftover(rootfs.clone())).unwrap();
        complete_all(&store).unwrap();
        assert!(!disk::exists(&rootfs).unwrap());
        let left = disk::names(&store.root().join(MARKERS)).unwrap();
        assert_eq!(left, [id('1').to_string()]);
    }
}
