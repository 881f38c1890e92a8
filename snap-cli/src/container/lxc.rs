//! A container that is one of LXC's: the lines of its config, the copy that a snapshot keeps, and new LXC
//! containers for clones.

use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::Map;

use super::{Container, Swap, external};
use crate::error::{Error, Result};
use crate::host::files;
use crate::lxc::config;
use crate::lxc::config::{Ours, Renamed, attach, detach, renamed};
use crate::lxc::{self as tools, LxcContainer};
use crate::shell::posix_quoted;
use crate::store::Store;
use crate::store::bytes::Blob;
use crate::store::disk;
use crate::store::manifest::{ContainerId, ContainerManifest};
use crate::store::name::{ContainerName, SnapshotName};
use crate::store::outside::{Adopted, Lxc, Moving};
use cowl_layers::shown::Show as _;

/// The LXC container that a container is.
pub fn of(link: &Lxc) -> LxcContainer {
    LxcContainer {
        lxcpath: link.lxcpath.clone(),
        name: link.name.clone(),
    }
}

/// The user and group of this machine that are root in an LXC container whose config is `text`, where that is
/// not root itself.
pub(crate) fn mapped_root(link: &Lxc, text: &[u8]) -> Result<Option<(u32, u32)>> {
    let own = config::mapped_root(text);
    if own.is_some() || config::get(text, config::INCLUDE).is_none() {
        return Ok(own);
    }
    let found = of(link).value("lxc.idmap")?.unwrap_or_default();
    Ok(config::mapped_root_of(found.split(|&byte| byte == b'\n')))
}

/// Where a container is mounted for LXC: the one of its two places that its config names.
pub(crate) fn place(store: &Store, id: ContainerId, text: &[u8]) -> PathBuf {
    let mapped = store.paths().mapped_dir(id);
    let named = config::get(text, config::ROOTFS).unwrap_or_default();
    let named = named.strip_prefix(b"dir:").unwrap_or(named);
    match named == mapped.as_os_str().as_bytes() {
        true => mapped,
        false => store.paths().mount_dir(id),
    }
}

/// The lines that are cowl's in a container's LXC config, which else says `text`.
pub(crate) fn ours(
    store: &Store,
    id: ContainerId,
    name: &ContainerName,
    (link, text): (&Lxc, &[u8]),
) -> Result<Ours> {
    let rootfs = match mapped_root(link, text)? {
        Some(_) => store.paths().mapped_dir(id),
        None => store.paths().mount_dir(id),
    };
    let program = std::env::current_exe()
        .map_err(|e| Error::failed("cannot find the cowl program itself").because(e))?;
    let (program, root) = (
        program.as_os_str().as_bytes(),
        store.root().as_os_str().as_bytes(),
    );
    if let Some(bad) = [program, root].iter().find(|path| path.contains(&b'\n')) {
        return Err(Error::usage(format!(
            "LXC's config can't hold the path {}: it has a line break",
            bad.escape_ascii()
        )));
    }
    let hook = |kind: &str| -> Vec<u8> {
        let mut line = posix_quoted(program);
        line.extend_from_slice(b" --store ");
        line.extend(posix_quoted(root));
        line.extend_from_slice(format!(" hook {kind} {id}").as_bytes());
        line
    };
    Ok(Ours {
        id: id.to_string(),
        rootfs: rootfs.into_os_string().into_encoded_bytes(),
        pre_start: hook("pre-start"),
        post_stop: hook("post-stop"),
        destroy: hook("destroy"),
        note: format!("to get them back, and these lines out: cowl release {name}"),
    })
}

/// Stops the LXC container that `name` is, if it is one and runs; what it answers with is to be started
/// again. Nobody must hold the container: LXC calls cowl.
pub fn stop(store: &Store, name: &ContainerName) -> Result<Option<LxcContainer>> {
    let (_, record) = store.find(name)?;
    let Some(link) = &record.body.lxc else {
        return Ok(None);
    };
    let container = of(link);
    Ok(container.stop()?.then_some(container))
}

