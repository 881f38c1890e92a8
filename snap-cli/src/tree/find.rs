//! Lookup of paths in a state, which reads only the directories along each path.

use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::{DirNode, Found, View};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::path::{common_prefix, split};
use super::path_map::PathMap;

/// The maximum number of symbolic links in one resolution, as in the kernel.
const MAX_LINKS: usize = 40;

/// Normalizes a path: removes leading, trailing and repeated slashes and `.`; the root becomes empty.
///
/// # Errors
///
/// `..` is refused.
pub fn normalize(path: &[u8]) -> Result<Vec<u8>> {
    let mut normal = Vec::new();
    for part in parts(path) {
        if part == b".." {
            return Err(TreeError::new(ErrorKind::Refused, "the path contains ..").at(path));
        }
        if !normal.is_empty() {
            normal.push(b'/');
        }
        normal.extend_from_slice(part);
    }
    Ok(normal)
}

/// Returns the object at a path that [`normalize`] returned. Symbolic links are not followed.
pub fn find(view: &View, path: &[u8]) -> Result<Found> {
    Finder::new(view).find(path)
}

/// A lookup of many paths in a state.
///
/// The directories along the last path are cached. For paths in order, each lookup costs the components that differ
/// from the previous path.
pub struct Finder<'v> {
    view: &'v View,
    root: Option<DirNode>,
    path: Vec<u8>,
    /// The directories along the path, each with the end of its name in the path.
    dirs: Vec<(usize, DirNode)>,
}

impl std::fmt::Debug for Finder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Finder").finish_non_exhaustive()
    }
}

impl<'v> Finder<'v> {
    /// Creates a lookup in a state.
    pub fn new(view: &'v View) -> Self {
        Self {
            view,
            root: None,
            path: Vec::new(),
            dirs: Vec::new(),
        }
    }

    /// Returns the state.
    pub fn view(&self) -> &'v View {
        self.view
    }

    /// Returns the object at a path that [`normalize`] returned. Symbolic links are not followed.
    pub fn find(&mut self, path: &[u8]) -> Result<Found> {
        self.truncate_to(path);
        if self.root.is_none() {
            self.root = Some(root(self.view)?);
        }
        let mut rest = path.get(self.path.len()..).unwrap_or_default();
        loop {
            rest = rest.strip_prefix(b"/").unwrap_or(rest);
            let end = rest.iter().position(|&byte| byte == b'/');
            let name = rest.get(..end.unwrap_or(rest.len())).unwrap_or_default();
            let above = self.dirs.last().map(|(_, dir)| dir).or(self.root.as_ref());
            let Some(above) = above else {
                return Ok(Found::Absent);
            };
            if name.is_empty() || name == b"." {
                if rest.is_empty() {
                    return Ok(Found::Dir(above.clone()));
                }
                rest = rest.get(name.len()..).unwrap_or_default();
                continue;
            }
            let done = path.len() - rest.len() + name.len();
            let here = path.get(..done).unwrap_or_default();
            let found = lookup(self.view, above, name, here)?;
            rest = rest.get(name.len()..).unwrap_or_default();
            match found {
                Found::Dir(dir) => {
                    let more = here.get(self.path.len()..).unwrap_or_default();
                    self.path.extend_from_slice(more);
                    self.dirs.push((done, dir));
                }
                found if parts(rest).next().is_none() => return Ok(found),
                _ => return Ok(Found::Absent),
            }
        }
    }

    /// Releases the cached directories that are not on `path`.
    fn truncate_to(&mut self, path: &[u8]) {
        let same = common_prefix(&self.path, path);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        while let Some((end, dir)) = self.dirs.last() {
            if *end <= same && ends_here(*end) {
                break;
            }
            dir.leave();
            self.dirs.pop();
        }
        let end = self.dirs.last().map_or(0, |(end, _)| *end);
        self.path.truncate(end);
    }
}

/// The treatment of a symbolic link in the last component of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastLink {
    /// It is followed.
    Follow,
    /// It is the result, as with `O_NOFOLLOW`.
    NoFollow,
}

