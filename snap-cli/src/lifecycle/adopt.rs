//! Taking over a root file system where it stands: a container of LXC's, or any folder. Nothing is copied:
//! the folder becomes a layer by one rename, so the store must be on its file system.

use std::collections::HashMap;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::sys::stat::FileKind;
use serde_json::Map;

use crate::container::external::{self, Leftover};
use crate::container::{Container, Swap};
use crate::error::{Error, Result};
use crate::host::files;
use crate::host::{dir_users, mountinfo, users};
use crate::lxc::binding;
use crate::lxc::{self as tools, LxcContainer, config, snapshots};
use crate::recover::{self, moving};
use crate::shell::quoted;
use crate::store::bytes::Blob;
use crate::store::family;
use crate::store::making::Making;
use crate::store::manifest::{ContainerManifest, LayerKind};
use crate::store::name::ContainerName;
use crate::store::outside::{Adopted, Lxc, Moving};
use crate::store::record::Record;
use crate::store::{Store, disk};
use crate::tree::walk::{self, Item};
use cowl_layers::shown::Show as _;

/// What is to be taken over.
#[derive(Clone, Debug)]
pub enum What {
    /// A folder.
    Folder(PathBuf),
    /// A container of LXC's.
    Lxc(LxcContainer),
}

/// What is known of it, all that could be refused refused.
#[derive(Debug)]
pub struct Candidate {
    /// The real path of the root file system.
    rootfs: PathBuf,
    /// Its inode number: later it may be another folder.
    inode: u64,
    lxc: Option<Lxc>,
    /// What people should know.
    pub notes: Vec<String>,
}

impl Candidate {
    /// Looks at what is to be taken over. Changes nothing.
    pub fn look(home: &Store, what: &What) -> Result<Self> {
        let mut notes = Vec::new();
        let (rootfs, lxc) = match what {
            What::Folder(path) => (path.clone(), None),
            What::Lxc(container) => {
                let (rootfs, link) = look_at_lxc(home, container, &mut notes)?;
                (rootfs, Some(link))
            }
        };
        let at = |error| Error::at("adopt", &rootfs, error);
        let real = rootfs.canonicalize().map_err(at)?;
        if !real.is_dir() {
            return Err(Error::usage(format!("{} is no folder", rootfs.shown()))
                .hint("adopt takes the folder of a root file system, or LXC's container's name"));
        }
        if real != std::path::absolute(&rootfs).map_err(at)? {
            notes.push(format!("what is taken over is {}", real.shown()));
        }
        check_place(home, &real)?;
        let meta = std::fs::symlink_metadata(&real).map_err(at)?;
        Ok(Self {
            rootfs: real,
            inode: meta.ino(),
            lxc,
            notes,
        })
    }

    /// The store that is to take it: one of the family on the same file system, or a new one there.
    pub fn store(&self, home: &Store, asked: Option<&Path>) -> Result<Store> {
        let parent = self.rootfs.parent().unwrap_or(Path::new("/"));
        let mount = mountinfo::find_containing(parent)?;
        if let Some(asked) = asked {
            let asked = std::path::absolute(asked).map_err(|e| Error::at("use", asked, e))?;
            // It may have to be made: then what counts is the folder that it will be made in.
            let real = asked.ancestors().find_map(|path| path.canonicalize().ok());
            if real.is_some_and(|real| real.starts_with(&self.rootfs)) {
                return Err(Error::usage(format!(
                    "the store {} would lie in what it is to take over",
                    asked.shown()
                ))
                .hint("name a folder beside it"));
            }
            let there = asked
                .ancestors()
                .find_map(|path| mountinfo::find_containing(path).ok());
            if there.is_none_or(|there| there.id != mount.id) {
                return Err(Error::usage(format!(
                    "{} is not on the file system of {}, which is mounted at {}",
                    asked.shown(),
                    self.rootfs.shown(),
                    mount.at.shown()
                ))
                .hint(format!(
                    "name a folder on that file system, or copy it instead: cowl create NAME --from {}",
                    quoted(&self.rootfs)
                )));
            }
            return family::join(home, &asked);
        }
        for store in family::stores(home.home(), home.session())? {
            if mountinfo::find_containing(store.root())?.id == mount.id {
                return Ok(store);
            }
        }
        family::join(home, &mount.at.join(".cowl"))
    }
}

