//! Marks of fuse-overlayfs and of tar layers, which are names instead of attributes. Pure.

/// Stands before the name that is hidden.
const PREFIX: &[u8] = b".wh.";
/// Every name that begins so is a mark about its folder or about nothing.
const PREFIX_OF_PREFIX: &[u8] = b".wh..wh.";
/// In a folder: it hides what lies below it.
pub const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// On a folder, with the value `y`: the same.
pub const OPAQUE_ATTRIBUTE: &[u8] = b"user.fuseoverlayfs.opaque";
/// fuse-overlayfs's own attributes.
const ATTRIBUTES: &[u8] = b"user.fuseoverlayfs.";
/// The longest name.
const NAME_MAX: usize = 255;

/// Whether a name is a mark.
pub fn is_mark(name: &[u8]) -> bool {
    name.starts_with(PREFIX)
}

/// Whether an attribute is fuse-overlayfs's own.
pub fn is_attribute(name: &[u8]) -> bool {
    name.starts_with(ATTRIBUTES)
}

/// The name that hides `name`; `None` where it would be too long to exist.
pub fn whiteout_name(name: &[u8]) -> Option<Vec<u8>> {
    let mark = [PREFIX, name].concat();
    (mark.len() <= NAME_MAX && !is_mark(name)).then_some(mark)
}

/// The name that a mark hides, if it hides one.
pub fn hidden_name(mark: &[u8]) -> Option<&[u8]> {
    if mark.starts_with(PREFIX_OF_PREFIX) {
        return None;
    }
    let name = mark.strip_prefix(PREFIX)?;
    (!matches!(name, b"" | b"." | b"..")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_their_marks() {
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
        assert!(is_attribute(OPAQUE_ATTRIBUTE) && !is_attribute(b"user.fuse"));
    }
}
