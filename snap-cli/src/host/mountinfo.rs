//! The table of mounts that /proc/PID/mountinfo tells. Parsing is apart from reading.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::error::{Error, Result};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its id.
    pub id: u64,
    /// The mount that it lies in.
    pub parent: u64,
    /// The file system's device number, major and minor.
    pub dev: (u32, u32),
    /// Where it is.
    pub at: PathBuf,
    /// The file system's type: "ext4", "fuse.cowlfs".
    pub kind: Vec<u8>,
    /// What was mounted.
    pub source: Vec<u8>,
}

/// Reads the table's text; lines that are not of its form are left out.
pub fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&b| b == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let id = number(fields.next()?)?;
    let parent = number(fields.next()?)?;
    let mut dev = fields.next()?.split(|&b| b == b':');
    let dev = (
        u32::try_from(number(dev.next()?)?).ok()?,
        u32::try_from(number(dev.next()?)?).ok()?,
    );
    let _root = fields.next()?;
    let at = PathBuf::from(OsString::from_vec(unescape(fields.next()?)));
    // Mount options, then any number of optional fields up to a dash.
    fields.find(|field| *field == b"-")?;
    Some(Mount {
        id,
        parent,
        dev,
        at,
        kind: unescape(fields.next()?),
        source: unescape(fields.next()?),
    })
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Undoes the kernel's `\040` and the like.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| {
                let digits = std::str::from_utf8(digits).ok()?;
                u8::from_str_radix(digits, 8).ok()
            });
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    out
}

/// The mounts of this process's namespace.
pub fn read() -> Result<Vec<Mount>> {
    let path = Path::new("/proc/self/mountinfo");
    std::fs::read(path)
        .map(|text| parse(&text))
        .map_err(|error| Error::at("read", path, error))
}

/// The mount that `path` lies in.
pub fn holding(path: &Path) -> Result<Mount> {
    let at = |error: std::io::Error| Error::at("look at", path, error);
    let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).map_err(|e| at(e.into()))?;
    let found = read()?
        .into_iter()
        .find(|mount| mount.id == stat.stx_mnt_id);
    found.ok_or_else(|| {
        at(std::io::Error::other(
            "the mount that it lies in is not to be found",
        ))
    })
}

/// What is mounted at `at` itself: of several, the one on top.
pub fn topmost<'m>(mounts: &'m [Mount], at: &Path) -> Option<&'m Mount> {
    mounts
        .iter()
        .rev()
        .find(|mount| mount.at.as_os_str().as_bytes() == at.as_os_str().as_bytes())
}

/// What is mounted below `at`.
pub fn below<'m>(mounts: &'m [Mount], at: &'m Path) -> impl Iterator<Item = &'m Mount> {
    mounts
        .iter()
        .filter(move |mount| mount.at != at && mount.at.starts_with(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 27 0:21 / /proc rw,relatime - proc proc rw
31 27 8:1 / / rw,relatime shared:1 master:2 - ext4 /dev/sda1 rw,errors=remount-ro
40 31 0:35 / /mnt/a\\040b rw - fuse.cowlfs web rw,user_id=0
41 40 0:36 / /mnt/a\\040b/proc rw - proc proc rw
42 31 0:37 / /mnt/a\\040b rw shared:9 - fuse.cowlfs new rw
broken line
50 31 0:x / /y rw - a b c
";

    #[test]
    fn the_table() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 5);
        let at = Path::new("/mnt/a b");
        let top = topmost(&mounts, at).unwrap();
        assert_eq!(top.id, 42);
        assert_eq!(top.dev, (0, 37));
        assert_eq!(top.source, b"new");
        assert_eq!(top.kind, b"fuse.cowlfs");
        assert_eq!(topmost(&mounts, Path::new("/mnt")), None);
        let inside: Vec<_> = below(&mounts, at).map(|m| m.id).collect();
        assert_eq!(inside, [41]);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(b"a\\134\\011b"), b"a\\\tb");
        assert_eq!(unescape(b"end\\04"), b"end\\04");
        assert_eq!(unescape(b"\\zzz"), b"\\zzz");
    }
}
