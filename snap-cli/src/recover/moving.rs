//! Changes that need more than the manifest: a root file system that moves into the store or out of it, and
//! LXC's config. The manifest says what is under way before anything outside the store is touched, and each step
//! can be repeated. So the next command on the container completes an interrupted change, or rolls it back.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::hostname::write_hostname;
use crate::container::external::{Leftover, SIGNS, remove_readme, sign, unmark, write_readme};
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::binding;
use crate::lxc::config;
use crate::store::bytes::Blob;
use crate::store::collect;
use crate::store::deleted;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId};
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// The mode of a config that was not there before.
const CONFIG_MODE: u32 = 0o640;

/// Completes or rolls back what killed commands left under way in a store. Containers that another command
/// works on are skipped. A container for which that fails is reported, and does not affect the others.
pub fn complete_all(store: &Store) -> Result<()> {
    for name in disk::names(&store.root().join(SIGNS))? {
        if let Err(error) = complete_signed(store, &name) {
            log::warn!("an interrupted operation cannot be completed: {error}");
        }
    }
    Ok(())
}

fn complete_signed(store: &Store, name: &str) -> Result<()> {
    // A temporary file is no sign yet: its change had not begun.
    let whole = name.split('.').next().unwrap_or_default();
    let Some(id) = ContainerId::parse(whole) else {
        return Ok(());
    };
    let Some(lock) = store.try_lock_container(id)? else {
        return Ok(());
    };
    if name != whole {
        return disk::remove_if_there(&store.root().join(SIGNS).join(name));
    }
    match store.container(id)? {
        Some(record) => {
            complete(Container::from_locked(store, id, record, lock))?;
            unmark(store, id)
        }
        None => {
            // It was destroyed, or never committed.
            let path = sign(store, id);
            let bytes = std::fs::read(&path).map_err(|e| Error::at("read", &path, e))?;
            let rest: Leftover = serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                log::warn!(
                    "what the destroyed container {id} left outside the store is not removed: {}: {error}",
                    path.shown()
                );
                Leftover::default()
            });
            rest.remove(store, id)?;
            unmark(store, id)?;
            lock.remove()
        }
    }
}

/// Completes the change that is under way, or rolls it back. Returns `None` if the container does not exist then.
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

fn base(container: &Container<'_>) -> Result<LayerId> {
    let last = container.manifest().stack.last();
    last.copied()
        .ok_or_else(|| Error::damaged("a container without any layer"))
}

fn place(container: &Container<'_>) -> Result<Adopted> {
    let adopted = container.manifest().adopted.clone();
    adopted
        .ok_or_else(|| Error::damaged("the place that the container was taken over from is lost"))
}

fn inode(path: &Path) -> Result<Option<u64>> {
    match std::fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some(meta.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("look at", path, error)),
    }
}

fn is_moved_in(container: &Container<'_>) -> Result<bool> {
    let tree = container.store().paths().layer_tree(base(container)?);
    Ok(inode(&tree)? == Some(place(container)?.inode))
}

/// Rolls back an adoption that has moved nothing yet.
pub(crate) fn roll_back_adoption(container: Container<'_>) -> Result<()> {
    let (store, id) = (container.store(), container.id());
    deleted::discard(store, id)?;
    unmark(store, id)?;
    drop(container);
    collect::collect(store).map(drop)
}

/// Moves the root file system into the store: the step that commits an adoption.
pub(crate) fn move_in(container: &Container<'_>) -> Result<()> {
    let adopted = place(container)?;
    let tree = container.store().paths().layer_tree(base(container)?);
    disk::rename(&adopted.rootfs, &tree)
}

/// Does all of an adoption that comes after the move.
pub(crate) fn finish_adoption(container: &mut Container<'_>) -> Result<()> {
    let name = container.name().clone();
    write_readme(&place(container)?.rootfs, &name)?;
    let mut next = container.manifest().clone();
    if let Some(link) = &mut next.lxc {
        let now = binding::read_config(link)?;
        let ours = binding::own_lines(container.store(), container.id(), &name, (link, &now))?;
        let with = config::attach(&now, &ours);
        files::replace(&link.config(), &with, CONFIG_MODE)?;
        link.written = Blob(with);
    }
    done(container, next)
}

/// Commits a manifest that says that the change outside the store is complete.
fn done(container: &mut Container<'_>, next: ContainerManifest) -> Result<()> {
    let next = ContainerManifest {
        moving: None,
        ..next
    };
    container.commit(next, None, |_| Ok(Swap::Done))?;
    unmark(container.store(), container.id())
}

