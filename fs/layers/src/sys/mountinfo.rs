//! Parses `/proc/PID/mountinfo` (proc_pid_mountinfo(5)), apart from reading it.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::users::Device;

/// One mount: a line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount id.
    pub id: u64,
    /// The id of the parent mount.
    pub parent: u64,
    /// The device number of the file system.
    pub device: Device,
    /// The directory of the file system that forms the root of this mount.
    pub root: PathBuf,
    /// The mount point.
    pub at: PathBuf,
    /// The file system type, as in `ext4` or `fuse.cowlfs`.
    pub kind: Vec<u8>,
    /// The mount source.
    pub source: Vec<u8>,
    /// The options of this mount, as in `rw,nosuid`.
    pub flags: Vec<u8>,
    /// The options of the superblock.
    pub options: Vec<u8>,
}

impl Mount {
    /// Returns whether this mount has an option.
    pub fn has_flag(&self, wanted: &str) -> bool {
        let mut flags = self.flags.split(|&byte| byte == b',');
        flags.any(|flag| flag == wanted.as_bytes())
    }

    /// Returns the layers of an overlay of the kernel, as its mount options name them; none for other types.
    ///
    /// A colon or comma in a directory's name splits the name. Callers that compare paths get the parts.
    pub fn layers(&self) -> Vec<PathBuf> {
        const OPTIONS: [&[u8]; 6] = [
            b"lowerdir",
            b"lowerdir+",
            b"datadir+",
            b"upperdir",
            b"workdir",
            b"datadir",
        ];
        if self.kind != b"overlay" {
            return Vec::new();
        }
        let options = self.options.split(|&b| b == b',');
        let dirs = options.filter_map(|option| {
            let at = option.iter().position(|&b| b == b'=')?;
            let (key, value) = (option.get(..at)?, option.get(at + 1..)?);
            OPTIONS.contains(&key).then_some(value)
        });
        dirs.flat_map(|value| value.split(|&b| b == b':'))
            .filter(|dir| !dir.is_empty())
            .map(|dir| PathBuf::from(OsString::from_vec(dir.to_vec())))
            .collect()
    }
}

/// Parses the table; malformed lines are skipped.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|&b| b == b'\n').filter_map(line).collect()
}

/// Finds the topmost of the mounts at `at`.
pub fn topmost<'m>(mounts: &'m [Mount], at: &Path) -> Option<&'m Mount> {
    mounts
        .iter()
        .rev()
        .find(|mount| mount.at.as_os_str() == at.as_os_str())
}

/// Lists the mounts below `at`.
pub fn below<'m>(mounts: &'m [Mount], at: &'m Path) -> impl Iterator<Item = &'m Mount> {
    mounts
        .iter()
        .filter(move |mount| mount.at != at && mount.at.starts_with(at))
}

/// Finds the directory that a mount covers: its file system, and its path there.
///
/// All copies of a mount, in any namespace, cover the same directory.
pub fn covered(mounts: &[Mount], mount: &Mount) -> Option<(Device, PathBuf)> {
    let parent = mounts.iter().find(|other| other.id == mount.parent)?;
    let below = mount.at.strip_prefix(&parent.at).ok()?;
    let path = match below.as_os_str().is_empty() {
        true => parent.root.clone(),
        false => parent.root.join(below),
    };
    Some((parent.device, path))
}

fn line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let (id, parent) = (number(fields.next()?)?, number(fields.next()?)?);
    let mut dev = fields.next()?.split(|&b| b == b':');
    let mut half = || u32::try_from(number(dev.next()?)?).ok();
    let dev = (half()?, half()?);
    let path = |field: &[u8]| PathBuf::from(OsString::from_vec(unescape(field)));
    let (root, at) = (path(fields.next()?), path(fields.next()?));
    let flags = fields.next()?.to_vec();
    // Any number of optional fields up to a hyphen.
    fields.find(|field| *field == b"-")?;
    Some(Mount {
        id,
        parent,
        device: dev.into(),
        root,
        at,
        flags,
        kind: unescape(fields.next()?),
        source: unescape(fields.next()?),
        options: unescape(fields.next().unwrap_or_default()),
    })
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Decodes the octal escapes (`\040`) that the kernel writes for blanks, newlines and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(octal.unwrap_or(first));
        rest = octal.and_then(|_| after.get(3..)).unwrap_or(after);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
31 27 8:1 / / rw,relatime shared:1 master:2 - ext4 /dev/sda1 rw,errors=remount-ro
40 31 0:35 / /mnt/a\\040b rw - fuse.cowlfs web rw,user_id=0
41 40 0:36 / /mnt/a\\040b/proc rw - proc proc rw
42 31 8:1 /srv /data rw - ext4 /dev/sda1 rw
43 42 0:35 /sub /data/a rw - fuse.cowlfs web rw
44 31 0:44 / /merged rw shared:3 - overlay overlay rw,lowerdir=/a\\040b/x::/data,upperdir=/u,index=off
45 31 0:37 / /mnt/a\\040b rw shared:9 - fuse.cowlfs new rw
broken line
50 31 0:x / /y rw - a b c
";

    #[test]
    fn mountinfo_fields_are_parsed() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 7);
        let root = &mounts[0];
        assert_eq!((root.id, root.parent, root.device), (31, 27, (8, 1).into()));
        assert_eq!(
            (&root.kind[..], &root.source[..]),
            (&b"ext4"[..], &b"/dev/sda1"[..])
        );
        assert_eq!(root.options, b"rw,errors=remount-ro");
        assert_eq!(mounts[1].at, Path::new("/mnt/a b"));
        assert_eq!(mounts[1].device, (0, 35).into());
        assert_eq!(mounts[4].root, Path::new("/sub"));
    }

    #[test]
    fn overlay_layers_are_parsed_from_mount_options() {
        let mounts = parse(TABLE);
        assert_eq!(
            mounts[5].layers(),
            ["/a b/x", "/data", "/u"].map(PathBuf::from)
        );
        assert!(mounts[0].layers().is_empty());
    }

    #[test]
    fn mounts_at_and_below_a_path_are_found() {
        let mounts = parse(TABLE);
        let at = Path::new("/mnt/a b");
        assert_eq!(topmost(&mounts, at).map(|mount| mount.id), Some(45));
        assert_eq!(topmost(&mounts, Path::new("/mnt")), None);
        let inside: Vec<_> = below(&mounts, at).map(|mount| mount.id).collect();
        assert_eq!(inside, [41]);
    }

    #[test]
    fn covered_directories_are_detected() {
        let mounts = parse(TABLE);
        let directory = |index: usize| covered(&mounts, &mounts[index]);
        assert_eq!(directory(1), Some(((8, 1).into(), "/mnt/a b".into())));
        assert_eq!(directory(4), Some(((8, 1).into(), "/srv/a".into())));
        assert_eq!(directory(2), Some(((0, 35).into(), "/proc".into())));
        assert_eq!(directory(0), None);
    }

    #[test]
    fn octal_escapes_are_decoded() {
        assert_eq!(unescape(b"a\\134\\011b"), b"a\\\tb");
        assert_eq!(unescape(b"end\\04"), b"end\\04");
        assert_eq!(unescape(b"\\zzz"), b"\\zzz");
    }
}