fn look_at_lxc(
    home: &Store,
    container: &LxcContainer,
    notes: &mut Vec<String>,
) -> Result<(PathBuf, Lxc)> {
    let path = container.config();
    let text = match files::read_opt(&path)? {
        Some(text) => text,
        None => {
            let lxcpath = &container.lxcpath;
            return Err(Error::not_found(format!(
                "there is no LXC container named {} in {}",
                container.name,
                lxcpath.shown()
            ))
            .hint(format!(
                "lxc-ls -P {} shows those that there are; -P names another folder",
                quoted(lxcpath)
            )));
        }
    };
    refuse_adopted(home, container)?;
    if let tools::State::Running { word, pid } = container.state()? {
        let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
        return Err(
            Error::busy(format!("{} is {word}{pid}", container.name)).hint(format!(
                "stop it: lxc-stop {}; then type: {}",
                container.options(),
                home.session().who
            )),
        );
    }
    let rootfs = rootfs_of(container, &text)?;
    if !snapshots::dependants(&container.dir())?.is_empty() {
        return Err(Error::failed(format!(
            "other LXC containers stand on the files of {}: {} names them",
            container.name,
            container.dir().join("lxc_snapshots").shown()
        ))
        .hint(format!(
            "copy it instead: cowl create {} --from {}",
            container.name,
            quoted(&rootfs)
        )));
    }
    let snaps = container.dir().join("snaps");
    if !disk::names(&snaps)?.is_empty() {
        notes.push(format!(
            "the snapshots that lxc-snapshot took stay in {}; cowl's lxc-snapshot works on them, \
             LXC's own must not restore them any more",
            snaps.shown()
        ));
    }
    let link = Lxc {
        lxcpath: container.lxcpath.clone(),
        name: container.name.clone(),
        original: Some(Blob(text.clone())),
        written: Blob(text),
        extra: Map::new(),
    };
    Ok((rootfs, link))
}

fn refuse_adopted(home: &Store, container: &LxcContainer) -> Result<()> {
    match known(home, container)? {
        None => Ok(()),
        Some((_, name)) => Err(Error::failed(format!(
            "{} is cowl's already, as the container {name}",
            container.name
        ))
        .hint(format!("cowl list {name} shows its snapshots"))),
    }
}

/// The container that an LXC container is already, with its store.
pub fn known(home: &Store, container: &LxcContainer) -> Result<Option<(Store, ContainerName)>> {
    let wanted = container.dir().canonicalize();
    let wanted = wanted.unwrap_or_else(|_| container.dir());
    for store in family::stores(home.home(), home.session())? {
        for (_, record) in store.containers()? {
            let Ok(record) = record else { continue };
            let Some(link) = &record.body.lxc else {
                continue;
            };
            if link.dir() == wanted || link.dir() == container.dir() {
                let name = record.body.name;
                return Ok(Some((store, name)));
            }
        }
    }
    Ok(None)
}

/// Writes the lines of an adopted container's LXC config as they are to be: where the program or the store
/// has moved, or somebody took them out. False when they are.
pub fn renew(store: &Store, name: &ContainerName) -> Result<bool> {
    let mut container = recover::open(store, name)?;
    let Some(link) = &container.manifest().lxc else {
        return Ok(false);
    };
    let now = binding::read_config(link)?;
    let ours = binding::own_lines(store, container.id(), name, (link, &now))?;
    let with = config::attach(&now, &ours);
    if with == now {
        return Ok(false);
    }
    container.write_config_with_next(Blob(with));
    let next = container.manifest().clone();
    container.commit(next, None, |_| Ok(Swap::Done))?;
    recover::complete_outside(container)?;
    Ok(true)
}

/// The folder of the root file system that the config names.
fn rootfs_of(container: &LxcContainer, text: &[u8]) -> Result<PathBuf> {
    let value = match config::get(text, config::ROOTFS) {
        Some(value) => value.to_vec(),
        // From a file that it includes.
        None => container.value(config::ROOTFS)?.unwrap_or_default(),
    };
    let path = value.strip_prefix(b"dir:").unwrap_or(&value).to_vec();
    if path.first() == Some(&b'/') {
        return Ok(PathBuf::from(std::ffi::OsString::from_vec(path)));
    }
    let config = container.config();
    if path.is_empty() {
        return Err(Error::failed(format!(
            "{} does not say where the root file system is (lxc.rootfs.path)",
            config.shown()
        ))
        .hint(format!(
            "an old config is brought up to date with: lxc-update-config -c {}",
            quoted(&config)
        )));
    }
    let kind = path.split(|&byte| byte == b':').next().unwrap_or_default();
    Err(Error::failed(format!(
        "the root file system of {} is no plain folder but {}: {}",
        container.name,
        kind.escape_ascii(),
        path.escape_ascii()
    ))
    .hint(format!(
        "make a copy in a folder, and adopt that: lxc-copy {} -N {}-dir -B dir",
        container.options(),
        container.name
    )))
}

