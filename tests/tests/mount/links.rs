//! As many hard links as the base allows, and no more.

use cowl_tests::conditions::{Need, can};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;
use std::os::unix::fs::MetadataExt;

/// The maximum on ext4 (its EXT4_LINK_MAX). Other file systems allow more; this number is tested there, too.
const MANY: u64 = 65_000;

#[test]
fn the_link_limit_of_the_layer_applies() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let scratch = Scratch::new("link-max");
    let path = |name: &str| scratch.join(name);
    for name in ["lower", "upper", "work", "plain", "m"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::fs::write(path("lower/file"), b"text").unwrap();
    let stack = Stack {
        lowers: vec![path("lower")],
        upper: Some((path("upper"), path("work"))),
    };
    let mount = Overlay::cowlfs(&stack, &path("m"), "volatile");
    std::fs::write(path("plain/file"), b"text").unwrap();
    let fill = |dir: &str| {
        let first = path(dir).join("file");
        for number in 1..MANY {
            std::fs::hard_link(&first, path(dir).join(number.to_string())).unwrap();
        }
        let more = std::fs::hard_link(&first, path(dir).join("more"));
        (
            more.map_err(|error| error.raw_os_error()),
            std::fs::metadata(&first).unwrap().nlink(),
        )
    };
    assert_eq!(fill("m"), fill("plain"));
    std::fs::remove_file(path("m/1")).unwrap();
    std::fs::hard_link(path("m/file"), path("m/again")).unwrap();
    mount.unmount();
}
