//! The marks of a layer on their way into another store: checked, and put into the attribute space that
//! the store uses. Pure.

use cowl_layers::format::{NumberMark, OPAQUE, OPAQUE_XATTR_WHITEOUTS, Redirect, XattrSpace};

use super::member::{Member, What};
use crate::tree::attrs::Xattrs;
use crate::tree::error::{ErrorKind, Result, TreeError};

/// The attributes of an object of a layer, and the number that it borrows: that is said anew when all
/// layers are there.
pub(super) fn converted(
    from: XattrSpace,
    to: XattrSpace,
    member: &Member,
    xattrs: Xattrs,
) -> Result<(Xattrs, Option<NumberMark>)> {
    let value = |mark: &str| {
        let found = xattrs.iter().find(|(name, _)| name == mark.as_bytes());
        Ok::<_, std::convert::Infallible>(found.map(|(_, value)| value.clone()))
    };
    let Ok(ours) = from.internal_xattr(value);
    let holds_marks = to == XattrSpace::Trusted || matches!(member.what, What::File | What::Folder);
    let (mut new, mut number) = (Xattrs::new(), None);
    for (name, value) in xattrs {
        let Some(mark) = name.strip_prefix(from.prefix().as_bytes()) else {
            new.push((to.to_disk(&name).into_owned(), value));
            continue;
        };
        let is_ours = ours.is_some_and(|ours| ours.as_bytes() == name);
        if let (Some(shown), false) = (from.to_mount(&name), is_ours) {
            // A user's, who has an overlay of his own.
            new.push((to.to_disk(&shown).into_owned(), value));
            continue;
        }
        if mark == b"cowl.ino" {
            match NumberMark::parse(&value) {
                Ok(Some(mark)) => number = Some(mark),
                // Of a later version, which passes for none.
                Ok(None) => {}
                Err(_) => return Err(wrong(member, mark)),
            }
            continue;
        }
        if !fits(mark, &value, member) {
            return Err(wrong(member, mark));
        }
        if holds_marks {
            new.push(([to.prefix().as_bytes(), mark].concat(), value));
        }
    }
    Ok((new, number))
}

fn wrong(member: &Member, mark: &[u8]) -> TreeError {
    let what = format!(
        "the archive has a mark of the overlay that can't be true: {}",
        mark.escape_ascii()
    );
    TreeError::new(ErrorKind::Refused, what).at(member.path.as_slice())
}

/// Whether an object of this kind may have the mark, and with this value.
fn fits(mark: &[u8], value: &[u8], member: &Member) -> bool {
    let (file, folder) = (member.what == What::File, member.what == What::Folder);
    match mark {
        b"opaque" => folder && (value == OPAQUE || value == OPAQUE_XATTR_WHITEOUTS),
        b"redirect" => (file || folder) && Redirect::parse(value).is_ok(),
        b"metacopy" => file,
        b"whiteout" | b"cowl.node" => file && member.stored == 0,
        b"cowl.nodes" => folder,
        // Others mean nothing to us.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::attrs::Attrs;
    use cowl_layers::sys::attr::SetTime;
    use cowl_layers::sys::stat::Time;

    fn member(what: What) -> Member {
        let time = SetTime::At(Time { secs: 0, nanos: 0 });
        Member {
            path: b"p".to_vec(),
            what,
            attrs: Attrs {
                perm: 0,
                uid: 0,
                gid: 0,
                atime: time,
                mtime: time,
                xattrs: Vec::new(),
            },
            stored: 0,
            sparse: None,
            own: Default::default(),
        }
    }

    fn go(from: XattrSpace, to: XattrSpace, what: What, one: (&str, &[u8])) -> Result<Vec<String>> {
        let xattrs = vec![(one.0.as_bytes().to_vec(), one.1.to_vec())];
        let (new, _) = converted(from, to, &member(what), xattrs)?;
        Ok(new
            .into_iter()
            .map(|(name, _)| String::from_utf8(name).unwrap())
            .collect())
    }

    #[test]
    fn marks_change_their_space_and_users_attributes_keep_theirs() {
        use XattrSpace::{Trusted, User};
        for (from, to, what, (name, value), want) in [
            (
                Trusted,
                User,
                What::Folder,
                ("trusted.overlay.opaque", "y"),
                Some("user.overlay.opaque"),
            ),
            (
                User,
                Trusted,
                What::Folder,
                ("user.overlay.redirect", "/a"),
                Some("trusted.overlay.redirect"),
            ),
            (
                Trusted,
                Trusted,
                What::File,
                ("trusted.overlay.metacopy", ""),
                Some("trusted.overlay.metacopy"),
            ),
            // What can hold no user.* attribute loses a mark that it can do without.
            (
                Trusted,
                User,
                What::Fifo,
                ("trusted.overlay.origin", ""),
                None,
            ),
            // A user's own: the same to the user afterwards.
            (
                Trusted,
                User,
                What::File,
                ("user.overlay.opaque", "y"),
                Some("user.overlay.overlay.opaque"),
            ),
            (
                User,
                Trusted,
                What::File,
                ("user.overlay.overlay.opaque", "y"),
                Some("user.overlay.opaque"),
            ),
            (
                Trusted,
                Trusted,
                What::File,
                ("trusted.overlay.overlay.x", ""),
                Some("trusted.overlay.overlay.x"),
            ),
            (
                Trusted,
                User,
                What::File,
                ("security.capability", "c"),
                Some("security.capability"),
            ),
        ] {
            let got = go(from, to, what, (name, value.as_bytes())).unwrap();
            assert_eq!(got, Vec::from_iter(want), "{name}");
        }
    }

    #[test]
    fn marks_that_lie_are_refused() {
        let space = XattrSpace::Trusted;
        for (what, name, value) in [
            (
                What::Symlink(b"x".to_vec()),
                "trusted.overlay.redirect",
                "/a",
            ),
            (What::Symlink(b"x".to_vec()), "trusted.overlay.opaque", "y"),
            (What::File, "trusted.overlay.opaque", "y"),
            (What::Folder, "trusted.overlay.opaque", "yes"),
            (What::Folder, "trusted.overlay.redirect", "/a/../.."),
            (What::Folder, "trusted.overlay.redirect", "a/b"),
            (What::Folder, "trusted.overlay.redirect", ""),
            (What::Folder, "trusted.overlay.metacopy", ""),
            (What::Fifo, "trusted.overlay.whiteout", ""),
            (What::Folder, "trusted.overlay.cowl.ino", ""),
        ] {
            let got = go(space, space, what, (name, value.as_bytes()));
            assert_eq!(
                got.unwrap_err().kind(),
                ErrorKind::Refused,
                "{name}={value}"
            );
        }
    }
}
