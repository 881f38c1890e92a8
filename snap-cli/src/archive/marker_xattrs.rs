//! Converts the marker xattrs of a layer for import into another store. No I/O.
//!
//! The markers are validated, and renamed to the xattr namespace that the store uses.

use cowl_layers::format::{InodeNumberXattr, OPAQUE, OPAQUE_XATTR_WHITEOUTS, Redirect, XattrSpace};

use super::member::{EntryKind, Member};
use crate::tree::attrs::Xattrs;
use crate::tree::error::{ErrorKind, Result, TreeError};
use cowl_layers::shown::Show as _;

/// Converts the xattrs of an object of a layer from one xattr namespace to another.
///
/// The inode number that the object borrowed is returned separately: its xattr is set after all layers are unpacked,
/// because it refers to an inode of another layer.
pub(super) fn convert(
    from: XattrSpace,
    to: XattrSpace,
    member: &Member,
    xattrs: Xattrs,
) -> Result<(Xattrs, Option<InodeNumberXattr>)> {
    let value = |mark: &str| {
        let found = xattrs.iter().find(|(name, _)| name == mark.as_bytes());
        Ok::<_, std::convert::Infallible>(found.map(|(_, value)| value.clone()))
    };
    let Ok(ours) = from.internal_xattr(value);
    let holds_marks =
        to == XattrSpace::Trusted || matches!(member.kind, EntryKind::File | EntryKind::Directory);
    let (mut new, mut number) = (Xattrs::new(), None);
    for (name, value) in xattrs {
        let Some(mark) = name.strip_prefix(from.prefix().as_bytes()) else {
            new.push((to.to_disk(&name).into_owned(), value));
            continue;
        };
        let is_ours = ours.is_some_and(|ours| ours.as_bytes() == name);
        if let (Some(shown), false) = (from.to_mount(&name), is_ours) {
            // Not a marker of cowl, but an xattr of a nested overlay inside the container.
            new.push((to.to_disk(&shown).into_owned(), value));
            continue;
        }
        if mark == b"cowl.ino" {
            match InodeNumberXattr::parse(&value) {
                Ok(Some(mark)) => number = Some(mark),
                // A later version of the format: ignored, as by a mount.
                Ok(None) => {}
                Err(_) => return Err(invalid(member, mark)),
            }
            continue;
        }
        if name == from.recorded().as_bytes() {
            // An export contains the recorded attributes themselves.
            continue;
        }
        if !is_valid(mark, &value, member) {
            return Err(invalid(member, mark));
        }
        if holds_marks {
            new.push(([to.prefix().as_bytes(), mark].concat(), value));
        }
    }
    Ok((new, number))
}

fn invalid(member: &Member, mark: &[u8]) -> TreeError {
    let what = format!(
        "the archive has an invalid marker xattr of the overlay: {}",
        mark.shown()
    );
    TreeError::new(ErrorKind::Refused, what).at(member.path.as_slice())
}