/// Moves the root file system out, changes LXC's config back, and removes the container from the store. Returns
/// notes for the user. `alone` keeps other commands from the layer until it has moved.
pub(crate) fn finish_release(container: Container<'_>, alone: Option<Lock>) -> Result<Vec<String>> {
    let adopted = place(&container)?;
    let (store, id) = (container.store(), container.id());
    let tree = store.paths().layer_tree(base(&container)?);
    let mut notes = Vec::new();
    if disk::is_there(&tree)? {
        remove_readme(&adopted.rootfs)?;
        move_out(&tree, &adopted.rootfs, container.name().as_str())?;
    }
    drop(alone);
    if let Some(link) = &container.manifest().lxc {
        notes.extend(config_back(link, &id.to_string())?);
    }
    deleted::discard(store, id)?;
    unmark(store, id)?;
    drop(container);
    collect::collect(store)?;
    Ok(notes)
}

fn move_out(tree: &Path, to: &Path, name: &str) -> Result<()> {
    std::fs::rename(tree, to).map_err(|error| {
        let what = format!("cannot move {} back to {}", tree.shown(), to.shown());
        let hint = match error.kind() {
            ErrorKind::DirectoryNotEmpty => {
                format!("something was put there: move it away, then type: cowl release {name}")
            }
            ErrorKind::NotFound => {
                format!("make the folder that it was in, then type: cowl release {name}")
            }
            _ => format!("when that is mended, type: cowl release {name}"),
        };
        Error::failed(what).because(error).hint(hint)
    })?;
    disk::sync_parent(to)?;
    disk::sync_parent(tree)
}

fn config_back(link: &Lxc, id: &str) -> Result<Option<String>> {
    let path = link.config();
    let original = link.original.clone().unwrap_or_default();
    if !disk::is_there(&path)? {
        return Ok(Some(format!(
            "{} is gone, and was not made anew",
            path.shown()
        )));
    }
    let now = binding::read_config(link)?;
    if now == original.0 || !config::has_own_lines(&now, id) {
        return Ok(None);
    }
    let back = config::detach(&now, Some(&original.0), id);
    // The last line may have had no end, which is the one thing that cowl's lines at the end changed.
    if back.strip_suffix(b"\n").unwrap_or(&back)
        == original.0.strip_suffix(b"\n").unwrap_or(&original.0)
    {
        files::replace(&path, &original.0, CONFIG_MODE)?;
        return Ok(None);
    }
    files::replace(&path, &back, CONFIG_MODE)?;
    Ok(Some(format!(
        "{} was changed meanwhile: only cowl's lines were taken out of it",
        path.shown()
    )))
}

/// Puts LXC's config in its place; for a new container, creates its directory first.
fn finish_writing(
    container: &mut Container<'_>,
    config: &Blob,
    hostname: Option<&str>,
) -> Result<()> {
    let mut next = container.manifest().clone();
    let Some(link) = &mut next.lxc else {
        return done(container, next);
    };
    if let Some(hostname) = hostname
        && let Err(error) = write_hostname(container, hostname)
    {
        log::warn!(
            "{} keeps the host name of what it is a copy of: {error}",
            container.name()
        );
    }
    if hostname.is_some() {
        // Before the manifest says that it is done.
        disk::sync_all(
            &container
                .store()
                .paths()
                .layer_tree(container.manifest().head),
        )?;
    }
    binding::ensure_dir(link)?;
    if let Some(adopted) = &next.adopted {
        write_readme(&adopted.rootfs, container.name())?;
    }
    files::replace(&link.config(), &config.0, CONFIG_MODE)?;
    link.written = config.clone();
    done(container, next)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::container::external::{README, mark};
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
            Leftover::of(&manifest)
        };
        // A name that is longer than any may be cannot be inspected.
        mark(&store, id('1'), &leftover(dir.path().join("x".repeat(300)))).unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        std::fs::write(rootfs.join(README), "").unwrap();
        mark(&store, id('2'), &leftover(rootfs.clone())).unwrap();
        complete_all(&store).unwrap();
        assert!(!disk::is_there(&rootfs).unwrap());
        let left = disk::names(&store.root().join(SIGNS)).unwrap();
        assert_eq!(left, [id('1').to_string()]);
    }
}
