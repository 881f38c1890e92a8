//! Fills a layer with objects of all types and with markers of the overlay format.

use std::ffi::OsStr;
use std::io::Result;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags, chmodat, chownat, lsetxattr, makedev,
    mknodat,
};

use super::merge::{is_whiteout, list, set_times};
use super::{METACOPY, OPAQUE, REDIRECT};
use crate::random::{Rng, acl};

/// Kinds of objects in a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Style {
    /// Markers, which require a layer below.
    pub marks: bool,
    /// Hard links.
    pub links: bool,
    /// Whiteouts that hide no object.
    pub stray: bool,
    /// All types and attributes.
    pub rich: bool,
}

/// Number of simple names at the beginning of `NAMES`.
const PLAIN: usize = 10;
const NAMES: [&[u8]; 13] = [
    b"a",
    b"b",
    b"c",
    b"d",
    b"e",
    b"f",
    b"dir",
    b"file",
    b"link",
    b"x y:,\\z",
    &[b'o'; 255],
    b"\xff\xfe\n",
    b"\x01\x80 %s",
];

/// Creates random objects in `layer`, which will be stacked over a layer with the merged content `below`.
pub(super) fn fill(layer: &Path, below: &Path, style: Style, rng: &mut Rng) -> Result<()> {
    let mut filler = Filler {
        rng,
        style,
        root: below,
        files: Vec::new(),
    };
    filler.fill(layer, Some(below), 0)?;
    finish(layer, style.rich, rng)
}

struct Filler<'a> {
    rng: &'a mut Rng,
    style: Style,
    /// Root of the merged tree below.
    root: &'a Path,
    /// Regular files that were created in this layer.
    files: Vec<PathBuf>,
}

impl Filler<'_> {
    /// Fills the directory `dir` of the layer, which merges with `below`.
    fn fill(&mut self, dir: &Path, below: Option<&Path>, depth: u32) -> Result<()> {
        let names = if self.style.rich {
            &NAMES[..]
        } else {
            &NAMES[..PLAIN]
        };
        for name in names {
            let name = OsStr::from_bytes(name);
            let path = dir.join(name);
            if path.symlink_metadata().is_ok() {
                continue;
            }
            let under = below.map(|directory| directory.join(name));
            let hides = under
                .as_ref()
                .is_some_and(|path| path.symlink_metadata().is_ok());
            match self.rng.below(if self.style.rich { 30 } else { 24 }) {
                0..5 if depth < 3 => self.directory(&path, under, depth)?,
                5..9 => self.file(dir, &path)?,
                14..18 if self.style.marks && (hides || self.style.stray) => whiteout(&path)?,
                24..27 if self.style.marks && depth < 3 => self.moved(dir, &path, below, depth)?,
                27..29 if self.style.marks => self.metacopy(&path, under.as_deref(), None)?,
                other => self.special(&path, other)?,
            }
        }
        Ok(())
    }

    fn directory(&mut self, path: &Path, below: Option<PathBuf>, depth: u32) -> Result<()> {
        std::fs::create_dir(path)?;
        let opaque = self.style.marks && self.rng.chance(25);
        if opaque {
            lsetxattr(path, OPAQUE, b"y", XattrFlags::empty())?;
        }
        let merges = below.filter(|below| is_directory(below) && !opaque);
        self.fill(path, merges.as_deref(), depth + 1)
    }

    /// Creates the result of a rename within one directory: the object at its new name with a redirect to the old name,
    /// and a whiteout at the old name.
    fn moved(&mut self, dir: &Path, path: &Path, below: Option<&Path>, depth: u32) -> Result<()> {
        let Some(below) = below else { return Ok(()) };
        let name = self.rng.pick(&NAMES);
        let (old, from) = (
            dir.join(OsStr::from_bytes(name)),
            below.join(OsStr::from_bytes(name)),
        );
        if old == path || old.symlink_metadata().is_ok() {
            return Ok(());
        }
        let Ok(meta) = from.symlink_metadata() else {
            return Ok(());
        };
        // Both forms of a redirect are valid for a sibling.
        let redirect = if self.rng.chance(50) {
            name.to_vec()
        } else {
            let whole = from
                .strip_prefix(self.root)
                .map_err(std::io::Error::other)?;
            [b"/", whole.as_os_str().as_bytes()].concat()
        };
        if meta.is_dir() {
            std::fs::create_dir(path)?;
            lsetxattr(path, REDIRECT, &redirect, XattrFlags::empty())?;
            whiteout(&old)?;
            self.fill(path, Some(&from), depth + 1)?;
        } else if meta.is_file() && meta.len() > 0 {
            self.metacopy(path, Some(&from), Some(&redirect))?;
            whiteout(&old)?;
        }
        Ok(())
    }

    /// Creates a metacopy of the file `from` below.
    fn metacopy(
        &mut self,
        path: &Path,
        from: Option<&Path>,
        redirect: Option<&[u8]>,
    ) -> Result<()> {
        let Some(meta) = from.and_then(|from| from.symlink_metadata().ok()) else {
            return Ok(());
        };
        if !meta.is_file() || meta.len() == 0 {
            return Ok(());
        }
        std::fs::File::create(path)?.set_len(meta.len())?;
        lsetxattr(path, METACOPY, b"", XattrFlags::empty())?;
        if let Some(value) = redirect {
            lsetxattr(path, REDIRECT, value, XattrFlags::empty())?;
        }
        Ok(())
    }

    /// Creates a file, sometimes with additional hard links.
    fn file(&mut self, dir: &Path, path: &Path) -> Result<()> {
        if self.style.rich && self.style.links && !self.files.is_empty() && self.rng.chance(15) {
            let other = self.rng.pick(&self.files);
            return std::fs::hard_link(other, path);
        }
        let len = usize::try_from(self.rng.below(9000)).unwrap_or_default();
        let byte = b'a' + u8::try_from(self.rng.below(26)).unwrap_or(0);
        std::fs::write(path, vec![byte; len])?;
        self.files.push(path.to_owned());
        while self.style.links && self.rng.chance(35) {
            let other = dir.join(format!("alias{}", self.rng.below(4)));
            if other.symlink_metadata().is_err() {
                std::fs::hard_link(path, other)?;
            }
        }
        Ok(())
    }

    fn special(&mut self, path: &Path, which: u64) -> Result<()> {
        let node = |kind, mode, device| -> Result<()> {
            Ok(mknodat(CWD, path, kind, Mode::from_raw_mode(mode), device)?)
        };
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
            12 => node(FileType::Fifo, 0o644, 0),
            13 => node(FileType::CharacterDevice, 0o666, makedev(1, 3)),
            18 if self.style.rich && self.rng.chance(50) => {
                node(FileType::BlockDevice, 0o600, makedev(250, 7))
            }
            19 if self.style.rich && self.rng.chance(50) => node(FileType::Socket, 0o755, 0),
            _ => Ok(()),
        }
    }
}

