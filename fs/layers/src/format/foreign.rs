//! Markers of fuse-overlayfs and of container image layers, which are file names instead of xattrs. Pure.

/// The prefix of a whiteout; the hidden name follows.
const PREFIX: &[u8] = b".wh.";
/// The prefix of markers that are not whiteouts: `.wh..wh..opq` and AUFS's metadata.
const PREFIX_OF_PREFIX: &[u8] = b".wh..wh.";
/// The name of a file that makes its directory opaque.
pub const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// The xattr that makes a directory opaque if its value is `y`.
pub const OPAQUE_XATTR: &[u8] = b"user.fuseoverlayfs.opaque";
/// The prefix of fuse-overlayfs's xattrs.
const XATTR_PREFIX: &[u8] = b"user.fuseoverlayfs.";
/// The maximum length of a name.
const NAME_MAX: usize = 255;

/// Whether a file name is a marker.
pub fn is_marker(name: &[u8]) -> bool {
    name.starts_with(PREFIX)
}

/// Whether an xattr belongs to fuse-overlayfs.
pub fn is_marker_xattr(name: &[u8]) -> bool {
    name.starts_with(XATTR_PREFIX)
}

/// Returns the name of the whiteout that hides `name`.
///
/// Returns `None` if it would be longer than NAME_MAX, or if `name` is itself a marker.
pub fn whiteout_name(name: &[u8]) -> Option<Vec<u8>> {
    let whiteout = [PREFIX, name].concat();
    (whiteout.len() <= NAME_MAX && !is_marker(name)).then_some(whiteout)
}

/// Returns the name that a whiteout hides; `None` for any other name.
pub fn hidden_name(marker: &[u8]) -> Option<&[u8]> {
    if marker.starts_with(PREFIX_OF_PREFIX) {
        return None;
    }
    let name = marker.strip_prefix(PREFIX)?;
    (!matches!(name, b"" | b"." | b"..")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_marker_names_are_parsed() {
        assert_eq!(whiteout_name(b"a").unwrap(), b".wh.a");
        assert_eq!(hidden_name(b".wh.a"), Some(&b"a"[..]));
        for nothing in [
            OPAQUE_NAME,
            b".wh.",
            b".wh..",
            b".wh...",
            b"a",
            b".wh..wh.x",
        ] {
            assert_eq!(hidden_name(nothing), None, "{nothing:?}");
        }
        assert_eq!(whiteout_name(&[b'n'; 252]), None);
        assert!(whiteout_name(&[b'n'; 251]).is_some());
        assert_eq!(whiteout_name(b".wh.a"), None);
        assert!(is_marker_xattr(OPAQUE_XATTR) && !is_marker_xattr(b"user.fuse"));
    }
}
