//! Directories that are read ahead for a program that walks the tree.

use std::path::Path;

use crate::common::{Fs, Lab, create_files};
use cowl_layers::name::Name;

fn lab() -> Lab {
    Lab::new(|top| {
        for dir in ["a", "b", "c", "d"] {
            create_files(
                top,
                &["f", "g", "sub/h"].map(|file| format!("{dir}/{file}")),
            );
        }
    })
}

/// Lists the root and its first subdirectory, so that the second one, which is returned, is read ahead.
fn walk(fs: &Fs) -> String {
    let entries = fs.entries(&fs.find("").unwrap());
    let names = entries
        .iter()
        .map(|entry| String::from_utf8(entry.name.to_vec()).unwrap());
    let dirs: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    for dir in ["", "/sub"] {
        fs.names(&format!("{}{dir}", dirs[0])).unwrap();
    }
    dirs[1].clone()
}

#[test]
fn a_walk_finds_its_next_directory_resolved() {
    let lab = lab();
    let fs = lab.open();
    let next = walk(&fs);
    let held = fs.find(&next);
    // Only a cache can still contain the names. (A lower layer must not be changed otherwise.)
    let dir = lab.lower().join(&next);
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::create_dir(&dir).unwrap();
    let inode = held.unwrap();
    let op = fs.overlay.begin();
    let mut found = Vec::new();
    for entry in op
        .listing(&inode, 0)
        .unwrap()
        .iter()
        .filter(|entry| !entry.is_dots())
    {
        assert!(op.lookup_attr(&inode, entry.name()).unwrap().is_some());
        found.push(entry.name().to_vec());
    }
    found.sort();
    assert_eq!(found, [&b"f"[..], b"g", b"sub"]);
    // Each result is used once.
    let name = Name::new("f").unwrap();
    assert!(op.lookup_attr(&inode, &name).is_err());
}

#[test]
fn changes_since_a_directory_was_read_ahead_are_visible() {
    type Change = fn(&Fs, &str);
    let changes: [Change; 10] = [
        |fs, dir| fs.unlink(&format!("{dir}/f")).unwrap(),
        |fs, dir| fs.create(&format!("{dir}/new"), b"text").unwrap(),
        |fs, dir| fs.append(&format!("{dir}/g"), b"more").unwrap(),
        |fs, dir| fs.chmod(&format!("{dir}/g"), 0o600).unwrap(),
        |fs, dir| fs.chmod(dir, 0o700).unwrap(),
        |fs, dir| fs.rename(dir, "moved").unwrap(),
        |fs, dir| fs.rename(&format!("{dir}/sub"), "moved").unwrap(),
        |fs, dir| {
            fs.exchange(&format!("{dir}/sub"), &format!("{dir}/f"))
                .unwrap()
        },
        |fs, dir| fs.unlink(&format!("{dir}/sub/h")).unwrap(),
        |fs, dir| {
            for file in ["sub/h", "f", "g"] {
                fs.unlink(&format!("{dir}/{file}")).unwrap();
            }
            fs.rmdir(&format!("{dir}/sub")).unwrap();
            fs.rmdir(dir).unwrap();
            fs.mkdir(dir).unwrap();
        },
    ];
    for change in changes {
        let lab = lab();
        let fs = lab.open();
        let next = walk(&fs);
        change(&fs, &next);
        let tree = fs.tree();
        assert_eq!(fs.tree(), tree);
        lab.push(&fs).unwrap();
        assert_eq!(fs.tree(), tree);
        drop(fs);
        assert_eq!(lab.open().tree(), tree);
    }
}

#[test]
fn a_directory_in_the_upper_layer_is_not_read_ahead() {
    let lab = lab();
    let fs = lab.open();
    for dir in ["a", "b", "c", "d"] {
        fs.create(&format!("{dir}/new"), b"text").unwrap();
    }
    let next = walk(&fs);
    let created = |dir: &Path| dir.join(&next).join("another");
    std::fs::write(created(&lab.upper()), "text").unwrap();
    assert_eq!(
        fs.names(&next).unwrap(),
        ["another", "f", "g", "new", "sub"]
    );
}