fn whiteout(path: &Path) -> Result<()> {
    let (mode, device) = (Mode::empty(), makedev(0, 0));
    Ok(mknodat(CWD, path, FileType::CharacterDevice, mode, device)?)
}

fn is_directory(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_dir())
}

/// Sets owners, modes, xattrs and old times; those of a directory after those of its entries.
fn finish(path: &Path, rich: bool, rng: &mut Rng) -> Result<()> {
    let meta = path.symlink_metadata()?;
    if is_whiteout(&meta) {
        return Ok(());
    }
    if meta.is_dir() {
        let mut below = list(path)?;
        below.sort();
        for path in below {
            finish(&path, rich, rng)?;
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
        let directory = [0o755, 0o755, 0o777, 0o2775, 0o1777, 0o700];
        let file = [0o644, 0o644, 0o600, 0o666, 0o4755, 0o2755];
        let mode = rng.pick(if meta.is_dir() { &directory } else { &file });
        chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    if rng.chance(25) {
        lsetxattr(path, "trusted.three", b"from a layer", XattrFlags::empty())?;
    }
    if rng.chance(25) && (meta.is_file() || meta.is_dir()) {
        lsetxattr(path, "user.one", b"1", XattrFlags::empty())?;
    }
    if rich && rng.chance(10) && !meta.is_symlink() {
        let value = acl(rng.below(8));
        lsetxattr(path, "system.posix_acl_access", &value, XattrFlags::empty())?;
        if meta.is_dir() {
            lsetxattr(
                path,
                "system.posix_acl_default",
                &value,
                XattrFlags::empty(),
            )?;
        }
    }
    let seconds = i64::try_from(rng.below(1_500_000_000)).unwrap_or_default();
    set_times(path, seconds, 987_654_321)
}
