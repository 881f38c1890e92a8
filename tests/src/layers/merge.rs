//! Merges one layer onto a plain tree. This is an independent implementation of the merge, on complete trees and layer
//! by layer from the bottom.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Result;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, SeekFrom, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, linkat, lsetxattr, mknodat, utimensat,
};

use super::{MARKS, METACOPY, OPAQUE, REDIRECT};

/// Writes the merge of `layer` over `below` to `onto`.
pub(super) fn merge(layer: &Path, below: &Path, onto: &Path) -> Result<()> {
    Merge {
        root: below,
        made: BTreeMap::new(),
    }
    .directory(Some(layer), Some(below), onto)
}

struct Merge<'a> {
    root: &'a Path,
    /// The copy of each inode, so that hard links are preserved.
    made: BTreeMap<u64, PathBuf>,
}

impl Merge<'_> {
    fn directory(&mut self, layer: Option<&Path>, below: Option<&Path>, onto: &Path) -> Result<()> {
        let mut names: BTreeSet<OsString> = BTreeSet::new();
        for directory in layer.iter().chain(below.iter()) {
            for path in list(directory)? {
                names.extend(path.file_name().map(OsStr::to_owned));
            }
        }
        for name in names {
            let there = |directory: Option<&Path>| {
                let path = directory.map(|directory| directory.join(&name));
                path.filter(|path| path.symlink_metadata().is_ok())
            };
            let (upper, lower) = (there(layer), there(below));
            let target = onto.join(&name);
            match upper {
                Some(upper) => self.object(&upper, lower, below, &target)?,
                None => {
                    if let Some(lower) = lower {
                        self.copy(&lower, &target)?;
                    }
                }
            }
        }
        match layer.or(below) {
            Some(top) => copy_attributes(top, &top.symlink_metadata()?, onto),
            None => Ok(()),
        }
    }

    /// Writes the object that `upper` has in the layer. `lower` is the object of the same name in `beside`, the
    /// directory below.
    fn object(
        &mut self,
        upper: &Path,
        lower: Option<PathBuf>,
        beside: Option<&Path>,
        target: &Path,
    ) -> Result<()> {
        let meta = upper.symlink_metadata()?;
        if is_whiteout(&meta) {
            return Ok(());
        }
        let lower = match marker(upper, REDIRECT)? {
            Some(value) => match value.strip_prefix(b"/") {
                Some(path) => Some(self.root.join(OsStr::from_bytes(path))),
                None => beside.map(|directory| directory.join(OsStr::from_bytes(&value))),
            },
            None => lower,
        };
        if meta.is_dir() {
            let merges = marker(upper, OPAQUE)?.as_deref() != Some(b"y");
            let is_dir = |path: &PathBuf| path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
            let below = lower.filter(is_dir).filter(|_| merges);
            std::fs::create_dir(target)?;
            return self.directory(Some(upper), below.as_deref(), target);
        }
        if marker(upper, METACOPY)?.is_some() {
            let content =
                lower.ok_or_else(|| std::io::Error::other("a metacopy without a file below"))?;
            copy_content(&content, target)?;
            return copy_attributes(upper, &meta, target);
        }
        self.file(upper, &meta, target)
    }

    fn copy(&mut self, source: &Path, target: &Path) -> Result<()> {
        let meta = source.symlink_metadata()?;
        if meta.is_dir() {
            std::fs::create_dir(target)?;
            return self.directory(None, Some(source), target);
        }
        self.file(source, &meta, target)
    }

    fn file(&mut self, source: &Path, meta: &std::fs::Metadata, target: &Path) -> Result<()> {
        if let Some(first) = self.made.get(&meta.ino()) {
            return Ok(linkat(CWD, first, CWD, target, AtFlags::empty())?);
        }
        copy_file(source, meta, target)?;
        copy_attributes(source, meta, target)?;
        self.made.insert(meta.ino(), target.to_owned());
        Ok(())
    }
}

fn marker(path: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let mut value = vec![0; 4096];
    match rustix::fs::lgetxattr(path, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Copies content with holes, which std::fs::copy would fill.
fn copy_content(source: &Path, target: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let (from, to) = (File::open(source)?, File::create(target)?);
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut end = 0;
    loop {
        let start = match rustix::fs::seek(&from, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        end = rustix::fs::seek(&from, SeekFrom::Hole(start))?;
        let mut data = vec![0; usize::try_from(end - start).map_err(std::io::Error::other)?];
        from.read_exact_at(&mut data, start)?;
        to.write_all_at(&data, start)?;
    }
}

fn copy_file(source: &Path, meta: &std::fs::Metadata, target: &Path) -> Result<()> {
    let kind = FileType::from_raw_mode(meta.mode());
    match kind {
        FileType::Symlink => std::os::unix::fs::symlink(std::fs::read_link(source)?, target),
        FileType::RegularFile => copy_content(source, target),
        _ => Ok(mknodat(
            CWD,
            target,
            kind,
            Mode::from_raw_mode(0o600),
            meta.rdev(),
        )?),
    }
}

fn copy_attributes(source: &Path, meta: &std::fs::Metadata, target: &Path) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(meta.uid()), Gid::from_raw(meta.gid()));
    chownat(CWD, target, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !meta.is_symlink() {
        chmodat(
            CWD,
            target,
            Mode::from_raw_mode(meta.mode() & 0o7777),
            AtFlags::empty(),
        )?;
    }
    let parent = source.parent().unwrap_or(Path::new("/"));
    let dir = std::fs::File::open(parent)?;
    let name = source
        .file_name()
        .map(OsStrExt::as_bytes)
        .unwrap_or_default();
    let wanted = crate::tree::xattrs(std::os::fd::AsFd::as_fd(&dir), name)?;
    let parent = std::fs::File::open(target.parent().unwrap_or(Path::new("/")))?;
    let name = target
        .file_name()
        .map(OsStrExt::as_bytes)
        .unwrap_or_default();
    for stale in crate::tree::xattrs(std::os::fd::AsFd::as_fd(&parent), name)?.keys() {
        rustix::fs::lremovexattr(target, stale.as_slice())?;
    }
    for (name, value) in wanted {
        if !name.starts_with(MARKS) {
            lsetxattr(target, name, &value, XattrFlags::empty())?;
        }
    }
    set_times(target, meta.mtime(), meta.mtime_nsec())
}

pub(super) fn set_times(path: &Path, tv_sec: i64, tv_nsec: i64) -> Result<()> {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

pub(super) fn is_whiteout(meta: &std::fs::Metadata) -> bool {
    FileType::from_raw_mode(meta.mode()) == FileType::CharacterDevice && meta.rdev() == 0
}

/// Sets the attributes of the directory `to` to those of `from`.
pub fn copy_root(from: &Path, to: &Path) -> Result<()> {
    copy_attributes(from, &from.symlink_metadata()?, to)
}
