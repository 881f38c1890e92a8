//! Changes that need more than the manifest: a root file system that moves into the store or out of it, and
//! LXC's config. The manifest says what is under way before anything outside is touched, and each step can
//! be done again; so whoever opens the container next finishes what a killed command began, or takes it
//! back. A file in the store's folder `moving` is the sign that there is something to finish, so that other
//! commands need not read every manifest.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::lxc;
use super::{Container, Swap};
use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::config;
use crate::shell::quoted;
use crate::store::bytes::Blob;
use crate::store::layers::remove_tree;
use crate::store::lock::Lock;
use crate::store::manifest::{ContainerId, ContainerManifest, LayerId};
use crate::store::name::ContainerName;
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::{Store, disk};
use cowl_layers::shown::Show as _;

/// The mode of a config that was not there before.
const CONFIG_MODE: u32 = 0o640;

/// The folder of signs.
const SIGNS: &str = "moving";

/// The file that stands where a root file system was, and what it says.
pub const README: &str = "MOVED-TO-COWL.txt";

fn sign(store: &Store, id: ContainerId) -> PathBuf {
    store.root().join(SIGNS).join(id.to_string())
}

/// Leaves the sign that something is under way; on the disk before anything that it stands for.
pub(super) fn mark(store: &Store, id: ContainerId, rest: &Leftover) -> Result<()> {
    let path = sign(store, id);
    disk::ensure_dir(&store.root().join(SIGNS))?;
    let bytes = serde_json::to_vec(rest).map_err(|e| Error::at("write", &path, e))?;
    disk::replace_bytes(&path, &bytes)
}

/// Leaves the sign of a config that is about to be written, and gives what the manifest is to say of it.
pub(super) fn begin_writing(store: &Store, id: ContainerId, config: Blob) -> Result<Moving> {
    mark(store, id, &Leftover::default())?;
    Ok(Moving::Writing {
        config,
        hostname: None,
    })
}

/// Nothing is under way any more.
pub(super) fn unmark(store: &Store, id: ContainerId) -> Result<()> {
    disk::remove_if_there(&sign(store, id))
}

/// What is left outside the store once a container is destroyed.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Leftover {
    #[serde(default)]
    adopted: Option<Adopted>,
    #[serde(default)]
    lxc: Option<Lxc>,
}

impl Leftover {
    /// What a container leaves.
    pub(super) fn of(manifest: &ContainerManifest) -> Self {
        Self {
            adopted: manifest.adopted.clone(),
            lxc: manifest.lxc.clone(),
        }
    }

    /// Whether there is anything.
    pub(super) fn is_none(&self) -> bool {
        self.adopted.is_none() && self.lxc.is_none()
    }

    /// Removes it once the container is gone: the folder that only says where the files went, and LXC's
    /// config; LXC's folder when nothing else is in it. What anybody else put there stays.
    pub(super) fn remove(&self, store: &Store, id: ContainerId) -> Result<()> {
        if self.is_none() {
            return Ok(());
        }
        if let Some(adopted) = &self.adopted {
            remove_readme(&adopted.rootfs)?;
            remove_if_empty(&adopted.rootfs)?;
        }
        if let Some(link) = &self.lxc {
            let there = disk::is_there(&link.config())?;
            if !there || config::names(&lxc::read_config(link)?, &id.to_string()) {
                disk::remove_if_there(&link.config())?;
                remove_if_empty(&link.dir())?;
            }
        }
        unmark(store, id)
    }
}

/// Removes the folder of a copy of LXC's that has no root file system of its own, as LXC would if cowl's
/// lines had not told it to leave that alone: with what an overlay copy wrote.
pub(super) fn remove_copy(config: &Path) -> Result<()> {
    let dir = config.parent().unwrap_or(config);
    remove_if_empty(&dir.join("rootfs"))?;
    remove_tree(&dir.join("overlay"))?;
    for name in ["config", "lxc_rdepends"] {
        disk::remove_if_there(&dir.join(name))?;
    }
    remove_if_empty(dir)
}

/// Completes or rolls back what killed commands left under way in a store. Containers that another command
/// works on are skipped. A container for which that fails is reported, and does not affect the others.
pub fn finish_all(store: &Store) -> Result<()> {
    for name in disk::names(&store.root().join(SIGNS))? {
        if let Err(error) = finish_sign(store, &name) {
            log::warn!("an interrupted operation cannot be completed: {error}");
        }
    }
    Ok(())
}