/// What to type when a running LXC container is in the way; `None` when it is none, or does not run.
pub(crate) fn how_to_stop(container: &Container<'_>, who: &str) -> Option<String> {
    let lxc = of(container.manifest().lxc.as_ref()?);
    if !matches!(lxc.state(), Ok(tools::State::Running { .. })) {
        return None;
    }
    let takes = |verbs: &[&str]| who.split(' ').any(|word| verbs.contains(&word));
    let or = if takes(&["restore", "flatten"]) {
        format!("; or have cowl do all of it: {who} --stop --start")
    } else if takes(&["destroy"]) {
        format!("; or have cowl do both: {who} --stop")
    } else {
        String::new()
    };
    Some(format!(
        "stop it: lxc-stop {}; then type: {who}{or}",
        lxc.options()
    ))
}

/// The config of an LXC container.
pub(crate) fn read_config(link: &Lxc) -> Result<Vec<u8>> {
    files::read(&link.config())
}

/// The copy of the config that a snapshot keeps.
pub fn config_copy(container: &Container<'_>) -> Option<Blob> {
    let link = container.manifest().lxc.as_ref()?;
    match read_config(link) {
        Ok(text) => Some(Blob(text)),
        Err(error) => {
            log::warn!("the snapshot keeps no copy of the LXC config: {error}");
            None
        }
    }
}

impl Container<'_> {
    /// Has the next change bring LXC's config back to what a snapshot kept, with cowl's lines as they are
    /// today.
    pub fn with_config_of(&mut self, name: &SnapshotName) -> Result<()> {
        let (_, snapshot) = self.snapshot(name)?;
        let Some(link) = &self.manifest().lxc else {
            return Err(Error::usage(format!("{} is no LXC container", self.name()))
                .hint("leave --with-config out"));
        };
        let Some(kept) = snapshot.config else {
            return Err(
                Error::failed(format!("{name} has no copy of the LXC config"))
                    .hint("leave --with-config out: the config stays as it is"),
            );
        };
        let ours = ours(self.store, self.id, self.name(), (link, &kept.0))?;
        self.config = Some(Blob(attach(&kept.0, &ours)));
        Ok(())
    }
}

/// What makes a container's copy an LXC container too.
#[derive(Debug)]
pub struct Copy {
    from: Lxc,
    lxcpath: PathBuf,
    id: ContainerId,
    text: Vec<u8>,
    name: ContainerName,
    /// What people should know.
    pub notes: Vec<String>,
}

impl Copy {
    /// Looks at what is to be copied; `None` when it is no LXC container. `kept` is the config that the
    /// state had; else the copy gets that of today.
    pub fn of(
        (id, manifest): (ContainerId, &ContainerManifest),
        kept: Option<&Blob>,
        name: &ContainerName,
    ) -> Result<Option<Self>> {
        let Some(from) = &manifest.lxc else {
            return Ok(None);
        };
        check_free(&from.lxcpath, name)?;
        let text = match kept {
            Some(kept) => kept.0.clone(),
            None => read_config(from)?,
        };
        Ok(Some(Self {
            from: from.clone(),
            lxcpath: from.lxcpath.clone(),
            id,
            text,
            name: name.clone(),
            notes: Vec::new(),
        }))
    }

    /// The same by the config of any LXC container, for the container `name` in `lxcpath`.
    pub fn by_config(path: &Path, lxcpath: PathBuf, name: &ContainerName) -> Result<Self> {
        check_free(&lxcpath, name)?;
        let path = std::path::absolute(path).map_err(|e| Error::at("read", path, e))?;
        let text = files::read(&path)?;
        let dir = path.parent().unwrap_or(Path::new("/"));
        let folder = dir.file_name().and_then(|name| name.to_str());
        Ok(Self {
            from: Lxc {
                lxcpath: dir.parent().unwrap_or(dir).to_path_buf(),
                name: folder.unwrap_or_default().to_owned(),
                original: None,
                written: Blob::default(),
                extra: Map::new(),
            },
            lxcpath,
            // No line of it is cowl's.
            id: ContainerId::fresh(),
            text,
            name: name.clone(),
            notes: Vec::new(),
        })
    }

    /// The same in another folder of containers.
    pub fn into_lxcpath(self, lxcpath: PathBuf) -> Result<Self> {
        check_free(&lxcpath, &self.name)?;
        Ok(Self { lxcpath, ..self })
    }

