//! Files in the directory of an LXC container to which its config refers: included configs, hooks and a table of mounts.
//!
//! They lie outside the root filesystem, so snapshots do not contain them. A copy of the container needs them in its own
//! directory.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use cowl_layers::shown::Show as _;

use super::config::{self, CopyRewrite};
use crate::error::{Error, Result};
use crate::host::files;
use crate::store::bytes::Blob;
use crate::store::disk;
use crate::store::outside::{OwnFile, OwnFileKind};

/// The number of bytes of all files. Manifests contain them.
const LIMIT: u64 = 1 << 20;

/// Names in the directory that are copied in another way.
const OTHER: [&str; 4] = ["config", "rootfs", "snaps", "overlay"];

/// Returns the path relative to a container's directory if it is that of such a file.
fn relative(path: &Path, dir: &Path) -> Option<PathBuf> {
    let inside = path.strip_prefix(dir).ok()?;
    is_own(inside).then(|| inside.to_path_buf())
}

/// Returns whether a relative path stays in the directory of a container and is not copied in another way.
pub fn is_own(path: &Path) -> bool {
    let is_name = |part: Component<'_>| matches!(part, Component::Normal(_));
    let first = path.components().next();
    path.components().all(is_name)
        && first.is_some_and(|first| OTHER.iter().all(|other| first.as_os_str() != *other))
}

/// The files that a search has found.
struct Search<'d> {
    dir: &'d Path,
    known: HashSet<PathBuf>,
    bytes: u64,
    found: Vec<OwnFile>,
    notes: Vec<String>,
}

/// Reads the files in the directory `dir` of a container to which its config `text` refers, also through included
/// files. Returns notes on files that cannot be copied.
pub fn collect(text: &[u8], dir: &Path) -> Result<(Vec<OwnFile>, Vec<String>)> {
    let mut search = Search {
        dir,
        known: HashSet::new(),
        bytes: 0,
        found: Vec::new(),
        notes: Vec::new(),
    };
    let mut todo = vec![text.to_vec()];
    while let Some(text) = todo.pop() {
        for line in text.split(|&byte| byte == b'\n') {
            let Some((key, value)) = config::parse_entry(line) else {
                continue;
            };
            let path = Path::new(OsStr::from_bytes(value));
            match key {
                b"lxc.include" => todo.extend(search.included(path)?),
                b"lxc.mount.fstab" => drop(search.read(path, OwnFileKind::Text)?),
                hook if hook.starts_with(b"lxc.hook.") => {
                    // A hook is a command line. Its arguments can be files, too.
                    for word in value.split(u8::is_ascii_whitespace) {
                        let word = Path::new(OsStr::from_bytes(word));
                        search.read(word, OwnFileKind::Program)?;
                    }
                }
                _ => {}
            }
        }
    }
    Ok((search.found, search.notes))
}

impl Search<'_> {
    /// Reads an included file, or the `*.conf` files of an included directory, and returns their texts.
    fn included(&mut self, path: &Path) -> Result<Vec<Vec<u8>>> {
        if relative(path, self.dir).is_none() {
            return Ok(Vec::new());
        }
        let paths = match path.is_dir() {
            false => vec![path.to_path_buf()],
            true => {
                let names = disk::names(path)?;
                let names = names.into_iter().filter(|name| name.ends_with(".conf"));
                names.map(|name| path.join(name)).collect()
            }
        };
        let mut texts = Vec::new();
        for path in paths {
            texts.extend(self.read(&path, OwnFileKind::Text)?);
        }
        Ok(texts)
    }

    /// Reads a file of the container that was not read before, and returns its content.
    fn read(&mut self, path: &Path, kind: OwnFileKind) -> Result<Option<Vec<u8>>> {
        let Some(inside) = relative(path, self.dir) else {
            return Ok(None);
        };
        if !self.known.insert(inside.clone()) {
            return Ok(None);
        }
        let meta = match std::fs::metadata(path) {
            Ok(meta) if meta.is_file() => meta,
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::at("inspect", path, error)),
        };
        self.bytes = self.bytes.saturating_add(meta.len());
        if self.bytes > LIMIT {
            let why = "is not copied: the files of the config exceed 1 MiB";
            self.notes.push(format!("{} {why}", path.shown()));
            return Ok(None);
        }
        let content = files::read(path)?;
        self.found.push(OwnFile {
            path: inside,
            kind,
            mode: meta.permissions().mode() & 0o777,
            content: Blob(content.clone()),
        });
        Ok(Some(content))
    }
}

