//! One path of a state: only the folders on the way to it are read.

use cowl_layers::name::Name;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::{DirNode, Found, View};

use super::error::{Context as _, ErrorKind, Result, TreeError};
use super::path::{common, split};
use super::path_map::PathMap;

/// So many links may be followed on the way to one path, as the kernel has it.
const MOST_LINKS: usize = 40;

/// A path as states have it: no slash before it, after it or twice, and nothing for the root folder.
/// What leads upwards is refused.
pub fn plain(path: &[u8]) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    for part in parts(path) {
        if part == b".." {
            return Err(TreeError::new(ErrorKind::Refused, "a path with .. in it").at(path));
        }
        if !plain.is_empty() {
            plain.push(b'/');
        }
        plain.extend_from_slice(part);
    }
    Ok(plain)
}

/// What a state has at a path of [`plain`], links on the way not followed.
pub fn at(view: &View, path: &[u8]) -> Result<Found> {
    Finder::new(view).at(path)
}

/// Finds paths in a state. The way to the last one is remembered: of paths that come in order each costs what
/// it does not have in common with the one before.
pub struct Finder<'v> {
    view: &'v View,
    root: Option<DirNode>,
    path: Vec<u8>,
    /// The directories on the way, each with where it ends in the path.
    way: Vec<(usize, DirNode)>,
}

impl std::fmt::Debug for Finder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Finder").finish_non_exhaustive()
    }
}

impl<'v> Finder<'v> {
    /// For this state.
    pub fn new(view: &'v View) -> Self {
        Self {
            view,
            root: None,
            path: Vec::new(),
            way: Vec::new(),
        }
    }

    /// The state.
    pub fn view(&self) -> &'v View {
        self.view
    }

    /// What it has at a path of [`plain`], links on the way not followed.
    pub fn at(&mut self, path: &[u8]) -> Result<Found> {
        self.back(path);
        if self.root.is_none() {
            self.root = Some(root(self.view)?);
        }
        let mut rest = path.get(self.path.len()..).unwrap_or_default();
        loop {
            rest = rest.strip_prefix(b"/").unwrap_or(rest);
            let end = rest.iter().position(|&byte| byte == b'/');
            let name = rest.get(..end.unwrap_or(rest.len())).unwrap_or_default();
            let above = self.way.last().map(|(_, dir)| dir).or(self.root.as_ref());
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
                    self.way.push((done, dir));
                }
                found if parts(rest).next().is_none() => return Ok(found),
                _ => return Ok(Found::Absent),
            }
        }
    }

    /// Goes back to what the way has in common with a path.
    fn back(&mut self, path: &[u8]) {
        let same = common(&self.path, path);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        while let Some((end, dir)) = self.way.last() {
            if *end <= same && ends_here(*end) {
                break;
            }
            dir.leave();
            self.way.pop();
        }
        let end = self.way.last().map_or(0, |(end, _)| *end);
        self.path.truncate(end);
    }
}

/// Whether a symbolic link in the last component of a path is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastLink {
    /// It is followed.
    Follow,
    /// It is the result, as with `O_NOFOLLOW`.
    Keep,
}

