//! Layers made by hand, in kernel overlayfs's format, and the plain tree that they must look like
//! when they are merged.

use std::collections::BTreeMap;
use std::io::Result;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    linkat, lsetxattr, makedev, mknodat, utimensat,
};

use crate::random::Rng;

const OPAQUE: &str = "trusted.overlay.opaque";

/// Three lower layers, topmost first, and the merged plain tree, all below `dir`.
///
/// With `stray` there are whiteouts that hide nothing, too. They mean nothing, but the kernel
/// lists them, so that such layers can't be compared with what it shows.
pub fn make_three(dir: &Path, seed: u64, stray: bool) -> Result<(Vec<PathBuf>, PathBuf)> {
    let mut rng = Rng::new(seed ^ 0x6c61_7965_7273);
    let plain = dir.join("plain");
    std::fs::create_dir_all(&plain)?;
    let mut layers = Vec::new();
    for index in 0..3 {
        let layer = dir.join(format!("lower{index}"));
        std::fs::create_dir_all(&layer)?;
        Filler {
            rng: &mut rng,
            marks: index > 0,
            // In two of three seeds only the topmost layer has files with several names, so that
            // none of those names is hidden by another layer.
            links: index == 2 || seed.is_multiple_of(3),
            stray,
        }
        .fill(&layer, Some(&plain), 0)?;
        finish(&layer, &mut rng)?;
        apply(&layer, &plain)?;
        layers.insert(0, layer);
    }
    Ok((layers, plain))
}

struct Filler<'a> {
    rng: &'a mut Rng,
    marks: bool,
    links: bool,
    stray: bool,
}

impl Filler<'_> {
    /// Puts random things into the folder `dir` of a layer; `below` is what it merges with.
    fn fill(&mut self, dir: &Path, below: Option<&Path>, depth: u32) -> Result<()> {
        for name in [
            "a", "b", "c", "d", "e", "f", "dir", "file", "link", "x y:,\\z",
        ] {
            let path = dir.join(name);
            let below = below.map(|folder| folder.join(name));
            let hides = below
                .as_ref()
                .is_some_and(|path| path.symlink_metadata().is_ok());
            match self.rng.below(24) {
                0..5 if depth < 3 => self.folder(&path, below, depth)?,
                5..9 => self.file(dir, &path)?,
                14..18 if self.marks && (hides || self.stray) => {
                    let (mode, device) = (Mode::empty(), makedev(0, 0));
                    mknodat(CWD, &path, FileType::CharacterDevice, mode, device)?;
                }
                other => self.special(&path, other)?,
            }
        }
        Ok(())
    }

    fn folder(&mut self, path: &Path, below: Option<PathBuf>, depth: u32) -> Result<()> {
        std::fs::create_dir(path)?;
        let opaque = self.marks && self.rng.chance(25);
        if opaque {
            lsetxattr(path, OPAQUE, b"y", XattrFlags::empty())?;
        }
        let merges = below.filter(|below| below.is_dir() && !below.is_symlink() && !opaque);
        self.fill(path, merges.as_deref(), depth + 1)
    }

    /// A file, sometimes with other names beside it.
    fn file(&mut self, dir: &Path, path: &Path) -> Result<()> {
        let len = usize::try_from(self.rng.below(9000)).unwrap_or_default();
        let byte = b'a' + u8::try_from(self.rng.below(26)).unwrap_or(0);
        std::fs::write(path, vec![byte; len])?;
        while self.links && self.rng.chance(35) {
            let other = dir.join(format!("alias{}", self.rng.below(4)));
            if other.symlink_metadata().is_err() {
                std::fs::hard_link(path, other)?;
            }
        }
        Ok(())
    }

    fn special(&mut self, path: &Path, which: u64) -> Result<()> {
        match which {
            9 => {
                let file = std::fs::File::create(path)?;
                file.set_len(200_000)?;
                std::os::unix::fs::FileExt::write_all_at(&file, b"in the middle", 90_000)
            }
            10..12 => {
                let target = self.rng.pick(&["a", "dir", "nowhere", "b/c"]);
                std::os::unix::fs::symlink(target, path)
            }
            12 => Ok(mknodat(
                CWD,
                path,
                FileType::Fifo,
                Mode::from_raw_mode(0o644),
                0,
            )?),
            13 => {
                let mode = Mode::from_raw_mode(0o666);
                Ok(mknodat(
                    CWD,
                    path,
                    FileType::CharacterDevice,
                    mode,
                    makedev(1, 3),
                )?)
            }
            _ => Ok(()),
        }
    }
}