/// Returns the files of a copy: paths in the texts are those of the copy.
pub fn rewritten(files: Vec<OwnFile>, how: &CopyRewrite<'_>) -> Vec<OwnFile> {
    let rewrite = |file: OwnFile| OwnFile {
        content: match file.kind {
            OwnFileKind::Text => Blob(config::replace_dir(&file.content.0, how)),
            OwnFileKind::Program => file.content,
        },
        ..file
    };
    files.into_iter().map(rewrite).collect()
}

/// Writes those files that do not exist.
pub fn write_missing(own: &[OwnFile], dir: &Path) -> Result<()> {
    for file in own {
        let path = dir.join(&file.path);
        if disk::exists(&path)? {
            continue;
        }
        let mut parent = dir.to_path_buf();
        for part in file.path.parent().into_iter().flat_map(Path::components) {
            parent.push(part);
            disk::ensure_dir(&parent)?;
        }
        files::replace_name(&path, &file.content.0, file.mode & 0o777)?;
    }
    Ok(())
}

/// Removes the files that are unchanged, and their directories if they are empty then.
pub fn remove_unchanged(own: &[OwnFile], dir: &Path) -> Result<()> {
    for file in own {
        let path = dir.join(&file.path);
        if files::read_opt(&path)?.is_some_and(|content| content == file.content.0) {
            disk::remove_if_exists(&path)?;
        }
        let parents = file.path.ancestors().skip(1);
        for parent in parents.filter(|parent| !parent.as_os_str().is_empty()) {
            // It is not empty, or was removed before.
            if std::fs::remove_dir(dir.join(parent)).is_err() {
                break;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_the_directory_are_found_and_rewritten() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("c1");
        std::fs::create_dir_all(dir.join("conf.d")).unwrap();
        std::fs::create_dir_all(dir.join("rootfs")).unwrap();
        let at = dir.to_str().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write("hook", "#!/bin/sh\n");
        write("fstab", &format!("/srv {at}/rootfs/srv none bind\n"));
        write("conf.d/a.conf", &format!("lxc.include = {at}/more\n"));
        write("conf.d/ignored", "");
        write(
            "more",
            &format!("lxc.include = {at}/more\nlxc.hook.mount = {at}/hook2\n"),
        );
        write("hook2", "");
        write("rootfs/file", "");
        write("unrelated", "");
        let text = format!(
            "lxc.include = /usr/share/lxc/x.conf\nlxc.include = {at}/conf.d\nlxc.mount.fstab = {at}/fstab\n\
             lxc.hook.start = {at}/hook a {at}/none\nlxc.hook.stop = {at}/rootfs/file {at}/../c1/unrelated\n\
             lxc.rootfs.path = dir:{at}/rootfs\n"
        );
        let (found, notes) = collect(text.as_bytes(), &dir).unwrap();
        assert_eq!(notes, [""; 0]);
        let mut names: Vec<_> = found
            .iter()
            .map(|file| file.path.to_str().unwrap())
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["conf.d/a.conf", "fstab", "hook", "hook2", "more"]);
        let other = scratch.path().join("c2");
        std::fs::create_dir(&other).unwrap();
        let how = CopyRewrite {
            from: dir.as_os_str().as_bytes(),
            to: other.as_os_str().as_bytes(),
            name: "c2",
        };
        let copied = rewritten(found, &how);
        write_missing(&copied, &other).unwrap();
        let fstab = std::fs::read_to_string(other.join("fstab")).unwrap();
        assert_eq!(
            fstab,
            format!("/srv {}/rootfs/srv none bind\n", other.to_str().unwrap())
        );
        std::fs::write(other.join("hook"), "changed").unwrap();
        remove_unchanged(&copied, &other).unwrap();
        assert_eq!(disk::names(&other).unwrap(), ["hook"]);
    }

    #[test]
    fn paths_that_leave_the_directory_are_not_own() {
        for bad in [
            "",
            "/etc/x",
            "../x",
            "a/../../x",
            "config",
            "rootfs/x",
            "./x/..",
        ] {
            assert!(!is_own(Path::new(bad)), "{bad}");
        }
        assert!(is_own(Path::new("hooks/x")));
    }
}