/// Resolves a path as a program in the state would: symbolic links are followed, and `..` of the root is the root.
/// Returns the path without links, and the object; a missing object is an error.
pub fn follow(view: &View, path: &[u8], last: LastLink) -> Result<(Vec<u8>, Found)> {
    let fail = |kind, what: &str| TreeError::new(kind, what).at(path);
    // A trailing slash asks for the folder that a link leads to.
    let follows_last = last == LastLink::Follow || path.ends_with(b"/");
    let mut todo: Vec<Vec<u8>> = parts(path).rev().map(<[u8]>::to_vec).collect();
    // Each directory on the way with where it ends in the path so far.
    let mut way = vec![(0, root(view)?)];
    let mut here = Vec::new();
    let mut links = 0;
    while let Some(part) = todo.pop() {
        if part == b".." {
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let (above, dir) = way
            .last()
            .ok_or_else(|| fail(ErrorKind::Damaged, "no root"))?;
        here.truncate(*above);
        if !here.is_empty() {
            here.push(b'/');
        }
        here.extend_from_slice(&part);
        match lookup(view, dir, &part, &here)? {
            Found::Absent | Found::Whiteout => {
                return Err(TreeError::new(ErrorKind::NotFound, "there is no such path").at(path));
            }
            Found::Dir(dir) => way.push((here.len(), dir)),
            Found::File(file)
                if file.stat.kind() == FileKind::Symlink && (follows_last || !todo.is_empty()) =>
            {
                links += 1;
                if links > MOST_LINKS {
                    return Err(fail(
                        ErrorKind::Refused,
                        "too many symbolic links on the way",
                    ));
                }
                let target = file.loc.readlink();
                let target = target.context("can't read the symbolic link", &here)?;
                if target.starts_with(b"/") {
                    way.truncate(1);
                }
                todo.extend(parts(&target).rev().map(<[u8]>::to_vec));
            }
            file @ Found::File(_) => {
                if !todo.is_empty() || path.ends_with(b"/") {
                    return Err(fail(ErrorKind::NotFound, "not a folder on the way"));
                }
                return Ok((here, file));
            }
        }
    }
    way.pop()
        .map(|(end, dir)| {
            here.truncate(end);
            (here, Found::Dir(dir))
        })
        .ok_or_else(|| fail(ErrorKind::Damaged, "no root"))
}

/// The parts of a path that count.
fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && part != b".")
}

/// Of several plain paths those that are below none of the others, sorted.
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
    view.root().context("can't read the root folder", b".")
}

fn lookup(view: &View, dir: &DirNode, part: &[u8], path: &[u8]) -> Result<Found> {
    let name = Name::new(part).context("can't read", path)?;
    view.lookup(dir, &name).context("can't read", path)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use cowl_layers::format::XattrSpace;
    use cowl_layers::layer::Layer;

    use super::*;

    #[test]
    fn paths_are_made_plain() {
        for (path, made) in [
            ("", ""),
            ("/", ""),
            ("a//b/", "a/b"),
            ("./a/./b", "a/b"),
            ("/etc/fstab", "etc/fstab"),
        ] {
            assert_eq!(plain(path.as_bytes()).unwrap(), made.as_bytes());
        }
        assert!(plain(b"a/../b").is_err());
        let paths = ["b", "a/b", "a/b/c", "a/bc", "b/x/y", "b"].map(|p| p.as_bytes().to_vec());
        assert_eq!(topmost(paths.to_vec()), [&b"a/b"[..], b"a/bc", b"b"]);
        assert_eq!(topmost(vec![b"x".to_vec(), Vec::new()]), [b""]);
    }

    #[test]
    fn links_stay_inside() {
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
        let find = |path: &str, last| {
            let found = follow(&view, path.as_bytes(), last);
            found.map(|(path, _)| String::from_utf8(path).unwrap())
        };
        for path in ["lib/x", "/usr/absolute", "usr/twice", "usr/lib/../../lib/x"] {
            assert_eq!(find(path, LastLink::Follow).unwrap(), "usr/lib/x", "{path}");
        }
        assert_eq!(find("usr/twice", LastLink::Keep).unwrap(), "usr/twice");
        assert_eq!(find("lib", LastLink::Keep).unwrap(), "lib");
        assert_eq!(find("lib/", LastLink::Keep).unwrap(), "usr/lib");
        assert_eq!(find("../../..", LastLink::Keep).unwrap(), "");
        let kind = |path: &str| find(path, LastLink::Follow).unwrap_err().kind();
        assert_eq!(kind("loop1"), ErrorKind::Refused);
        for path in ["dangling", "no", "usr/lib/x/y", "usr/lib/x/"] {
            assert_eq!(kind(path), ErrorKind::NotFound, "{path}");
        }
        assert!(matches!(super::at(&view, b"lib/x").unwrap(), Found::Absent));
        assert!(matches!(
            super::at(&view, b"usr/lib/x").unwrap(),
            Found::File(_)
        ));
    }
}
