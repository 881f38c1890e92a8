//! The locations and names of files that the kernel reads or writes without requests.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::request::{MAX_SHOWN, PassthroughFile, Stopped, Unattended, UnattendedCause};
use crate::inode::{FileState, Inode};
use crate::op::Op;
use crate::overlay::Overlay;
use crate::reach::{Stack, open_content};
use cowl_layers::error::{Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::{Name, split};
use cowl_layers::sys;
use cowl_layers::sys::stat::Stat;
use cowl_layers::view::resolve::join;

/// A name of a file: its directory, and the name there.
pub(super) type ParentAndName = (Arc<Inode>, Name);

/// The names of files with several names, by inode number, and the link counts at the time of the search.
pub(super) type KnownNames = HashMap<u64, (u64, Vec<ParentAndName>)>;

/// A file of the upper layer that has names.
#[derive(Debug)]
pub(super) struct NamedFile {
    pub(super) inode: Arc<Inode>,
    /// Its content, open for reading.
    pub(super) content: OwnedFd,
    /// The inode number on disk.
    pub(super) ino: u64,
    pub(super) names: Vec<ParentAndName>,
    /// Whether the kernel may write to it.
    pub(super) is_written: bool,
    /// Whether it may be mapped for writing.
    pub(super) is_mapped: bool,
}

/// The files of the upper layer that are read or written without requests.
#[derive(Debug, Default)]
pub(super) struct FoundFiles {
    pub(super) named: Vec<NamedFile>,
    /// Those whose last name was removed.
    pub(super) nameless: Vec<Arc<Inode>>,
}

impl NamedFile {
    /// Returns the paths of the names in the upper layer.
    pub(super) fn paths(&self, stack: &Stack) -> Result<Vec<Vec<u8>>> {
        let path = |(parent, name): &ParentAndName| {
            Ok(join(&upper_dir(stack, parent)?.path_in_layer()?, name))
        };
        self.names.iter().map(path).collect()
    }
}

impl FoundFiles {
    /// Returns the files that may be written, as those that prevent a push.
    pub(super) fn unattended(&self, stack: &Stack, cause: UnattendedCause) -> Unattended {
        unattended(
            stack,
            self.named.iter().filter(|file| file.is_written),
            cause,
        )
    }
}

impl PassthroughFile {
    /// Whether the kernel only reads content from before a copy-up, which it continues to read.
    fn is_outdated(&self, inode: &Inode) -> bool {
        !self.is_written
            && self
                .version
                .is_some_and(|version| version != inode.content_version())
    }
}

/// Returns these files as those that prevent a push.
pub(super) fn unattended<'a>(
    stack: &Stack,
    files: impl Iterator<Item = &'a NamedFile>,
    cause: UnattendedCause,
) -> Unattended {
    let (mut count, mut names) = (0, Vec::new());
    for file in files {
        count += 1;
        // Only for the message.
        if names.len() < MAX_SHOWN {
            names.extend(file.paths(stack).unwrap_or_default().into_iter().next());
        }
    }
    Unattended {
        count,
        names,
        cause,
    }
}

/// Returns the location of a directory in the upper layer.
pub(super) fn upper_dir(stack: &Stack, dir: &Inode) -> Result<Arc<LayerDir>> {
    let state = dir.dir()?;
    if state.removed {
        return Err(Error::NOT_FOUND);
    }
    stack.upper_dir(&state).cloned().ok_or(Error::NOT_FOUND)
}

/// Prepares a push, so that it takes less time: locates the files and writes back their pages.
///
/// Errors are not reported: they occur again in the push.
pub fn prepare_push(overlay: &Overlay, files: &[PassthroughFile]) {
    prepare_files(overlay, files);
}

/// Does the slow steps before requests have to wait: locates the files, writes back their pages, and searches for the
/// names of those with several names.
///
/// Errors are not reported: they occur again in [`find_files`].
pub(super) fn find_names(overlay: &Overlay, files: &[PassthroughFile]) -> KnownNames {
    let links = prepare_files(overlay, files);
    if links.is_empty() {
        return KnownNames::new();
    }
    search(&overlay.begin(), &links).unwrap_or_else(|error| {
        log::debug!("cannot find the names of files: {error}");
        KnownNames::new()
    })
}

/// Locates the files and writes back their pages. Returns the link counts of those that may have several names, by inode
/// number.
fn prepare_files(overlay: &Overlay, files: &[PassthroughFile]) -> HashMap<u64, u64> {
    let mut links = HashMap::new();
    for file in files {
        if let Err(error) = prepare_file(overlay, *file, &mut links) {
            log::debug!("cannot prepare inode {}: {error}", file.node_id);
        }
    }
    links
}

fn prepare_file(
    overlay: &Overlay,
    file: PassthroughFile,
    links: &mut HashMap<u64, u64>,
) -> Result<()> {
    let op = overlay.begin();
    let inode = op.inode(file.node_id)?;
    let state = inode.file()?;
    let stack = &op.services().cx.stack;
    if file.is_outdated(&inode)
        || state.orphan
        || state.data.is_some()
        || !stack.is_in_upper(&state)
    {
        return Ok(());
    }
    let content = open_to_read(&inode)?;
    if file.is_written {
        sys::copy::write_pages(&content)?;
    }
    let stat = sys::stat::stat_fd(&content)?;
    if !has_own_name_only(&state, &stat) {
        links.insert(stat.ino, stat.nlink);
    }
    Ok(())
}

