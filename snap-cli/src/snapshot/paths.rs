//! Paths that somebody names to have them put back.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use cowl_layers::view::{Found, View};

use crate::delta::revert::Scope;
use crate::error::{Error, Result};
use crate::store::name::nearest;
use crate::tree::find::find;
use crate::tree::path::{join, split};
use crate::tree::walk::list_children;

/// Which paths may be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Those that were there.
    WhatWasThere,
    /// Those that were there, or are there now and are to go.
    WhatIsThereNow,
}

/// The paths as the states have them: no leading slash, nothing empty in between.
pub fn scope(paths: &[OsString]) -> Result<Scope> {
    let mut clean = Vec::new();
    for path in paths {
        let mut out = Vec::new();
        for part in path.as_bytes().split(|&byte| byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    return Err(Error::usage(format!(
                        "{path:?} leads upwards: a path begins at the container's root"
                    )));
                }
                part => out = join(&out, part),
            }
        }
        if path.is_empty() {
            return Err(Error::usage("an empty path names nothing"));
        }
        clean.push(out);
    }
    // The root is everything.
    if clean.iter().any(Vec::is_empty) {
        clean.clear();
    }
    Ok(Scope(clean))
}

/// Refuses paths that name nothing that could be put back.
pub fn check(scope: &Scope, old: &View, new: &View, only: Only) -> Result<()> {
    for path in &scope.0 {
        if is_there(old, path)? {
            continue;
        }
        let shown = format!("/{}", path.escape_ascii());
        if is_there(new, path)? {
            if only == Only::WhatIsThereNow {
                continue;
            }
            return Err(Error::not_found(format!(
                "{shown} was not there then: putting it back would remove it"
            ))
            .hint("if it is to be removed, add --delete"));
        }
        let error = Error::not_found(format!("there is no {shown}, neither then nor now"));
        return Err(match hint(old, new, path)? {
            Some(hint) => error.hint(hint),
            None => error,
        });
    }
    Ok(())
}

fn is_there(view: &View, path: &[u8]) -> Result<bool> {
    Ok(!matches!(
        find(view, path)?,
        Found::Absent | Found::Whiteout
    ))
}

/// The link that leads the path astray, or the name that was meant.
fn hint(old: &View, new: &View, path: &[u8]) -> Result<Option<String>> {
    let (mut above, mut name) = split(path);
    loop {
        match find(old, above)? {
            Found::File(_) => {
                return Ok(Some(format!(
                    "/{} is no folder; if it is a link, name the path that it leads to",
                    above.escape_ascii()
                )));
            }
            Found::Dir(_) => break,
            Found::Absent | Found::Whiteout if above.is_empty() => return Ok(None),
            Found::Absent | Found::Whiteout => (above, name) = split(above),
        }
    }
    let mut known = Vec::new();
    for view in [old, new] {
        if let Found::Dir(dir) = find(view, above)? {
            for (path, _) in list_children(view, &dir, above)? {
                known.extend(std::str::from_utf8(split(&path).1).map(str::to_owned));
            }
        }
    }
    let near = std::str::from_utf8(name)
        .map(|name| nearest(name, known.iter().map(String::as_str)).map(str::to_owned));
    Ok(near.unwrap_or_default().map(|near| {
        let meant = join(above, near.as_bytes());
        format!("did you mean /{}?", meant.escape_ascii())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_one_form() {
        let scope = |paths: &[&str]| scope(&paths.iter().map(OsString::from).collect::<Vec<_>>());
        let clean = scope(&["/etc//x/", "./a/./b"]).unwrap();
        assert_eq!(clean.0, [b"etc/x".to_vec(), b"a/b".to_vec()]);
        assert!(scope(&["/", "a"]).unwrap().is_all());
        assert!(
            clean.contains(b"etc/x/y") && !clean.contains(b"etc/xy") && !clean.contains(b"etc")
        );
        assert!(scope(&["a/../b"]).is_err() && scope(&[""]).is_err());
    }
}
