//! Filling a new layer's tree from outside: a tar stream, or a folder of this machine.
//!
//! The target is an empty folder. On an error it is left half filled: whoever made it removes it.
//! Nothing here knows what a layer or a container is.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_fs::error::Errno;
use cowl_fs::format::XattrSpace;
use cowl_fs::sys::stat::FileKind;
use cowl_fs::sys::{attr, copy, dir};

use super::compress;
use super::member::{Member, What};
use super::place;
use super::stream::Members;
use crate::delta::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::delta::make::{self, Attrs};
use crate::delta::places::Places;

/// What came in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Entries and bytes.
    pub done: Progress,
    /// What could not be taken over as it was, and why: path (bytes) and reason.
    pub notes: Vec<(Vec<u8>, &'static str)>,
}

/// Fills `target` from `source`: a folder is copied, anything else is read as a tar archive.
pub fn path(
    source: &Path,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<Imported> {
    let name = source.as_os_str().as_bytes();
    let file = File::open(source).context("can't open the source", name)?;
    let kind = file
        .metadata()
        .context("can't read the source", name)?
        .file_type();
    if kind.is_dir() {
        return super::tree::import(source, target, space, progress);
    }
    tar(file, target, space, progress)
}

/// Fills `target` from a tar stream, plain or compressed with gzip, zstd or xz.
pub fn tar(
    input: impl Read,
    target: &Path,
    space: XattrSpace,
    progress: OnProgress<'_>,
) -> Result<Imported> {
    let root = dir::open_root(target).context(
        "can't open the target folder",
        target.as_os_str().as_bytes(),
    )?;
    make::ready_root(root.as_fd())?;
    let mut members = Members::new(compress::decode(input)?);
    let mut unpack = Unpack {
        places: Places::new(root),
        folders: BTreeMap::new(),
        space,
        progress,
        out: Imported::default(),
        buffer: vec![0; 256 << 10],
    };
    while let Some(member) = members.next()? {
        unpack.entry(member, &mut members)?;
    }
    unpack.finish_folders()?;
    (unpack.progress)(unpack.out.done);
    Ok(unpack.out)
}

struct Unpack<'a> {
    places: Places,
    /// Attributes of folders: set last, because what is made inside changes them.
    folders: BTreeMap<Vec<u8>, Attrs>,
    space: XattrSpace,
    progress: OnProgress<'a>,
    out: Imported,
    buffer: Vec<u8>,
}

