//! Targets of a container's mounts that are absolute paths in its root filesystem.
//!
//! LXC mounts on such a target only while `lxc.rootfs.path` names the same directory, and otherwise ignores the entry with
//! a warning in its log. Relative targets have the same meaning with every root filesystem.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::config;
use super::layout::{Rootfs, rootfs};

/// The key of an entry.
pub const ENTRY: &str = "lxc.mount.entry";
/// The key of a table of mounts.
pub const FSTAB: &str = "lxc.mount.fstab";

/// The paths of a root filesystem, as a table of mounts writes them.
#[derive(Clone, Debug, Default)]
pub struct RootPaths(Vec<Vec<u8>>);

impl RootPaths {
    /// Returns the paths of the root filesystem at `real` of a container in the directory `dir`, with the config `text`.
    pub fn new(dir: &Path, text: &[u8], real: &Path) -> Self {
        let mut paths = Self::default();
        paths.add(real);
        // LXC accepts this path whatever the config says.
        paths.add(&dir.join("rootfs"));
        if let Some(Rootfs::Dir(path)) = rootfs(text) {
            paths.add(&path);
        }
        paths
    }

    /// Adds a path.
    fn add(&mut self, path: &Path) {
        let mut written = Vec::new();
        for byte in path.as_os_str().as_bytes() {
            match byte {
                b' ' | b'\t' | b'\n' | b'\\' => {
                    written.extend_from_slice(format!("\\{byte:03o}").as_bytes());
                }
                _ => written.push(*byte),
            }
        }
        while written.ends_with(b"/") {
            written.pop();
        }
        if !written.is_empty() {
            self.0.push(written);
        }
    }

    /// Returns the relative target in place of an absolute one; `None` if the target is not in the root filesystem.
    fn relative<'t>(&self, target: &'t [u8]) -> Option<&'t [u8]> {
        let inside = |path: &Vec<u8>| target.strip_prefix(path.as_slice());
        let rest = self.0.iter().filter_map(inside);
        let mut rest = rest.filter(|rest| rest.is_empty() || rest.starts_with(b"/"));
        let rest = rest.next()?;
        let start = rest.iter().position(|&byte| byte != b'/');
        let relative = start.and_then(|start| rest.get(start..));
        Some(relative.unwrap_or(b"."))
    }
}

/// Returns the position of the second word from `start`, where quotes count as spaces.
fn second_word(line: &[u8], start: usize) -> Option<Range<usize>> {
    let is_space = |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'"' | b'\'');
    let skip = |from: usize, spaces: bool| {
        let rest = line.get(from..).unwrap_or_default();
        let end = rest.iter().position(|byte| is_space(byte) != spaces);
        from + end.unwrap_or(rest.len())
    };
    let from = skip(skip(skip(start, true), false), true);
    let end = skip(from, false);
    (from < end).then_some(from..end)
}

/// Returns the config with relative targets in place of absolute ones in the root filesystem, and the number of changes.
pub fn with_relative_targets(text: &[u8], roots: &RootPaths) -> (Vec<u8>, usize) {
    let mut out = Vec::with_capacity(text.len());
    let mut changed = 0;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let target = config::parse_entry(line)
            .filter(|(key, _)| *key == ENTRY.as_bytes())
            .and_then(|_| second_word(line, line.iter().position(|&byte| byte == b'=')? + 1));
        let replaced = target.and_then(|at| {
            let relative = roots.relative(line.get(at.clone())?)?;
            Some([line.get(..at.start)?, relative, line.get(at.end..)?].concat())
        });
        match replaced {
            Some(line) => {
                changed += 1;
                out.extend(line);
            }
            None => out.extend_from_slice(line),
        }
    }
    (out, changed)
}

/// Returns the entries of a table whose target is absolute and in the root filesystem, each with the relative target.
pub fn absolute_targets<'t>(table: &'t [u8], roots: &RootPaths) -> Vec<(&'t [u8], &'t [u8])> {
    let lines = table.split(|&byte| byte == b'\n');
    let lines = lines.filter(|line| !line.trim_ascii().starts_with(b"#"));
    lines
        .filter_map(|line| {
            let target = line.get(second_word(line, 0)?)?;
            Some((line.trim_ascii(), roots.relative(target)?))
        })
        .collect()
}

/// Returns the entries of a config as a table of mounts.
pub fn entries(text: &[u8]) -> Vec<&[u8]> {
    let lines = text.split(|&byte| byte == b'\n');
    let entries = lines.filter_map(config::parse_entry);
    let values = entries.filter(|(key, _)| *key == ENTRY.as_bytes());
    values.map(|(_, value)| value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowl_layers::shown::Show as _;

    fn roots() -> RootPaths {
        let text = b"lxc.rootfs.path = dir:/srv/my web\n";
        RootPaths::new(Path::new("/l/web"), text, Path::new("/real"))
    }

    #[test]
    fn targets_in_the_root_become_relative() {
        let text = b"# lxc.mount.entry = /a /l/web/rootfs/b none bind\n\
            lxc.mount.entry = /a /l/web/rootfs/b none bind 0 0\n\
            lxc.mount.entry=\"/a  /srv/my\\040web//b/c none bind\"\n\
            lxc.mount.entry = /a /l/web/rootfs none bind\n\
            lxc.mount.entry = /l/web/rootfs/x mnt none bind\n\
            lxc.mount.entry = /a /l/web/rootfs2/b none bind\n\
            lxc.mount.entry = /a /real/b none bind\n\
            lxc.mount.entry =\n\
            lxc.mount.entry = /a\n\
            lxc.mount.auto = proc /l/web/rootfs/b";
        let (out, changed) = with_relative_targets(text, &roots());
        let want = b"# lxc.mount.entry = /a /l/web/rootfs/b none bind\n\
            lxc.mount.entry = /a b none bind 0 0\n\
            lxc.mount.entry=\"/a  b/c none bind\"\n\
            lxc.mount.entry = /a . none bind\n\
            lxc.mount.entry = /l/web/rootfs/x mnt none bind\n\
            lxc.mount.entry = /a /l/web/rootfs2/b none bind\n\
            lxc.mount.entry = /a b none bind\n\
            lxc.mount.entry =\n\
            lxc.mount.entry = /a\n\
            lxc.mount.auto = proc /l/web/rootfs/b";
        assert_eq!(out.shown().to_string(), want.shown().to_string());
        assert_eq!(changed, 4);
        assert_eq!(with_relative_targets(&out, &roots()), (out.clone(), 0));
    }

    #[test]
    fn a_table_has_its_absolute_targets_listed() {
        let table = b"# /a /l/web/rootfs/b\n/a b none bind\n  /a /l/web/rootfs/c none bind\n\n/x\n";
        let found = absolute_targets(table, &roots());
        assert_eq!(found, [(&b"/a /l/web/rootfs/c none bind"[..], &b"c"[..])]);
    }
}