fn finish_sign(store: &Store, name: &str) -> Result<()> {
    // One that was being written is a sign of nothing: what it is for had not begun.
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
            let container = Container {
                store,
                id,
                record,
                config: None,
                lock,
            };
            finish(container)?;
            unmark(store, id)
        }
        None => {
            // It was destroyed, or never came to be.
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

/// Finishes, or takes back, what is under way. `None`: then there is no such container.
pub(super) fn finish(mut container: Container<'_>) -> Result<Option<Container<'_>>> {
    container.settle()?;
    let Some(moving) = container.manifest().moving.clone() else {
        return Ok(Some(container));
    };
    match moving {
        Moving::Adopting => match is_moved_in(&container)? {
            true => {
                adopted(&mut container)?;
                Ok(Some(container))
            }
            false => {
                take_back(container)?;
                Ok(None)
            }
        },
        Moving::Releasing => {
            released(container, None)?;
            Ok(None)
        }
        Moving::Writing { config, hostname } => {
            written(&mut container, &config, hostname.as_deref())?;
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
    let tree = container.store.layer_tree(base(container)?);
    Ok(inode(&tree)? == Some(place(container)?.inode))
}

/// Takes an adoption back that has moved nothing yet.
pub(super) fn take_back(container: Container<'_>) -> Result<()> {
    let (store, id) = (container.store, container.id);
    store.discard_container(id)?;
    unmark(store, id)?;
    drop(container);
    store.collect().map(drop)
}

/// The root file system moves in: the one step of an adoption that counts.
pub(super) fn move_in(container: &Container<'_>) -> Result<()> {
    let adopted = place(container)?;
    let tree = container.store.layer_tree(base(container)?);
    disk::rename(&adopted.rootfs, &tree)
}

/// All of an adoption that comes after the move.
pub(super) fn adopted(container: &mut Container<'_>) -> Result<()> {
    let name = container.name().clone();
    write_readme(&place(container)?.rootfs, &name)?;
    let mut next = container.manifest().clone();
    if let Some(link) = &mut next.lxc {
        let now = lxc::read_config(link)?;
        let ours = lxc::ours(container.store, container.id, &name, (link, &now))?;
        let with = config::attach(&now, &ours);
        files::replace(&link.config(), &with, CONFIG_MODE)?;
        link.written = Blob(with);
    }
    done(container, next)
}

/// The change outside is done: the manifest says so too.
fn done(container: &mut Container<'_>, next: ContainerManifest) -> Result<()> {
    let next = ContainerManifest {
        moving: None,
        ..next
    };
    container.commit(next, None, |_| Ok(Swap::Done))?;
    unmark(container.store, container.id)
}

/// The root file system moves out, LXC's config changes back, and the container leaves the store. Tells
/// what people should know. `alone` keeps others from the layer until it has moved.
pub(super) fn released(container: Container<'_>, alone: Option<Lock>) -> Result<Vec<String>> {
    let adopted = place(&container)?;
    let (store, id) = (container.store, container.id);
    let tree = store.layer_tree(base(&container)?);
    let mut notes = Vec::new();
    if disk::is_there(&tree)? {
        remove_readme(&adopted.rootfs)?;
        move_out(&tree, &adopted.rootfs, container.name().as_str())?;
    }
    drop(alone);
    if let Some(link) = &container.manifest().lxc {
        notes.extend(config_back(link, &id.to_string())?);
    }
    store.discard_container(id)?;
    unmark(store, id)?;
    drop(container);
    store.collect()?;
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
    let now = lxc::read_config(link)?;
    if now == original.0 || !config::names(&now, id) {
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

/// LXC's config is put in its place; its folder is made first where it is a new container's.
pub(super) fn written(
    container: &mut Container<'_>,
    config: &Blob,
    hostname: Option<&str>,
) -> Result<()> {
    let mut next = container.manifest().clone();
    let Some(link) = &mut next.lxc else {
        return done(container, next);
    };
    if let Some(hostname) = hostname
        && let Err(error) = lxc::write_hostname(container, hostname)
    {
        log::warn!(
            "{} keeps the host name of what it is a copy of: {error}",
            container.name()
        );
    }
    if hostname.is_some() {
        // Before the manifest says that it is done.
        disk::sync_all(&container.store.layer_tree(container.manifest().head))?;
    }
    lxc::ensure_dir(link)?;
    if let Some(adopted) = &next.adopted {
        write_readme(&adopted.rootfs, container.name())?;
    }
    files::replace(&link.config(), &config.0, CONFIG_MODE)?;
    link.written = config.clone();
    done(container, next)
}

fn write_readme(folder: &Path, name: &ContainerName) -> Result<()> {
    let text = format!(
        "The files of this container are kept by cowl, as the container {name}.\n\
         To look at them:     cowl mount {name}\n\
         To get them back:    cowl release {name}\n\
         What is put in this folder is no part of the container.\n"
    );
    disk::ensure_dir(folder)?;
    files::replace_name(&folder.join(README), text.as_bytes(), 0o644)?;
    disk::sync_parent(folder)
}

fn remove_readme(folder: &Path) -> Result<()> {
    match std::fs::remove_file(folder.join(README)) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(())
        }
        Err(error) => Err(Error::at("remove", &folder.join(README), error)),
    }
}

fn remove_if_empty(folder: &Path) -> Result<()> {
    match std::fs::remove_dir(folder) {
        Ok(()) => Ok(()),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(Error::at("remove", folder, error)),
    }
}

/// Whether something besides cowl's own file lies where a root file system was: its name, for messages.
pub(super) fn foreign(folder: &Path) -> Result<Option<String>> {
    match std::fs::symlink_metadata(folder) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Ok(Some(quoted(folder))),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::at("look at", folder, error)),
    }
    let at = |error| Error::at("list", folder, error);
    for entry in std::fs::read_dir(folder).map_err(at)? {
        let name = entry.map_err(at)?.file_name();
        if name != README {
            return Ok(Some(quoted(folder.join(name))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::session;

    #[test]
    fn an_operation_that_cannot_be_completed_affects_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_or_make(&dir.path().join("s"), session()).unwrap();
        let id = |digit: char| {
            let text = "00000000-0000-4000-8000-000000000000".replace('0', &digit.to_string());
            ContainerId::parse(&text).unwrap()
        };
        let leftover = |rootfs: PathBuf| Leftover {
            adopted: Some(Adopted {
                rootfs,
                inode: 0,
                extra: serde_json::Map::new(),
            }),
            lxc: None,
        };
        // A name that is longer than any may be cannot be inspected.
        mark(&store, id('1'), &leftover(dir.path().join("x".repeat(300)))).unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        std::fs::write(rootfs.join(README), "").unwrap();
        mark(&store, id('2'), &leftover(rootfs.clone())).unwrap();
        finish_all(&store).unwrap();
        assert!(!disk::is_there(&rootfs).unwrap());
        let left = disk::names(&store.root().join(SIGNS)).unwrap();
        assert_eq!(left, [id('1').to_string()]);
    }
}
