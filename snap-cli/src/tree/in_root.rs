//! Resolution of paths in a tree that is being created, within its root.
//!
//! Symbolic links in the directories of a path are followed as by openat2(2) with RESOLVE_IN_ROOT: an absolute target
//! begins at the root of the tree, and `..` stays there. The result contains no symbolic links, and it is opened without
//! following any, so that a wrong result could not lead outside either.

use super::dir_cursor::{DirCursor, Obstacle};
use super::error::Result;
use super::path;

/// The maximum number of symbolic links in a path, as for the kernel.
const MAX_LINKS: usize = 40;

/// The maximum number of symbolic links in a path, and of `..` after other components in their targets.
const MAX_STEPS: usize = 2 * MAX_LINKS;

/// A path whose directories were resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resolved {
    /// The path without symbolic links.
    Path(Vec<u8>),
    /// Such a path, of which a directory is another kind of file.
    NotADirectory(Vec<u8>),
    /// The path has too many symbolic links.
    TooManyLinks,
}

/// The result of an attempt to create a path that does not exist in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    /// All directories of the path that exist in the other tree were created.
    Directories,
    /// A symbolic link was created, which the caller must follow.
    Link,
    /// Nothing was created: in the other tree, one of the directories is not a directory.
    NotADirectory,
}

/// Resolves the directories of a normalized path. The last component is not followed.
///
/// Directories that do not exist are retained in the result, because they may be created.
pub(crate) fn resolve(dirs: &mut DirCursor, path: &[u8]) -> Result<Resolved> {
    resolve_with(dirs, path, &mut |_, _| Ok(Created::Directories))
}

/// Resolves the directories of a normalized path in a tree that is a part of another one: `create` is called with each
/// path that does not exist here, and may create it. So `..` after a symbolic link leads to where it does in the other
/// tree.
pub(crate) fn resolve_with(
    dirs: &mut DirCursor,
    path: &[u8],
    create: &mut dyn FnMut(&mut DirCursor, &[u8]) -> Result<Created>,
) -> Result<Resolved> {
    let (parent, name) = path::split(path);
    let mut resolved = parent.to_vec();
    // The components that follow `resolved`, not normalized.
    let mut rest = Vec::new();
    let (mut links, mut steps) = (0, 0);
    let mut blocked = false;
    loop {
        match dirs.reach(&resolved)? {
            Some(Obstacle::Link { start, end, target }) => {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(Resolved::TooManyLinks);
                }
                let behind = resolved.get(end..).unwrap_or_default();
                rest = [target.as_slice(), b"/", behind, b"/", &rest].concat();
                resolved.truncate(match target.first() {
                    Some(b'/') => 0,
                    _ => start.saturating_sub(1),
                });
            }
            Some(Obstacle::NotADirectory) => blocked = true,
            Some(Obstacle::Missing) => match create(dirs, &resolved)? {
                // There are at most as many links as a path may have.
                Created::Link => continue,
                Created::NotADirectory => blocked = true,
                Created::Directories => {}
            },
            None => {}
        }
        if !append(&mut resolved, &mut rest) {
            let path = path::join(&resolved, name);
            return Ok(match blocked {
                true => Resolved::NotADirectory(path),
                false => Resolved::Path(path),
            });
        }
        steps += 1;
        if steps > MAX_STEPS {
            return Ok(Resolved::TooManyLinks);
        }
    }
}

/// Moves components from `rest` to `resolved`, and returns whether there were any.
///
/// Stops at `..` after another component, because that may be a symbolic link.
fn append(resolved: &mut Vec<u8>, rest: &mut Vec<u8>) -> bool {
    let (mut moved, mut any) = (0, false);
    for component in rest.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if any => break,
            b".." => resolved.truncate(path::split(resolved).0.len()),
            name => {
                if !resolved.is_empty() {
                    resolved.push(b'/');
                }
                resolved.extend_from_slice(name);
                any = true;
            }
        }
        moved += component.len() + 1;
    }
    rest.drain(..moved.min(rest.len()));
    any
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowl_layers::sys::dir;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_resolved_within_the_root() {
        let top = tempfile::tempdir().unwrap();
        let at = |path: &str| top.path().join(path);
        for dir in ["usr/bin", "a/b/c", "outside"] {
            fs::create_dir_all(at(dir)).unwrap();
        }
        fs::write(at("file"), "").unwrap();
        for (target, link) in [
            ("usr/bin", "bin"),
            ("/usr", "absolute"),
            ("../../../../../../usr", "a/up"),
            ("/../../usr", "above"),
            ("b/c", "a/inner"),
            ("inner/../x", "a/through"),
            ("no/../b", "a/missing"),
            (".", "here"),
            ("bin", "twice"),
            ("loop", "loop"),
            ("file/x", "under-file"),
            ("b/./c/", "a/dotted"),
        ] {
            symlink(target, at(link)).unwrap();
        }
        let mut dirs = DirCursor::new(dir::open_root(top.path()).unwrap());
        for (path, want) in [
            ("f", "f"),
            ("usr/bin/f", "usr/bin/f"),
            ("bin/f", "usr/bin/f"),
            ("bin/new/f", "usr/bin/new/f"),
            ("absolute/bin/f", "usr/bin/f"),
            ("a/up/bin/f", "usr/bin/f"),
            ("above/bin/f", "usr/bin/f"),
            ("a/inner/f", "a/b/c/f"),
            // The kernel resolves `inner` before `..`.
            ("a/through/f", "a/b/x/f"),
            ("a/missing/f", "a/b/f"),
            ("here/here/here/f", "f"),
            ("twice/f", "usr/bin/f"),
            ("a/dotted/f", "a/b/c/f"),
            ("bin", "bin"),
            ("", ""),
        ] {
            let got = resolve(&mut dirs, path.as_bytes()).unwrap();
            assert_eq!(got, Resolved::Path(want.into()), "{path}");
        }
        for path in ["loop/f".to_owned(), format!("{}f", "here/".repeat(41))] {
            let got = resolve(&mut dirs, path.as_bytes()).unwrap();
            assert_eq!(got, Resolved::TooManyLinks);
        }
        let most = "here/".repeat(40);
        let got = resolve(&mut dirs, most.as_bytes()).unwrap();
        assert!(matches!(got, Resolved::Path(_)));
        for (path, want) in [
            ("under-file/f", "file/x/f"),
            ("file/f", "file/f"),
            ("file/d/f", "file/d/f"),
        ] {
            let got = resolve(&mut dirs, path.as_bytes()).unwrap();
            assert_eq!(got, Resolved::NotADirectory(want.into()), "{path}");
        }
    }
}