/// What must hold of the folder, whatever it is.
fn check_place(home: &Store, rootfs: &Path) -> Result<()> {
    if rootfs.parent().is_none() {
        return Err(Error::usage(
            "the root file system of this machine can't be adopted",
        ));
    }
    for store in family::stores(home.home(), home.session())? {
        let root = store.root().canonicalize();
        let root = root.map_err(|e| Error::at("use", store.root(), e))?;
        if rootfs.starts_with(&root) || root.starts_with(rootfs) {
            return Err(Error::usage(format!(
                "{} and the store {} lie in each other",
                rootfs.shown(),
                root.shown()
            )));
        }
    }
    refuse_marker(rootfs)?;
    let mounts = mountinfo::read()?;
    if mountinfo::topmost(&mounts, rootfs).is_some() {
        return Err(
            Error::busy(format!("{} is a mount of its own", rootfs.shown()))
                .hint("unmount it, or adopt a folder in it"),
        );
    }
    let inner: Vec<_> = mountinfo::below(&mounts, rootfs)
        .map(|mount| &mount.at)
        .collect();
    if let Some(last) = inner.last() {
        let all: Vec<_> = inner.iter().map(|at| at.shown().to_string()).collect();
        return Err(Error::busy(format!(
            "something is mounted in {}: {}",
            rootfs.shown(),
            all.join(", ")
        ))
        .hint(format!(
            "unmount it: umount {}; then type: {}",
            quoted(last),
            home.session().who
        )));
    }
    refuse_users(rootfs, rootfs, &home.session().who)
}

/// Refuses the folder that only says where a container's files went.
fn refuse_marker(rootfs: &Path) -> Result<()> {
    if !disk::is_there(&rootfs.join(external::README))? {
        return Ok(());
    }
    Err(Error::failed(format!(
        "the files of {} are cowl's already: see {} in it",
        rootfs.shown(),
        external::README
    ))
    .hint("cowl list shows all containers"))
}

/// Refuses while somebody uses what lies at `place`, which people know as `rootfs`.
fn refuse_users(place: &Path, rootfs: &Path, who: &str) -> Result<()> {
    let inside = dir_users::list(place)?;
    if inside.is_empty() {
        return Ok(());
    }
    let pids: Vec<_> = inside.iter().map(|user| user.pid.to_string()).collect();
    Err(Error::busy(format!(
        "{} is in use by {}",
        rootfs.shown(),
        users::describe(&inside)
    ))
    .hint(format!(
        "end what uses it (kill {}), then type: {who}",
        pids.join(" ")
    )))
}

/// Refuses a tree with what means something to an overlay: in a layer it would not be seen. Answers with how
/// many files have names outside the tree, through which they can be written behind the store's back.
fn look_through(rootfs: &Path, space: XattrSpace) -> Result<usize> {
    let mut found: Option<Vec<u8>> = None;
    let mut linked: HashMap<u64, u64> = HashMap::new();
    walk::visit_dir(rootfs, &mut |item: &Item<'_>| {
        if found.is_some() {
            return Ok(());
        }
        if item.kind() != FileKind::Directory && item.stat.nlink > 1 {
            let left = linked.entry(item.stat.ino).or_insert(item.stat.nlink);
            *left = left.saturating_sub(1);
        }
        let name = item.name();
        let device = item.kind() == FileKind::CharDevice && item.stat.rdev == 0;
        let marked = || -> Result<bool, crate::tree::TreeError> {
            let xattrs = item.xattrs()?;
            Ok(xattrs
                .iter()
                .any(|(name, _)| space.to_disk(name).as_ref() != name.as_slice()))
        };
        if device || name.starts_with(b".wh.") || marked()? {
            found = Some(item.path.to_vec());
        }
        Ok(())
    })?;
    let Some(path) = found else {
        return Ok(linked.values().filter(|left| **left > 0).count());
    };
    Err(Error::failed(format!(
        "{} holds {}, which is a mark of an overlay file system: in a layer it would not be seen",
        rootfs.shown(),
        path.escape_ascii()
    ))
    .hint(format!(
        "copy it instead, which keeps such things: cowl create NAME --from {}",
        quoted(rootfs)
    )))
}