impl Unpack<'_> {
    fn entry<R: Read>(&mut self, mut member: Member, members: &mut Members<R>) -> Result<()> {
        let path = place::clean(&member.path)?;
        let xattrs = std::mem::take(&mut member.attrs.xattrs);
        member.attrs.xattrs = make::escaped(self.space, xattrs);
        self.out.done.entries += 1;
        if self.out.done.entries.is_multiple_of(64) {
            (self.progress)(self.out.done);
        }
        if path.is_empty() {
            if member.what != What::Folder {
                let what = "the archive replaces its root by something that is no folder";
                return Err(TreeError::new(ErrorKind::Refused, what).at(member.path));
            }
            self.folders.insert(path, member.attrs);
            return Ok(());
        }
        if let What::HardLink(target) = &member.what {
            return self.hard_link(&path, target);
        }
        let (parent, name) = make::split(&path);
        if member.what != What::Folder {
            self.places.forget(&path);
            self.folders.remove(&path);
        }
        let place = self.places.folder(parent, true)?;
        let parent = place.fd();
        let is_folder = member.what == What::Folder;
        if place::make_room(parent, name, is_folder, &path)? {
            self.folders.insert(path, member.attrs);
            return Ok(());
        }
        let device = |kind, rdev| {
            make::special(parent, name, (kind, rdev), &member.attrs, self.space, &path)
        };
        match &member.what {
            What::Symlink(target) if target.is_empty() || target.contains(&0) => {
                let what = "the archive has a symbolic link that points nowhere";
                Err(TreeError::new(ErrorKind::Refused, what).at(path))
            }
            What::Symlink(target) => make::symlink(parent, name, target, &member.attrs, &path),
            What::CharDevice(rdev) => device(FileKind::CharDevice, *rdev),
            What::BlockDevice(rdev) => device(FileKind::BlockDevice, *rdev),
            What::Fifo => device(FileKind::Fifo, 0),
            What::HardLink(_) => Ok(()),
            What::Folder => {
                make::folder(parent, name, &path)?;
                self.folders.insert(path, member.attrs);
                Ok(())
            }
            What::File => {
                let fd = make::file(parent, name, &path)?;
                drop(place);
                self.content(&fd, &member, &path, members)?;
                make::apply(fd.as_fd(), FileKind::Regular, &member.attrs, &path)
            }
        }
    }

    /// Writes an entry's data: in one run, or in the parts that a sparse map names.
    fn content<R: Read>(
        &mut self,
        fd: &impl std::os::fd::AsFd,
        member: &Member,
        path: &[u8],
        members: &mut Members<R>,
    ) -> Result<()> {
        let (size, segments) = match &member.sparse {
            Some(sparse) => (sparse.size, sparse.segments.clone()),
            None => (member.stored, vec![(0, member.stored)]),
        };
        if member.sparse.is_some() {
            attr::truncate(fd, size).context("can't set the size", path)?;
        }
        for (start, length) in segments {
            let mut done = 0;
            while done < length {
                let want = usize::try_from(length - done).unwrap_or(usize::MAX);
                let want = want.min(self.buffer.len());
                let part = self.buffer.get_mut(..want).unwrap_or_default();
                members.read_data(part)?;
                copy::write_all(fd, part, start + done).context("can't write", path)?;
                done += want as u64;
                self.out.done.bytes += want as u64;
                (self.progress)(self.out.done);
            }
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let refuse = |what: &str| {
            let what = format!("{what} (to '{}')", target.escape_ascii());
            Err(TreeError::new(ErrorKind::Refused, what).at(path))
        };
        let Ok(clean) = place::clean(target) else {
            return refuse("the archive has a hard link that points outside");
        };
        if clean == path {
            return refuse("the archive has a hard link to itself");
        }
        if clean.is_empty() {
            return refuse("the archive has a hard link to its root");
        }
        let (parent, name) = make::split(&clean);
        let missing = "the archive has a hard link to what is not in it, or comes later";
        // Held by a descriptor of its own: the folder kept open changes below.
        let source = match self.places.folder(parent, false) {
            Ok(place) => dir::open_path(place.fd(), name),
            Err(error) if error.kind() == ErrorKind::NotFound => return refuse(missing),
            Err(error) => return Err(error),
        };
        let source = match source {
            Ok(source) => source,
            Err(error) if error.errno() == Errno::NOENT => return refuse(missing),
            Err(error) => return Err(error).context("can't open a hard link's target", path),
        };
        let kind = cowl_fs::sys::stat::stat_fd(&source)
            .context("can't read", path)?
            .kind();
        if kind == FileKind::Directory {
            return refuse("the archive has a hard link to a folder");
        }
        self.places.forget(path);
        self.folders.remove(path);
        let (parent, name) = make::split(path);
        let place = self.places.folder(parent, true)?;
        place::make_room(place.fd(), name, false, path)?;
        make::link(source.as_fd(), place.fd(), name, self.space, path)
    }

    /// Folders get their attributes, the deepest first: one that its owner may not enter must not be
    /// in the way of what is below it.
    fn finish_folders(&mut self) -> Result<()> {
        for (path, attrs) in std::mem::take(&mut self.folders).into_iter().rev() {
            if path.is_empty() {
                make::apply(self.places.root(), FileKind::Directory, &attrs, b".")?;
                continue;
            }
            let place = self.places.folder(&path, false)?;
            make::apply(place.fd(), FileKind::Directory, &attrs, &path)?;
        }
        Ok(())
    }
}