    /// The options by which LXC's tools will find it.
    pub fn options(&self) -> String {
        let container = LxcContainer {
            lxcpath: self.lxcpath.clone(),
            name: self.name.to_string(),
        };
        container.options()
    }

    /// Makes the container that it was prepared for one of LXC's. The caller completes the change outside the store
    /// (`recover::complete_outside`).
    pub fn join(mut self, container: &mut Container<'_>) -> Result<Vec<String>> {
        let mut next = container.manifest().clone();
        if let Some(link) = &next.lxc {
            return Err(Error::failed(format!(
                "{} is an LXC container already: {}",
                container.name(),
                link.dir().shown()
            )));
        }
        if next.adopted.is_some() {
            return Err(Error::failed(format!(
                "{} was taken over from a folder, to which it may go back",
                container.name()
            ))
            .hint(format!(
                "make a copy one of LXC's: cowl clone {} NEW",
                container.name()
            )));
        }
        self.fill(container.store, container.id, &mut next)?;
        container.commit(next, None, |_| Ok(Swap::Done))?;
        Ok(self.notes)
    }

    /// Fills in the manifest of the copy: who opens it first makes its LXC container.
    pub fn fill(
        &mut self,
        store: &Store,
        id: ContainerId,
        manifest: &mut ContainerManifest,
    ) -> Result<()> {
        let mut link = Lxc {
            lxcpath: self.lxcpath.clone(),
            name: self.name.to_string(),
            original: None,
            written: Blob::default(),
            extra: Map::new(),
        };
        let (from, to) = (self.from.dir(), link.dir());
        let how = Renamed {
            from: from.as_os_str().as_bytes(),
            to: to.as_os_str().as_bytes(),
            name: &link.name,
        };
        let rootfs = link.dir().join("rootfs");
        let line = [
            b"lxc.rootfs.path = dir:",
            rootfs.as_os_str().as_bytes(),
            b"\n",
        ]
        .concat();
        let plain = detach(&self.text, Some(&line), &self.id.to_string());
        let (plain, notes) = renamed(&plain, &how, tools::random_address);
        self.notes = notes;
        let ours = ours(store, id, &self.name, (&self.from, &plain))?;
        let config = Blob(attach(&plain, &ours));
        link.original = Some(Blob(plain));
        link.written = config.clone();
        external::mark(store, id, &external::Leftover::default())?;
        manifest.adopted = Some(Adopted {
            rootfs,
            // It never was there.
            inode: 0,
            extra: Map::new(),
        });
        manifest.moving = Some(Moving::Writing {
            config,
            hostname: Some(link.name.clone()),
        });
        manifest.lxc = Some(link);
        Ok(())
    }
}

/// Refuses when LXC has a container of this name already, or something else in its place.
fn check_free(lxcpath: &Path, name: &ContainerName) -> Result<()> {
    let dir = lxcpath.join(name.as_str());
    if !disk::is_there(&dir)? {
        return Ok(());
    }
    Err(Error::failed(format!("{} exists already", dir.shown()))
        .hint("choose another name, or remove what is there"))
}

/// What brings the LXC container of a destroyed container back; `None` when it is none, or never went.
pub(crate) fn back(
    store: &Store,
    id: ContainerId,
    manifest: &ContainerManifest,
) -> Result<Option<Moving>> {
    let Some(link) = &manifest.lxc else {
        return Ok(None);
    };
    let path = link.config();
    if disk::is_there(&path)? {
        if tools::config::names(&read_config(link)?, &id.to_string()) {
            return Ok(None);
        }
        return Err(Error::failed(format!(
            "{} is another LXC container's now",
            link.dir().shown()
        ))
        .hint("move that one away first (lxc-copy -R)"));
    }
    external::begin_writing(store, id, link.written.clone()).map(Some)
}

/// Makes the folder of a new LXC container.
pub(crate) fn ensure_dir(link: &Lxc) -> Result<()> {
    let dir = link.dir();
    if disk::is_there(&dir)? {
        return Ok(());
    }
    disk::ensure_dir(&dir)?;
    // As LXC makes them.
    std::fs::set_permissions(&dir, Permissions::from_mode(0o770))
        .map_err(|e| Error::at("set the mode of", &dir, e))?;
    disk::sync_parent(&dir)
}
