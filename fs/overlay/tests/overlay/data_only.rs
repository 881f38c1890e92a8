//! Data-only layers.
//!
//! Their names are not visible, but a metacopy with an absolute redirect finds its content there. composefs and image
//! stores keep content by digest in this way.

use std::path::Path;

use crate::common::{Lab, create_files, set_xattr, spaces};
use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;

fn metacopy(path: &Path, space: XattrSpace, size: u64, redirect: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
    set_xattr(path, space.metacopy(), b"");
    set_xattr(path, space.redirect(), redirect);
}

#[test]
fn metacopy_finds_content_in_data_only_layers() {
    for &space in spaces() {
        let data = tempfile::tempdir().unwrap();
        let (one, two) = (data.path().join("1"), data.path().join("2"));
        for layer in [&one, &two] {
            std::fs::create_dir_all(layer.join("objects/ab")).unwrap();
        }
        std::fs::write(one.join("objects/ab/cd"), b"first").unwrap();
        std::fs::write(two.join("objects/ab/cd"), b"hidden").unwrap();
        std::fs::write(two.join("objects/ab/ef"), b"second").unwrap();
        std::fs::write(two.join("sibling"), b"by name").unwrap();
        std::os::unix::fs::symlink("ab", two.join("objects/link")).unwrap();
        // Markers have no meaning in a data-only layer.
        set_xattr(&two.join("objects"), space.opaque(), b"y");
        let lab = Lab::new(|top| create_files(top, &["plain"]));
        lab.add_lower(|top| {
            metacopy(&top.join("d/a"), space, 5, b"/objects/ab/cd");
            metacopy(&top.join("b"), space, 6, b"/objects/ab/ef");
            metacopy(&top.join("sibling"), space, 7, b"sibling");
            metacopy(&top.join("link"), space, 6, b"/objects/link/ef");
            metacopy(&top.join("directory"), space, 6, b"/objects/ab");
            metacopy(&top.join("nowhere"), space, 6, b"/objects/zz");
        });
        let lab = lab.in_space(space);
        let layers = [one.as_path(), two.as_path()];
        let fs = lab.open_over_data(&layers);
        assert_eq!(fs.read("d/a").unwrap(), b"first");
        assert_eq!(fs.read("b").unwrap(), b"second");
        // A relative redirect does not refer to data-only layers, and the content must be a regular file.
        for damaged in ["sibling", "link", "directory", "nowhere"] {
            assert_eq!(fs.read(damaged), Err(Errno::IO), "{damaged}");
        }
        assert_eq!(fs.read("objects/ab/cd"), Err(Errno::NOENT));
        fs.append("b", b"!").unwrap();
        fs.chmod("d/a", 0o600).unwrap();
        fs.rename("d", "e").unwrap();
        fs.rename("e/a", "a").unwrap();
        lab.push(&fs).unwrap();
        assert_eq!(fs.read("a").unwrap(), b"first");
        drop(fs);
        let fs = lab.open_over_data(&layers);
        assert_eq!(fs.read("a").unwrap(), b"first");
        assert_eq!(fs.read("b").unwrap(), b"second!");
        assert_eq!(std::fs::read(two.join("objects/ab/ef")).unwrap(), b"second");
    }
}