/// Gives everything owners, modes, attributes and old times; folders after what is in them.
fn finish(path: &Path, rng: &mut Rng) -> Result<()> {
    let meta = path.symlink_metadata()?;
    if is_whiteout(&meta) {
        return Ok(());
    }
    if meta.is_dir() {
        let mut below = list(path)?;
        below.sort();
        for path in below {
            finish(&path, rng)?;
        }
    }
    let id = rng.pick(&[0, 0, 0, 1000, 1001]);
    chownat(
        CWD,
        path,
        Some(Uid::from_raw(id)),
        Some(Gid::from_raw(id)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if !meta.is_symlink() {
        let folder = [0o755, 0o755, 0o777, 0o2775, 0o1777, 0o700];
        let file = [0o644, 0o644, 0o600, 0o666, 0o4755, 0o2755];
        let mode = rng.pick(if meta.is_dir() { &folder } else { &file });
        chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    if rng.chance(25) {
        lsetxattr(path, "trusted.three", b"from a layer", XattrFlags::empty())?;
    }
    if rng.chance(25) && (meta.is_file() || meta.is_dir()) {
        lsetxattr(path, "user.one", b"1", XattrFlags::empty())?;
    }
    let seconds = i64::try_from(rng.below(1_500_000_000)).unwrap_or_default();
    set_times(path, seconds, 987_654_321)
}

/// Lays one layer over the plain tree `onto`, as a merge would show it.
pub fn apply(layer: &Path, onto: &Path) -> Result<()> {
    apply_folder(layer, onto, &mut BTreeMap::new())
}

fn apply_folder(layer: &Path, onto: &Path, links: &mut BTreeMap<u64, PathBuf>) -> Result<()> {
    for source in list(layer)? {
        let Some(name) = source.file_name() else {
            continue;
        };
        let target = onto.join(name);
        let meta = source.symlink_metadata()?;
        let there = target.symlink_metadata().ok();
        let merges = meta.is_dir()
            && there.as_ref().is_some_and(std::fs::Metadata::is_dir)
            && !is_opaque(&source)?;
        if let Some(there) = there.filter(|_| !merges) {
            if there.is_dir() {
                std::fs::remove_dir_all(&target)?
            } else {
                std::fs::remove_file(&target)?
            }
        }
        if is_whiteout(&meta) {
            continue;
        }
        if meta.is_dir() {
            if !merges {
                std::fs::create_dir(&target)?;
            }
            apply_folder(&source, &target, links)?;
            copy_attributes(&source, &meta, &target)?;
        } else if let Some(first) = links.get(&meta.ino()) {
            linkat(CWD, first, CWD, &target, AtFlags::empty())?;
        } else {
            copy_file(&source, &meta, &target)?;
            copy_attributes(&source, &meta, &target)?;
            links.insert(meta.ino(), target);
        }
    }
    // The root's attributes come from the topmost layer, so the last one applied wins.
    copy_attributes(layer, &layer.symlink_metadata()?, onto)
}

fn copy_file(source: &Path, meta: &std::fs::Metadata, target: &Path) -> Result<()> {
    let kind = FileType::from_raw_mode(meta.mode());
    match kind {
        FileType::Symlink => std::os::unix::fs::symlink(std::fs::read_link(source)?, target),
        FileType::RegularFile => std::fs::copy(source, target).map(drop),
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
        if !name.starts_with(b"trusted.overlay.") {
            lsetxattr(target, name, &value, XattrFlags::empty())?;
        }
    }
    set_times(target, meta.mtime(), meta.mtime_nsec())
}

fn set_times(path: &Path, tv_sec: i64, tv_nsec: i64) -> Result<()> {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

fn is_whiteout(meta: &std::fs::Metadata) -> bool {
    FileType::from_raw_mode(meta.mode()) == FileType::CharacterDevice && meta.rdev() == 0
}

fn is_opaque(dir: &Path) -> Result<bool> {
    let mut value = [0; 8];
    match rustix::fs::lgetxattr(dir, OPAQUE, &mut value[..]) {
        Ok(length) => Ok(value.get(..length) == Some(b"y")),
        Err(rustix::io::Errno::NODATA) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Gives the folder `to` the attributes of `from`.
pub fn copy_root(from: &Path, to: &Path) -> Result<()> {
    copy_attributes(from, &from.symlink_metadata()?, to)
}
