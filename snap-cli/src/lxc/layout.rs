//! The format of the files in LXC's snapshots.
//!
//! Pure: bytes in, values out.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use super::config;
use cowl_layers::shown::Show as _;

/// LXC's format of times: local time without a zone.
const TIME: &str = "%Y:%m:%d %H:%M:%S";

/// The location of a container's files according to its config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rootfs {
    /// A plain directory.
    Dir(PathBuf),
    /// A kernel overlay.
    Overlay {
        /// The upper directory.
        delta: PathBuf,
        /// The lower directories, the topmost first.
        lowers: Vec<PathBuf>,
    },
    /// A backing store that is not a directory, by its name.
    Other(Vec<u8>),
}

impl Rootfs {
    /// Returns the directory that is written: the plain directory, or the upper directory of the overlay.
    pub fn top(&self) -> Option<&Path> {
        match self {
            Self::Dir(path) | Self::Overlay { delta: path, .. } => Some(path),
            Self::Other(_) => None,
        }
    }
}

/// The key before LXC 2.1.
const OLD_ROOTFS: &str = "lxc.rootfs";

/// Returns the location of the files according to the text of a config; `None` if it has none.
pub fn rootfs(text: &[u8]) -> Option<Rootfs> {
    let value = config::get(text, config::ROOTFS).or_else(|| config::get(text, OLD_ROOTFS))?;
    let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
    if value.starts_with(b"/") {
        return Some(Rootfs::Dir(path(value)));
    }
    let mut parts = value.splitn(2, |&byte| byte == b':');
    let (kind, rest) = (parts.next()?, parts.next().unwrap_or_default());
    match kind {
        b"dir" | b"btrfs" => Some(Rootfs::Dir(path(rest))),
        b"overlay" | b"overlayfs" => {
            let mut dirs: Vec<_> = rest.split(|&byte| byte == b':').map(path).collect();
            let delta = dirs.pop()?;
            Some(Rootfs::Overlay {
                delta,
                lowers: dirs,
            })
        }
        other => Some(Rootfs::Other(other.to_vec())),
    }
}