/// Finds the files in the upper layer of `stack`, while no operation runs.
pub(super) fn find_files(
    overlay: &Overlay,
    stack: &Stack,
    files: &[PassthroughFile],
    known: &KnownNames,
) -> Result<FoundFiles, Stopped> {
    let mut found = FoundFiles::default();
    let mut indexes: HashMap<u64, usize> = HashMap::new();
    let mut nameless = HashSet::new();
    for file in files {
        let Some(inode) = overlay.inodes.get(file.node_id) else {
            if overlay.inodes.is_forgotten(file.node_id) {
                continue;
            }
            return Err(Stopped::Race);
        };
        if let Some(index) = indexes.get(&inode.ino()).copied() {
            // An inode can have several node ids.
            if let Some(named) = found.named.get_mut(index) {
                named.is_written |= file.is_written;
                named.is_mapped |= file.is_mapped;
            }
            continue;
        }
        let state = inode.file()?;
        if file.is_outdated(&inode) {
            continue;
        }
        if state.data.is_some() || !stack.is_in_upper(&state) {
            if file.is_written {
                return Err(Stopped::By(Unattended {
                    count: 1,
                    names: Vec::new(),
                    cause: UnattendedCause::Unknown,
                }));
            }
            continue;
        }
        if state.orphan {
            if nameless.insert(inode.ino()) {
                found.nameless.push(inode);
            }
            continue;
        }
        let content = open_to_read(&inode)?;
        let stat = sys::stat::stat_fd(&content)?;
        let names = names_of(stack, &state, &stat, known)?;
        indexes.insert(inode.ino(), found.named.len());
        found.named.push(NamedFile {
            inode,
            content,
            ino: stat.ino,
            names,
            is_written: file.is_written,
            is_mapped: file.is_mapped,
        });
    }
    Ok(found)
}

fn open_to_read(inode: &Inode) -> Result<OwnedFd> {
    open_content(inode, OFlags::RDONLY | OFlags::NOATIME)
}

/// Whether the only name of a file is the one in its location.
fn has_own_name_only(state: &FileState, stat: &Stat) -> bool {
    stat.nlink == 1 && state.anchor.is_none()
}

/// Searches the upper layer once for the names of files, given their link counts.
fn search(op: &Op<'_>, links: &HashMap<u64, u64>) -> Result<KnownNames> {
    let services = op.services();
    let upper = services.cx.stack.upper()?.layer.clone();
    let scan = services
        .links()
        .scan_for(&upper, |ino| links.contains_key(&ino))?;
    let mut known = KnownNames::new();
    for (ino, nlink) in links {
        let mut names = Vec::new();
        for path in scan.paths(*ino) {
            let (dir, last) = split(path);
            // A directory of the upper layer is visible at its path.
            names.push((op.lookup_path(dir)?, Name::new(last)?));
        }
        known.insert(*ino, (*nlink, names));
    }
    Ok(known)
}

/// Returns the number of links of a file in the index that kernel overlayfs has in the work directory of the upper layer.
fn index_links(stack: &Stack, stat: &Stat) -> Result<usize> {
    let Some(index) = stack.upper()?.kernel_index()? else {
        return Ok(0);
    };
    let mut links = 0;
    for entry in sys::dir::entries(index.as_fd())? {
        let found = sys::stat::stat_at(index.as_fd(), &entry.name)?;
        links += usize::from(found.ino == stat.ino);
    }
    Ok(links)
}

/// Returns all names of a file in the upper layer. Fails if they have changed since they were searched.
fn names_of(
    stack: &Stack,
    state: &FileState,
    stat: &Stat,
    known: &KnownNames,
) -> Result<Vec<ParentAndName>, Stopped> {
    let is_single = has_own_name_only(state, stat);
    let names = if is_single {
        let own = state.aliases.iter().find(|alias| {
            let parent = alias.parent.dir();
            alias.name == state.loc.name
                && parent.is_ok_and(|dir| {
                    let upper = stack.upper_dir(&dir);
                    upper.is_some_and(|upper| upper.is_same_location(&state.loc.dir))
                })
        });
        let own = own.ok_or(Stopped::Race)?;
        vec![(own.parent.clone(), own.name.clone())]
    } else {
        match known.get(&stat.ino) {
            Some((nlink, names)) if *nlink == stat.nlink => names.clone(),
            _ => return Err(Stopped::Race),
        }
    };
    for (parent, name) in &names {
        let dir = upper_dir(stack, parent).map_err(|_| Stopped::Race)?;
        let found = sys::stat::stat_at((*dir.fd()?).as_fd(), name);
        if !found.is_ok_and(|found| found.ino == stat.ino) {
            return Err(Stopped::Race);
        }
    }
    // The search may have missed a name because of a concurrent rename. Under that name, the frozen layer would retain
    // the file.
    let distinct: HashSet<_> = names.iter().map(|(dir, name)| (dir.ino(), name)).collect();
    let is_complete = distinct.len() as u64 == stat.nlink
        || (distinct.len() + index_links(stack, stat)?) as u64 == stat.nlink;
    is_complete.then_some(names).ok_or(Stopped::Race)
}