/// Resolves a path as for a program whose root directory is the state, and returns the path without links, and the
/// object.
///
/// Symbolic links are followed, and `..` of the root is the root. A missing object is an error.
pub fn resolve(view: &View, path: &[u8], last: LastLink) -> Result<(Vec<u8>, Found)> {
    let fail = |kind, message: &str| TreeError::new(kind, message).at(path);
    // A trailing slash requires that the last link is followed, to a directory.
    let follows_last = last == LastLink::Follow || path.ends_with(b"/");
    let mut pending: Vec<Vec<u8>> = parts(path).rev().map(<[u8]>::to_vec).collect();
    // The directories along the path, each with the end of its name in the path.
    let mut dirs = vec![(0, root(view)?)];
    let mut here = Vec::new();
    let mut links = 0;
    while let Some(part) = pending.pop() {
        if part == b".." {
            if dirs.len() > 1 {
                dirs.pop();
            }
            continue;
        }
        let (above, dir) = dirs
            .last()
            .ok_or_else(|| fail(ErrorKind::Damaged, "there is no root directory"))?;
        here.truncate(*above);
        if !here.is_empty() {
            here.push(b'/');
        }
        here.extend_from_slice(&part);
        match lookup(view, dir, &part, &here)? {
            Found::Absent | Found::Whiteout => {
                return Err(TreeError::new(ErrorKind::NotFound, "there is no such path").at(path));
            }
            Found::Dir(dir) => dirs.push((here.len(), dir)),
            Found::File(file)
                if file.stat.kind() == FileKind::Symlink
                    && (follows_last || !pending.is_empty()) =>
            {
                links += 1;
                if links > MAX_LINKS {
                    return Err(fail(
                        ErrorKind::Refused,
                        "too many levels of symbolic links",
                    ));
                }
                let target = file.loc.readlink();
                let target = target.context("cannot read the symbolic link", &here)?;
                if target.starts_with(b"/") {
                    dirs.truncate(1);
                }
                pending.extend(parts(&target).rev().map(<[u8]>::to_vec));
            }
            file @ Found::File(_) => {
                if !pending.is_empty() || path.ends_with(b"/") {
                    return Err(fail(
                        ErrorKind::NotFound,
                        "a component of the path is not a directory",
                    ));
                }
                return Ok((here, file));
            }
        }
    }
    dirs.pop()
        .map(|(end, dir)| {
            here.truncate(end);
            (here, Found::Dir(dir))
        })
        .ok_or_else(|| fail(ErrorKind::Damaged, "there is no root directory"))
}

/// Splits a path into its components.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && part != b".")
}

/// Returns the paths that are not below any of the others, sorted.
pub fn topmost(mut paths: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    paths.sort_unstable();
    paths.dedup();
    if paths.first().is_some_and(Vec::is_empty) {
        paths.truncate(1);
    }
    let mut all = PathMap::default();
    for path in &paths {
        all.insert(path, ());
    }
    paths.retain(|path| !all.covers(split(path).0));
    paths
}

fn root(view: &View) -> Result<DirNode> {
    view.root().context("cannot read the root directory", b".")
}

fn lookup(view: &View, dir: &DirNode, part: &[u8], path: &[u8]) -> Result<Found> {
    let name = Name::new(part).context("cannot read", path)?;
    view.lookup(dir, &name).context("cannot read", path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::Layer;

    use super::*;

    #[test]
    fn paths_are_normalized() {
        for (path, normal) in [
            ("", ""),
            ("/", ""),
            ("a//b/", "a/b"),
            ("./a/./b", "a/b"),
            ("/etc/fstab", "etc/fstab"),
        ] {
            assert_eq!(normalize(path.as_bytes()).unwrap(), normal.as_bytes());
        }
        assert!(normalize(b"a/../b").is_err());
        let paths = ["b", "a/b", "a/b/c", "a/bc", "b/x/y", "b"].map(|p| p.as_bytes().to_vec());
        assert_eq!(topmost(paths.to_vec()), [&b"a/b"[..], b"a/bc", b"b"]);
        assert_eq!(topmost(vec![b"x".to_vec(), Vec::new()]), [b""]);
    }

    #[test]
    fn symbolic_links_do_not_leave_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("usr/lib")).unwrap();
        fs::write(at("usr/lib/x"), "x").unwrap();
        symlink("usr/lib", at("lib")).unwrap();
        symlink("/../../lib/../../usr/lib/x", at("usr/absolute")).unwrap();
        symlink("absolute", at("usr/twice")).unwrap();
        symlink("loop2", at("loop1")).unwrap();
        symlink("loop1", at("loop2")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        let layer = Layer::open(dir.path(), XattrSpace::User).unwrap();
        let view = View::new(vec![layer]);
        let resolve_in = |path: &str, last| {
            let found = resolve(&view, path.as_bytes(), last);
            found.map(|(path, _)| String::from_utf8(path).unwrap())
        };
        for path in ["lib/x", "/usr/absolute", "usr/twice", "usr/lib/../../lib/x"] {
            assert_eq!(
                resolve_in(path, LastLink::Follow).unwrap(),
                "usr/lib/x",
                "{path}"
            );
        }
        assert_eq!(
            resolve_in("usr/twice", LastLink::NoFollow).unwrap(),
            "usr/twice"
        );
        assert_eq!(resolve_in("lib", LastLink::NoFollow).unwrap(), "lib");
        assert_eq!(resolve_in("lib/", LastLink::NoFollow).unwrap(), "usr/lib");
        assert_eq!(resolve_in("../../..", LastLink::NoFollow).unwrap(), "");
        let kind = |path: &str| resolve_in(path, LastLink::Follow).unwrap_err().kind();
        assert_eq!(kind("loop1"), ErrorKind::Refused);
        for path in ["dangling", "no", "usr/lib/x/y", "usr/lib/x/"] {
            assert_eq!(kind(path), ErrorKind::NotFound, "{path}");
        }
        assert!(matches!(
            super::find(&view, b"lib/x").unwrap(),
            Found::Absent
        ));
        assert!(matches!(
            super::find(&view, b"usr/lib/x").unwrap(),
            Found::File(_)
        ));
    }
}