/// Takes it over as the container `name` of `store`, which must be on its file system. Tells what people
/// should know.
pub fn adopt(store: &Store, candidate: &Candidate, name: &ContainerName) -> Result<Vec<String>> {
    let rootfs = &candidate.rootfs;
    let outside = look_through(rootfs, store.space())?;
    let claim = family::claim(store, name)?;
    let done = one_at_a_time(store, candidate, name);
    claim.remove()?;
    done?;
    let mut notes = candidate.notes.clone();
    if outside > 0 {
        let files = match outside {
            1 => "one file has another name".to_owned(),
            n => format!("{n} files have other names"),
        };
        notes.push(format!(
            "{files} outside {}: what is written through it changes the container and its snapshots",
            rootfs.shown()
        ));
    }
    Ok(notes)
}

fn one_at_a_time(store: &Store, candidate: &Candidate, name: &ContainerName) -> Result<()> {
    let alone = family::lock_adoption(store)?;
    let rootfs = &candidate.rootfs;
    // Somebody may have taken it over, or begun to use it, meanwhile.
    let meta = std::fs::symlink_metadata(rootfs).map_err(|e| Error::at("adopt", rootfs, e))?;
    let done = if meta.ino() == candidate.inode {
        refuse_marker(rootfs)
            .and_then(|()| refuse_users(rootfs, rootfs, &store.session().who))
            .and_then(|()| adopt_claimed(store, candidate, name))
    } else {
        Err(Error::busy(format!(
            "{} is another folder than a moment ago",
            rootfs.shown()
        ))
        .hint("cowl list shows whether it is cowl's by now"))
    };
    alone.remove()?;
    done
}

fn adopt_claimed(store: &Store, candidate: &Candidate, name: &ContainerName) -> Result<()> {
    let rootfs = &candidate.rootfs;
    let mut making = Making::begin(store)?;
    let base = making.layer(LayerKind::Base, &[], &[])?;
    let head = making.head(&[base], rootfs)?;
    let id = making.container()?;
    let manifest = ContainerManifest {
        adopted: Some(Adopted {
            rootfs: rootfs.clone(),
            inode: candidate.inode,
            extra: Map::new(),
        }),
        lxc: candidate.lxc.clone(),
        moving: Some(Moving::Adopting),
        ..ContainerManifest::new(name.clone(), head, &[base])
    };
    if let Some(link) = &manifest.lxc {
        // Whatever is wrong with the lines is told before anything is moved.
        binding::own_lines(store, id, name, (link, &link.written.0))?;
    }
    // Nobody else is to finish, or take back, what we are about to do.
    let lock = store.lock_container(id)?;
    external::mark(store, id, &Leftover::default())?;
    // Nobody writes to it any more, and from here on the store answers for what is in it.
    disk::sync_all(rootfs)?;
    making.sync()?;
    let record = Record::first(manifest);
    if let Err(error) = disk::replace(&store.paths().container_file(id), &record) {
        // It may be there already: the next command takes it back.
        making.leave();
        return Err(error);
    }
    making.done()?;
    let mut container = Container::from_locked(store, id, record, lock);
    if let Err(error) = moving::move_in(&container) {
        if moving::complete(container)?.is_some() {
            // Only the sync of the move failed.
            return Err(error.hint(format!(
                "{name} is adopted, but a power cut may take it back: inspect the disk"
            )));
        }
        let hint = format!(
            "nothing was changed; copy it instead: cowl create {name} --from {}",
            quoted(rootfs)
        );
        return Err(error.hint(hint));
    }
    // Whoever began to use it just before it moved would write to a layer.
    let tree = store.paths().layer_tree(base);
    if let Err(error) = refuse_users(&tree, rootfs, &store.session().who) {
        disk::rename(&tree, rootfs)?;
        moving::roll_back_adoption(container)?;
        return Err(error);
    }
    moving::finish_adoption(&mut container)
}

impl Candidate {
    /// The root file system, for messages.
    pub fn rootfs(&self) -> String {
        self.rootfs
            .as_os_str()
            .as_bytes()
            .escape_ascii()
            .to_string()
    }
}
