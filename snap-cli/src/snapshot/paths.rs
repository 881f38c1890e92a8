//! The paths that a user asks to restore.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use cowl_layers::shown::Show as _;
use cowl_layers::view::{Found, View};

use crate::delta::revert::Scope;
use crate::error::{Error, Result};
use crate::store::name::nearest;
use crate::tree::find::find;
use crate::tree::path::{join, split};
use crate::tree::walk::list_children;

/// The paths that a user may ask to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedPaths {
    /// Paths that exist in the snapshot.
    InSnapshot,
    /// Paths that exist in the snapshot or now; those that exist only now are removed.
    InEither,
}

/// Normalizes paths to the form that views use: without a leading slash and without empty components.
pub fn parse_scope(paths: &[OsString]) -> Result<Scope> {
    let mut clean = Vec::new();
    for path in paths {
        let mut out = Vec::new();
        for part in path.as_bytes().split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    return Err(Error::usage(format!(
                        "invalid path {}: it contains \"..\"",
                        path.shown()
                    )));
                }
                part => out = join(&out, part),
            }
        }
        if path.is_empty() {
            return Err(Error::usage("invalid path: it is empty"));
        }
        clean.push(out);
    }
    // The root includes all other paths.
    if clean.iter().any(Vec::is_empty) {
        clean.clear();
    }
    Ok(Scope(clean))
}

/// Fails if a path of the scope cannot be restored.
pub fn check_paths(scope: &Scope, old: &View, new: &View, allowed: AllowedPaths) -> Result<()> {
    for path in &scope.0 {
        if has_path(old, path)? {
            continue;
        }
        let shown = format!("/{}", path.shown());
        if has_path(new, path)? {
            if allowed == AllowedPaths::InEither {
                continue;
            }
            return Err(Error::not_found(format!(
                "{shown} did not exist then: restoring it would remove it"
            ))
            .hint("add --delete to remove it"));
        }
        let error = Error::not_found(format!(
            "{shown} exists neither in the snapshot nor in the current state"
        ));
        return Err(match hint(old, new, path)? {
            Some(hint) => error.hint(hint),
            None => error,
        });
    }
    Ok(())
}

fn has_path(view: &View, path: &[u8]) -> Result<bool> {
    Ok(!matches!(
        find(view, path)?,
        Found::Absent | Found::Whiteout
    ))
}

/// Returns a hint on a path that does not exist: the ancestor that is not a directory, or a similar name.
fn hint(old: &View, new: &View, path: &[u8]) -> Result<Option<String>> {
    let (mut above, mut name) = split(path);
    loop {
        match find(old, above)? {
            Found::File(_) => {
                return Ok(Some(format!(
                    "/{} is not a directory; if it is a symbolic link, use the path of its target",
                    above.shown()
                )));
            }
            Found::Dir(_) => break,
            Found::Absent | Found::Whiteout if above.is_empty() => return Ok(None),
            Found::Absent | Found::Whiteout => (above, name) = split(above),
        }
    }
    let mut names = Vec::new();
    for view in [old, new] {
        if let Found::Dir(dir) = find(view, above)? {
            for (path, _) in list_children(view, &dir, above)? {
                names.extend(std::str::from_utf8(split(&path).1).map(str::to_owned));
            }
        }
    }
    let near = std::str::from_utf8(name)
        .map(|name| nearest(name, names.iter().map(String::as_str)).map(str::to_owned));
    Ok(near.unwrap_or_default().map(|near| {
        let path = join(above, near.as_bytes());
        format!("did you mean /{}?", path.shown())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalized() {
        let parse =
            |paths: &[&str]| parse_scope(&paths.iter().map(OsString::from).collect::<Vec<_>>());
        let clean = parse(&["/etc//x/", "./a/./b"]).unwrap();
        assert_eq!(clean.0, [b"etc/x".to_vec(), b"a/b".to_vec()]);
        assert!(parse(&["/", "a"]).unwrap().is_all());
        assert!(
            clean.contains(b"etc/x/y") && !clean.contains(b"etc/xy") && !clean.contains(b"etc")
        );
        assert!(parse(&["a/../b"]).is_err() && parse(&[""]).is_err());
    }
}
