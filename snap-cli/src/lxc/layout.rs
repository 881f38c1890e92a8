//! What the files of LXC's snapshots say. Pure: bytes in, values out.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::config;

/// How LXC writes a time: that of the machine's zone, without saying which.
const TIME: &str = "%Y:%m:%d %H:%M:%S";

/// Where a container's files are, by its config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rootfs {
    /// In a plain folder.
    Folder(PathBuf),
    /// In an overlay of the kernel's.
    Overlay {
        /// The folder that is written to.
        delta: PathBuf,
        /// Those below it, the topmost first.
        lowers: Vec<PathBuf>,
    },
    /// On something that is no folder: the name of its kind.
    Other(Vec<u8>),
}

impl Rootfs {
    /// The folder that is written to.
    pub fn top(&self) -> Option<&Path> {
        match self {
            Self::Folder(path) | Self::Overlay { delta: path, .. } => Some(path),
            Self::Other(_) => None,
        }
    }
}

/// The key that LXC had before version 2.1.
const OLD_ROOTFS: &str = "lxc.rootfs";

/// Where the files are, by the text of a config; `None` where it does not say.
pub fn rootfs(text: &[u8]) -> Option<Rootfs> {
    let value = config::get(text, config::ROOTFS).or_else(|| config::get(text, OLD_ROOTFS))?;
    let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    if value.starts_with(b"/") {
        return Some(Rootfs::Folder(path(value)));
    }
    let mut parts = value.splitn(2, |&byte| byte == b':');
    let (kind, rest) = (parts.next()?, parts.next().unwrap_or_default());
    match kind {
        b"dir" | b"btrfs" => Some(Rootfs::Folder(path(rest))),
        b"overlay" | b"overlayfs" => {
            let mut folders: Vec<_> = rest.split(|&byte| byte == b':').map(path).collect();
            let delta = folders.pop()?;
            Some(Rootfs::Overlay {
                delta,
                lowers: folders,
            })
        }
        other => Some(Rootfs::Other(other.to_vec())),
    }
}

/// The config with the files in this folder.
pub fn with_folder(text: &[u8], folder: &Path) -> Vec<u8> {
    let is_it = |line: &[u8]| {
        config::entry(line).is_some_and(|(key, _)| {
            key == config::ROOTFS.as_bytes() || key == OLD_ROOTFS.as_bytes()
        })
    };
    let ours = [
        config::ROOTFS.as_bytes(),
        b" = dir:",
        folder.as_os_str().as_bytes(),
        b"\n",
    ]
    .concat();
    let lines: Vec<_> = text.split_inclusive(|&byte| byte == b'\n').collect();
    let last = lines.iter().rposition(|line| is_it(line));
    let mut out = Vec::with_capacity(text.len() + ours.len());
    for (at, line) in lines.iter().enumerate() {
        match last == Some(at) {
            true => out.extend_from_slice(&ours),
            false => out.extend_from_slice(line),
        }
    }
    if last.is_none() {
        if !out.is_empty() && !out.ends_with(b"\n") {
            out.push(b'\n');
        }
        out.extend_from_slice(&ours);
    }
    out
}

/// Whether two configs say the same, but for blank lines, comments, and where the files are.
pub fn same_settings(one: (&[u8], &Path), other: (&[u8], &Path)) -> bool {
    fn plain(text: &[u8], own: &Path) -> Vec<Vec<u8>> {
        let lines = text.split(|&byte| byte == b'\n').filter_map(config::entry);
        lines
            .filter(|(key, _)| *key != config::ROOTFS.as_bytes() && *key != OLD_ROOTFS.as_bytes())
            .map(|(key, value)| {
                let value = match value.strip_prefix(own.as_os_str().as_bytes()) {
                    Some(inside) => [b".".as_slice(), inside].concat(),
                    None => value.to_vec(),
                };
                [key, b"=", &value].concat()
            })
            .collect()
    }
    plain(one.0, one.1) == plain(other.0, other.1)
}

/// A time as it is shown: one line of plain text; `None` where the file says nothing.
pub fn shown_time(text: &[u8]) -> Option<String> {
    let text = text.trim_ascii();
    (!text.is_empty()).then(|| text.escape_ascii().to_string())
}

/// The moment that LXC meant, if the machine's zone is still the same; `None` for what is no time.
pub fn moment(shown: &str, zone: &TimeZone) -> Option<Timestamp> {
    let time = DateTime::strptime(TIME, shown).ok()?;
    Some(time.to_zoned_datetime(zone.clone()).ok()?.timestamp())
}

/// A moment as LXC would have written it.
pub fn as_lxc(moment: Timestamp, zone: &TimeZone) -> String {
    let zoned = moment.to_zoned_datetime(zone.clone());
    zoned.strftime(TIME).to_string()
}

/// The number of a name that LXC gives.
pub fn number(name: &OsStr) -> Option<u64> {
    let digits = name.to_str()?.strip_prefix("snap")?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// By what names are sorted: LXC's by their number, then all others.
pub fn order(name: &OsStr) -> (u64, OsString) {
    (number(name).unwrap_or(u64::MAX), name.to_owned())
}

/// One that stands on another's files, or on whose files another stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dependant {
    /// The folder that it is in, and its name.
    Container(PathBuf, OsString),
    /// So many that LXC 1.0 counted and did not name.
    Count(u64),
}

