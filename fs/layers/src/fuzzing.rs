//! The fuzz target for the on-disk format, and the replay of the corpus of any target. Not part of the programs.
//!
//! A target gets any bytes, and panics if a property of the parser does not hold. `cargo xtask fuzz` runs targets; the
//! inputs in `tests/fuzz/corpus` are replayed by tests of the crates that contain them.

use std::path::Path;

use crate::format::{InodeNumberXattr, Redirect, XattrSpace, foreign, origin};
use crate::layer::{LayerObject, RecordedAttributes};
use crate::name::Name;
use crate::shown::Show as _;
use crate::sys::stat::Stat;
use crate::view::resolve::{Fold, NextPath};

/// Runs a target on each file of its corpus, and panics if there is none.
#[allow(clippy::expect_used, reason = "tests")]
pub fn replay(name: &str, target: fn(&[u8])) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus");
    let dir = top.join(name);
    let mut count = 0;
    for entry in std::fs::read_dir(&dir).expect("the corpus of the target") {
        let path = entry.expect("an entry of the corpus").path();
        let data = std::fs::read(&path).expect("an input of the corpus");
        let done = std::panic::catch_unwind(|| target(&data));
        assert!(done.is_ok(), "{} fails", path.shown());
        count += 1;
    }
    assert!(count > 0, "{} is empty", dir.shown());
}

/// Parses the values and names of markers, and follows a chain of them through layers.
///
/// A path from a marker is one in the layer: it has no component that is empty, `.` or `..`. Values and names survive a
/// round trip.
pub fn markers(data: &[u8]) {
    names(data);
    if let Ok(Some(number)) = InodeNumberXattr::parse(data) {
        assert_eq!(number.to_value(), data);
    }
    if let Ok(record) = RecordedAttributes::parse(data) {
        assert_eq!(record.to_value().as_deref(), Some(data));
        assert!(!record.apply(&Stat::default()).stat.is_whiteout_device());
    }
    let Ok(name) = Name::new(b"name") else {
        return;
    };
    let mut fold = Fold::new(name);
    for part in data.split(|&byte| byte == b'\n') {
        let Some((&kind, value)) = part.split_first() else {
            continue;
        };
        let redirect = Redirect::parse(value).ok();
        if let Some(redirect) = &redirect {
            assert_eq!(Redirect::parse(&redirect.to_value()).as_ref(), Ok(redirect));
        }
        let seen = match kind % 5 {
            0 => LayerObject::Absent,
            1 => LayerObject::Whiteout,
            2 | 3 => LayerObject::Dir {
                opaque: kind % 5 == 3,
                redirect,
            },
            _ => LayerObject::File {
                metacopy: kind > 128,
                redirect,
            },
        };
        fold.step(&seen);
        match fold.target() {
            None => return,
            Some(NextPath::InParent(name)) => assert!(Name::new(name).is_ok()),
            Some(NextPath::Path(path)) => {
                let is_name = |part: &[u8]| Name::new(part).is_ok();
                assert!(path.split(|&byte| byte == b'/').all(is_name), "{path:?}");
            }
        }
    }
}

/// Checks the names of xattrs and of fuse-overlayfs's markers.
fn names(data: &[u8]) {
    for space in [XattrSpace::Trusted, XattrSpace::User] {
        let disk = space.to_disk(data);
        assert_eq!(space.to_mount(&disk).as_deref(), Some(data));
        if let Some(shown) = space.to_mount(data) {
            assert_eq!(*space.to_disk(&shown), *data);
        } else {
            assert!(data.starts_with(space.prefix().as_bytes()));
        }
        let value = |_: &str| Ok::<_, ()>(Some(data.to_vec()));
        assert!(space.internal_xattr(value).is_ok_and(|name| name.is_some()));
    }
    if let Some(hidden) = foreign::hidden_name(data) {
        assert!(foreign::is_marker(data));
        let whiteout = foreign::whiteout_name(hidden);
        assert!(whiteout.is_none_or(|whiteout| whiteout == data));
    }
    if let Some((_, handle)) = origin::handle_of_entry(data) {
        assert!(handle.len() <= data.len() / 2);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_is_replayed() {
        super::replay("markers", super::markers);
    }
}