/// Returns whether an object of this kind can have the marker, and with this value.
fn is_valid(mark: &[u8], value: &[u8], member: &Member) -> bool {
    let (is_file, is_dir) = (
        member.kind == EntryKind::File,
        member.kind == EntryKind::Directory,
    );
    match mark {
        b"opaque" => is_dir && (value == OPAQUE || value == OPAQUE_XATTR_WHITEOUTS),
        b"redirect" => (is_file || is_dir) && Redirect::parse(value).is_ok(),
        b"metacopy" => is_file,
        b"whiteout" | b"cowl.node" => is_file && member.stored == 0,
        b"cowl.nodes" => is_dir,
        // Other names have no effect in a mount.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::attrs::Attrs;
    use cowl_layers::sys::attr::SetTime;
    use cowl_layers::sys::stat::Time;

    fn member(kind: EntryKind) -> Member {
        let time = SetTime::At(Time { secs: 0, nanos: 0 });
        Member {
            path: b"p".to_vec(),
            kind,
            attrs: Attrs {
                perm: 0,
                uid: 0,
                gid: 0,
                atime: time,
                mtime: time,
                xattrs: Vec::new(),
            },
            named_acls: Vec::new(),
            omitted: Vec::new(),
            stored: 0,
            sparse: None,
            cowl: Default::default(),
        }
    }

    fn convert_one(
        from: XattrSpace,
        to: XattrSpace,
        kind: EntryKind,
        one: (&str, &[u8]),
    ) -> Result<Vec<String>> {
        let xattrs = vec![(one.0.as_bytes().to_vec(), one.1.to_vec())];
        let (new, _) = convert(from, to, &member(kind), xattrs)?;
        Ok(new
            .into_iter()
            .map(|(name, _)| String::from_utf8(name).unwrap())
            .collect())
    }

    #[test]
    fn markers_change_namespace_and_xattrs_of_nested_overlays_do_not() {
        use XattrSpace::{Trusted, User};
        for (from, to, kind, (name, value), want) in [
            (
                Trusted,
                User,
                EntryKind::Directory,
                ("trusted.overlay.opaque", "y"),
                Some("user.overlay.opaque"),
            ),
            (
                User,
                Trusted,
                EntryKind::Directory,
                ("user.overlay.redirect", "/a"),
                Some("trusted.overlay.redirect"),
            ),
            (
                Trusted,
                Trusted,
                EntryKind::File,
                ("trusted.overlay.metacopy", ""),
                Some("trusted.overlay.metacopy"),
            ),
            // An object that cannot have user.* xattrs loses an optional marker.
            (
                Trusted,
                User,
                EntryKind::Fifo,
                ("trusted.overlay.origin", ""),
                None,
            ),
            // An export contains the recorded attributes, so an archive with a record is not one of cowl.
            (
                Trusted,
                User,
                EntryKind::File,
                ("trusted.overlay.cowl.recorded", ""),
                None,
            ),
            // An xattr of a nested overlay looks the same inside the container afterwards.
            (
                Trusted,
                User,
                EntryKind::File,
                ("user.overlay.opaque", "y"),
                Some("user.overlay.overlay.opaque"),
            ),
            (
                User,
                Trusted,
                EntryKind::File,
                ("user.overlay.overlay.opaque", "y"),
                Some("user.overlay.opaque"),
            ),
            (
                Trusted,
                Trusted,
                EntryKind::File,
                ("trusted.overlay.overlay.x", ""),
                Some("trusted.overlay.overlay.x"),
            ),
            (
                Trusted,
                User,
                EntryKind::File,
                ("security.capability", "c"),
                Some("security.capability"),
            ),
        ] {
            let got = convert_one(from, to, kind, (name, value.as_bytes())).unwrap();
            assert_eq!(got, Vec::from_iter(want), "{name}");
        }
    }

    #[test]
    fn invalid_markers_are_refused() {
        let space = XattrSpace::Trusted;
        for (kind, name, value) in [
            (
                EntryKind::Symlink(b"x".to_vec()),
                "trusted.overlay.redirect",
                "/a",
            ),
            (
                EntryKind::Symlink(b"x".to_vec()),
                "trusted.overlay.opaque",
                "y",
            ),
            (EntryKind::File, "trusted.overlay.opaque", "y"),
            (EntryKind::Directory, "trusted.overlay.opaque", "yes"),
            (EntryKind::Directory, "trusted.overlay.redirect", "/a/../.."),
            (EntryKind::Directory, "trusted.overlay.redirect", "a/b"),
            (EntryKind::Directory, "trusted.overlay.redirect", ""),
            (EntryKind::Directory, "trusted.overlay.metacopy", ""),
            (EntryKind::Fifo, "trusted.overlay.whiteout", ""),
            (EntryKind::Directory, "trusted.overlay.cowl.ino", ""),
        ] {
            let got = convert_one(space, space, kind, (name, value.as_bytes()));
            assert_eq!(
                got.unwrap_err().kind(),
                ErrorKind::Refused,
                "{name}={value}"
            );
        }
    }
}
