//! The name cache of a directory in many layers.
//!
//! After every change that could make the cache stale, the tree must equal that of a new overlay without a cache.

use std::collections::BTreeMap;

use crate::common::{Fs, Lab, create_files};
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;
use std::os::fd::AsFd;

const LAYERS: usize = 7;

/// Creates layers of which each has its own names and hides one of the layer below.
fn deep() -> Lab {
    let lab = Lab::new(|_| {});
    for layer in 0..LAYERS {
        lab.add_lower(|top| {
            let names = [
                format!("d/own{layer}"),
                format!("d/sub/own{layer}"),
                format!("d/gone{layer}"),
                "d/all".to_owned(),
            ];
            create_files(top, &names.each_ref().map(String::as_str));
            if layer > 0 {
                let dir = sys::dir::open_root(&top.join("d")).unwrap();
                let hidden = format!("gone{}", layer - 1);
                let kind = FileKind::CharDevice;
                sys::node::mknod(dir.as_fd(), hidden.as_bytes(), kind, 0, 0).unwrap();
            }
        });
    }
    lab
}

/// Reads every name of a directory, often enough that the names are cached.
fn read_all(fs: &Fs, dir: &str) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for _ in 0..2 {
        for layer in 0..LAYERS {
            for name in ["own", "gone", "new"] {
                let path = format!("{dir}/{name}{layer}");
                found.insert(format!("{name}{layer}"), fs.read(&path).ok());
            }
        }
        found.insert("all".to_owned(), fs.read(&format!("{dir}/all")).ok());
    }
    found
}

/// Compares lookups, listings and the tree with those of a new overlay.
fn check(lab: &Lab, fs: &Fs, dirs: &[&str]) {
    let fresh = lab.open_read_only();
    for dir in dirs {
        let found = read_all(fs, dir);
        assert_eq!(found, read_all(&fresh, dir), "{dir}");
        let existing: Vec<&String> = found
            .iter()
            .filter(|(_, content)| content.is_some())
            .map(|(name, _)| name)
            .collect();
        let names = fs.names(dir).unwrap_or_default();
        let names: Vec<&String> = names
            .iter()
            .filter(|name| !name.starts_with("sub"))
            .collect();
        assert_eq!(existing, names, "{dir}");
    }
    assert_eq!(fs.tree(), lab.open_read_only().tree());
}

#[test]
fn name_cache_of_a_deep_directory_stays_coherent() {
    let lab = deep();
    let fs = lab.open();
    let both = ["d", "d/sub"];
    check(&lab, &fs, &both);
    assert_eq!(fs.names("d").unwrap().len(), LAYERS + 3);
    // Changes in the upper layer.
    fs.unlink("d/own2").unwrap();
    fs.unlink("d/all").unwrap();
    fs.append("d/own3", b" and more").unwrap();
    fs.create("d/new1", b"new").unwrap();
    check(&lab, &fs, &both);
    fs.create("d/own2", b"again").unwrap();
    fs.create("d/all", b"of the upper").unwrap();
    check(&lab, &fs, &both);
    // The upper layer becomes a lower one, and a new one hides some of its names.
    lab.push(&fs).unwrap();
    check(&lab, &fs, &both);
    fs.unlink("d/new1").unwrap();
    fs.unlink("d/sub/own6").unwrap();
    fs.rename("d/own4", "d/new4").unwrap();
    fs.rename("d/own5", "d/sub/new5").unwrap();
    check(&lab, &fs, &both);
    // The directory is moved, and another one gets its name.
    fs.rename("d", "moved").unwrap();
    check(&lab, &fs, &["d", "moved", "moved/sub"]);
    fs.mkdir("d").unwrap();
    fs.create("d/own0", b"not the old one").unwrap();
    check(&lab, &fs, &["d", "moved", "moved/sub"]);
    fs.exchange("d", "moved").unwrap();
    check(&lab, &fs, &["d", "moved", "d/sub"]);
    lab.push(&fs).unwrap();
    fs.rename("d/sub", "d/sub2").unwrap();
    fs.unlink("d/own6").unwrap();
    check(&lab, &fs, &["d", "moved", "d/sub2"]);
    // A removed directory: one that is created at the same path inherits nothing from it.
    for name in fs.names("d/sub2").unwrap() {
        fs.unlink(&format!("d/sub2/{name}")).unwrap();
    }
    fs.rmdir("d/sub2").unwrap();
    fs.mkdir("d/sub2").unwrap();
    fs.mkdir("d/sub").unwrap();
    check(&lab, &fs, &["d", "d/sub2", "d/sub"]);
    assert!(fs.names("d/sub").unwrap().is_empty());
    drop(fs);
    let fs = lab.open();
    check(&lab, &fs, &["d", "moved", "d/sub2"]);
}