/// The list in `lxc_snapshots` and `lxc_rdepends`: lines two by two.
pub fn pairs(text: &[u8]) -> Vec<Dependant> {
    let plain = std::str::from_utf8(text.trim_ascii());
    if let Some(count) = plain.ok().and_then(|text| text.parse().ok()) {
        return if count > 0 {
            vec![Dependant::Count(count)]
        } else {
            Vec::new()
        };
    }
    lines_by_two(text)
        .map(|(path, name)| {
            Dependant::Container(
                PathBuf::from(OsString::from_vec(path.to_vec())),
                OsString::from_vec(name.to_vec()),
            )
        })
        .collect()
}

fn lines_by_two(text: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut lines = text.split(|&byte| byte == b'\n');
    std::iter::from_fn(move || Some((lines.next()?, lines.next()?)))
}

/// The list without one of them.
pub fn without_pair(text: &[u8], path: &[u8], name: &[u8]) -> Vec<u8> {
    if matches!(pairs(text).as_slice(), [Dependant::Count(_)]) {
        return text.to_vec();
    }
    let mut out = Vec::with_capacity(text.len());
    for (one, two) in lines_by_two(text) {
        if (one, two) != (path, name) {
            out.extend([one, b"\n", two, b"\n"].concat());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_files_are() {
        let folder = |path: &str| Some(Rootfs::Folder(path.into()));
        for (text, want) in [
            (
                "lxc.rootfs.path = dir:/l/c1/rootfs\n",
                folder("/l/c1/rootfs"),
            ),
            ("lxc.rootfs.path=/l/c1/rootfs", folder("/l/c1/rootfs")),
            ("lxc.rootfs = /l/c1/rootfs", folder("/l/c1/rootfs")),
            ("lxc.rootfs.path = dir:/a:b", folder("/a:b")),
            ("lxc.rootfs.path = btrfs:/l/c1", folder("/l/c1")),
            (
                "lxc.rootfs.path = overlay:/a:/b:/d",
                Some(Rootfs::Overlay {
                    delta: "/d".into(),
                    lowers: vec!["/a".into(), "/b".into()],
                }),
            ),
            (
                "lxc.rootfs.path = zfs:p/x",
                Some(Rootfs::Other(b"zfs".to_vec())),
            ),
            ("lxc.uts.name = x", None),
            ("", None),
        ] {
            assert_eq!(rootfs(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn another_folder() {
        let path = Path::new("/n/rootfs");
        let text = with_folder(b"# x\n\nlxc.rootfs.path = overlay:/a:/d\na = b", path);
        assert_eq!(text, b"# x\n\nlxc.rootfs.path = dir:/n/rootfs\na = b");
        assert_eq!(
            with_folder(b"a = b", path),
            b"a = b\nlxc.rootfs.path = dir:/n/rootfs\n"
        );
    }

    #[test]
    fn settings_that_are_the_same() {
        let live = b"# x\nlxc.rootfs.path = dir:/l/c1/rootfs\n\na = 1\nb = /l/c1/fstab\n";
        let snap = b"lxc.rootfs.path = dir:/s/rootfs\na=1\nb = /s/fstab\n";
        let of = |text: &'static [u8], own: &'static str| (text, Path::new(own));
        assert!(same_settings(of(live, "/l/c1"), of(snap, "/s")));
        assert!(!same_settings(of(live, "/l/c1"), of(b"a = 2\n", "/s")));
    }

    #[test]
    fn times() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let moment = moment("2026:11:23 13:02:05", &zone).unwrap();
        assert_eq!(moment.to_string(), "2026-11-23T11:02:05Z");
        assert_eq!(as_lxc(moment, &zone), "2026:11:23 13:02:05");
        for bad in [
            "",
            "2026:13:23 13:02:05",
            "yesterday",
            "2026-11-23 13:02:05",
        ] {
            assert_eq!(super::moment(bad, &zone), None, "{bad}");
        }
        assert_eq!(
            shown_time(b"2026:11:23 13:02:05\n").as_deref(),
            Some("2026:11:23 13:02:05")
        );
        assert_eq!(shown_time(b" \n"), None);
        assert_eq!(shown_time(b"a\nb").as_deref(), Some("a\\nb"));
    }

    #[test]
    fn numbers_and_their_order() {
        let mut names = ["snap10", "other", "snap9", "snap", "snap0"].map(OsString::from);
        names.sort_by_key(|name| order(name));
        assert_eq!(names, ["snap0", "snap9", "snap10", "other", "snap"]);
        assert_eq!(number(OsStr::new("snap-1")), None);
    }

    #[test]
    fn lists_of_dependants() {
        let one = Dependant::Container("/l".into(), "ov".into());
        assert_eq!(pairs(b"/l\nov\n"), [one]);
        assert_eq!(pairs(b"2\n"), [Dependant::Count(2)]);
        assert_eq!(pairs(b"0"), []);
        assert_eq!(pairs(b""), []);
        assert_eq!(without_pair(b"/l\na\n/l\nb\n", b"/l", b"a"), b"/l\nb\n");
        assert_eq!(without_pair(b"/l\na\n", b"/l", b"a"), b"");
        assert_eq!(without_pair(b"3", b"/l", b"a"), b"3");
    }
}