/// Replaces the location of the files in a config.
pub fn with_rootfs_dir(text: &[u8], dir: &Path) -> Vec<u8> {
    let is_rootfs = |line: &[u8]| {
        config::parse_entry(line).is_some_and(|(key, _)| {
            key == config::ROOTFS.as_bytes() || key == OLD_ROOTFS.as_bytes()
        })
    };
    let ours = [
        config::ROOTFS.as_bytes(),
        b" = dir:",
        dir.as_os_str().as_bytes(),
        b"\n",
    ]
    .concat();
    let lines: Vec<_> = text.split_inclusive(|&byte| byte == b'\n').collect();
    let last = lines.iter().rposition(|line| is_rootfs(line));
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

/// Returns whether two configs are equivalent, except for the location of the files.
pub fn has_same_settings(one: (&[u8], &Path), other: (&[u8], &Path)) -> bool {
    fn plain(text: &[u8], own: &Path) -> Vec<Vec<u8>> {
        let lines = text
            .split(|&byte| byte == b'\n')
            .filter_map(config::parse_entry);
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

/// Returns the content of a time file as one line of plain text; `None` if it is empty.
pub fn format_stored_time(text: &[u8]) -> Option<String> {
    let text = text.trim_ascii();
    (!text.is_empty()).then(|| text.shown().to_string())
}

/// Parses a time in LXC's format, in the given zone; `None` if it is malformed.
pub fn parse_time(shown: &str, zone: &TimeZone) -> Option<Timestamp> {
    let time = DateTime::strptime(TIME, shown).ok()?;
    Some(time.to_zoned_datetime(zone.clone()).ok()?.timestamp())
}

/// Formats a time as LXC does.
pub fn format_time(moment: Timestamp, zone: &TimeZone) -> String {
    let zoned = moment.to_zoned_datetime(zone.clone());
    zoned.strftime(TIME).to_string()
}

/// Returns the number in a name of the form `snap<N>`.
pub fn parse_number(name: &OsStr) -> Option<u64> {
    let digits = name.to_str()?.strip_prefix("snap")?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// Returns the sort key of a name: numbered ones by their number, then all others.
pub fn sort_key(name: &OsStr) -> (u64, OsString) {
    (parse_number(name).unwrap_or(u64::MAX), name.to_owned())
}

/// A container that depends on another one's files, or on whose files another one depends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dependant {
    /// Its parent directory and its name.
    Container(PathBuf, OsString),
    /// A number of containers, as LXC 1.0 stored it.
    Count(u64),
}

/// Parses `lxc_snapshots` or `lxc_rdepends`: pairs of lines.
pub fn parse_dependants(text: &[u8]) -> Vec<Dependant> {
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

/// Removes one pair of lines from an `lxc_snapshots` or `lxc_rdepends` file.
pub fn remove_pair(text: &[u8], path: &[u8], name: &[u8]) -> Vec<u8> {
    if matches!(parse_dependants(text).as_slice(), [Dependant::Count(_)]) {
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
    fn rootfs_is_parsed() {
        let dir = |path: &str| Some(Rootfs::Dir(path.into()));
        for (text, want) in [
            ("lxc.rootfs.path = dir:/l/c1/rootfs\n", dir("/l/c1/rootfs")),
            ("lxc.rootfs.path=/l/c1/rootfs", dir("/l/c1/rootfs")),
            ("lxc.rootfs = /l/c1/rootfs", dir("/l/c1/rootfs")),
            ("lxc.rootfs.path = dir:/a:b", dir("/a:b")),
            ("lxc.rootfs.path = btrfs:/l/c1", dir("/l/c1")),
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
    fn with_rootfs_dir_replaces_the_last_line() {
        let path = Path::new("/n/rootfs");
        let text = with_rootfs_dir(b"# x\n\nlxc.rootfs.path = overlay:/a:/d\na = b", path);
        assert_eq!(text, b"# x\n\nlxc.rootfs.path = dir:/n/rootfs\na = b");
        assert_eq!(
            with_rootfs_dir(b"a = b", path),
            b"a = b\nlxc.rootfs.path = dir:/n/rootfs\n"
        );
    }

    #[test]
    fn has_same_settings_ignores_own_paths() {
        let live = b"# x\nlxc.rootfs.path = dir:/l/c1/rootfs\n\na = 1\nb = /l/c1/fstab\n";
        let snap = b"lxc.rootfs.path = dir:/s/rootfs\na=1\nb = /s/fstab\n";
        let config = |text: &'static [u8], own: &'static str| (text, Path::new(own));
        assert!(has_same_settings(config(live, "/l/c1"), config(snap, "/s")));
        assert!(!has_same_settings(
            config(live, "/l/c1"),
            config(b"a = 2\n", "/s")
        ));
    }

    #[test]
    fn times_round_trip() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let moment = parse_time("2026:11:23 13:02:05", &zone).unwrap();
        assert_eq!(moment.to_string(), "2026-11-23T11:02:05Z");
        assert_eq!(format_time(moment, &zone), "2026:11:23 13:02:05");
        for bad in [
            "",
            "2026:13:23 13:02:05",
            "yesterday",
            "2026-11-23 13:02:05",
        ] {
            assert_eq!(parse_time(bad, &zone), None, "{bad}");
        }
        assert_eq!(
            format_stored_time(b"2026:11:23 13:02:05\n").as_deref(),
            Some("2026:11:23 13:02:05")
        );
        assert_eq!(format_stored_time(b" \n"), None);
        assert_eq!(format_stored_time(b"a\nb").as_deref(), Some("a\\nb"));
    }

    #[test]
    fn names_are_sorted_by_number() {
        let mut names = ["snap10", "other", "snap9", "snap", "snap0"].map(OsString::from);
        names.sort_by_key(|name| sort_key(name));
        assert_eq!(names, ["snap0", "snap9", "snap10", "other", "snap"]);
        assert_eq!(parse_number(OsStr::new("snap-1")), None);
    }

    #[test]
    fn dependants_are_parsed_and_removed() {
        let one = Dependant::Container("/l".into(), "ov".into());
        assert_eq!(parse_dependants(b"/l\nov\n"), [one]);
        assert_eq!(parse_dependants(b"2\n"), [Dependant::Count(2)]);
        assert_eq!(parse_dependants(b"0"), []);
        assert_eq!(parse_dependants(b""), []);
        assert_eq!(remove_pair(b"/l\na\n/l\nb\n", b"/l", b"a"), b"/l\nb\n");
        assert_eq!(remove_pair(b"/l\na\n", b"/l", b"a"), b"");
        assert_eq!(remove_pair(b"3", b"/l", b"a"), b"3");
    }
}
