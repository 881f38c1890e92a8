//! Tests of image layers that are unpacked over others: what depends on the layers below.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::view::View;

use super::{export_dir, import};
use crate::tree::omissions::Unsupported;

/// An entry of a layer: its path and its content. A path with a slash at its end is a directory of mode 0711, a content
/// that begins with an arrow is a symbolic link, and one that begins with an equals sign a hard link.
type TestEntry<'e> = (&'e str, &'e str);

fn tar(entries: &[TestEntry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o640);
        header.set_mtime(1_000_000);
        let link = content.strip_prefix("-> ");
        let hard = content.strip_prefix("= ");
        if path.ends_with('/') {
            header.set_mode(0o711);
            header.set_entry_type(tar::EntryType::Directory);
        } else if link.is_some() {
            header.set_entry_type(tar::EntryType::Symlink);
        } else if hard.is_some() {
            header.set_entry_type(tar::EntryType::Link);
        }
        match link.or(hard) {
            Some(target) => builder.append_link(&mut header, path, target).unwrap(),
            None => {
                header.set_size(content.len() as u64);
                let content = content.as_bytes();
                builder.append_data(&mut header, path, content).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

struct Stack {
    dir: tempfile::TempDir,
    /// From the bottom.
    layers: Vec<PathBuf>,
}

impl Stack {
    fn new(layers: &[&[TestEntry<'_>]]) -> Self {
        let mut stack = Self {
            dir: tempfile::tempdir().unwrap(),
            layers: Vec::new(),
        };
        for entries in layers {
            let path = stack.dir.path().join(format!("l{}", stack.layers.len()));
            fs::create_dir(&path).unwrap();
            let below = (!stack.layers.is_empty()).then(|| stack.view());
            let over = (below, XattrSpace::detect());
            import::image_layer(
                &*tar(entries),
                &path,
                over,
                Unsupported::Refuse,
                &mut |_| {},
            )
            .unwrap();
            stack.layers.push(path);
        }
        stack
    }

    fn view(&self) -> View {
        let open = |path: &PathBuf| Layer::open(path, XattrSpace::detect()).unwrap();
        View::new(self.layers.iter().rev().map(open).collect())
    }

    /// Returns the merged tree as a plain directory.
    fn merged(&self) -> PathBuf {
        let target = self.dir.path().join("merged");
        fs::create_dir(&target).unwrap();
        export_dir::fill(&self.view(), &target, &mut |_| {}).unwrap();
        target
    }
}

/// Returns the paths in a directory: files with their content, links with their target.
fn paths(top: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![top.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
            let kind = path.symlink_metadata().unwrap().file_type();
            let content = if kind.is_dir() {
                todo.push(path);
                continue;
            } else if kind.is_symlink() {
                format!("-> {}", fs::read_link(path).unwrap().to_str().unwrap())
            } else if kind.is_file() {
                fs::read_to_string(path).unwrap()
            } else {
                "device".to_owned()
            };
            found.insert(name, content);
        }
    }
    found
}

fn shows(layers: &[&[TestEntry<'_>]], expected: &[TestEntry<'_>]) {
    let found = paths(&Stack::new(layers).merged());
    let owned = |(path, content): &TestEntry<'_>| ((*path).to_owned(), (*content).to_owned());
    let expected: BTreeMap<_, _> = expected.iter().map(owned).collect();
    assert_eq!(found, expected, "{layers:?}");
}

#[test]
fn directories_without_an_entry_keep_their_attributes() {
    let base: &[TestEntry<'_>] = &[("./", ""), ("a/", ""), ("a/b/", ""), ("a/b/old", "1")];
    let stack = Stack::new(&[base, &[("a/b/new", "2"), ("c/d", "3")]]);
    let merged = stack.merged();
    for path in ["", "a", "a/b"] {
        let found = fs::metadata(merged.join(path)).unwrap();
        assert_eq!(found.permissions().mode() & 0o7777, 0o711, "{path}");
        assert_eq!(found.mtime(), 1_000_000, "{path}");
    }
    let new = fs::metadata(merged.join("c")).unwrap();
    assert_eq!(new.permissions().mode() & 0o7777, 0o755);
}

#[test]
fn links_below_are_followed() {
    let base: &[TestEntry<'_>] = &[
        ("usr/lib/x", "1"),
        ("lib", "-> usr/lib"),
        ("abs", "-> /usr"),
    ];
    let linked = &[("lib", "-> usr/lib"), ("abs", "-> /usr")];
    let with = |more: &[TestEntry<'static>]| [&linked[..], more].concat();
    shows(
        &[base, &[("lib/y", "2"), ("abs/lib/z", "3")]],
        &with(&[("usr/lib/x", "1"), ("usr/lib/y", "2"), ("usr/lib/z", "3")]),
    );
    // The link itself is removed, and the file is where it led.
    shows(
        &[base, &[("lib/y", "2"), (".wh.lib", ""), (".wh.abs", "")]],
        &[("usr/lib/x", "1"), ("usr/lib/y", "2")],
    );
    shows(&[base, &[("lib/.wh.x", "")]], &with(&[]));
    shows(
        &[base, &[("usr/lib/x/y", "below a file"), ("z", "")]],
        &with(&[("usr/lib/x", "1"), ("z", "")]),
    );
}

/// `..` behind a symbolic link that only the layers below have leads out of the link's target, not of its directory.
#[test]
fn parents_of_links_below_are_those_of_their_targets() {
    let base: &[TestEntry<'_>] = &[
        ("a/b/old", "1"),
        ("a/c/old", "2"),
        ("c/old", "3"),
        ("p", "-> a/b"),
        ("x", "-> p/../c"),
        ("usr/lib/l", "4"),
        ("usr/share/s", "5"),
        ("share/s", "6"),
        ("lib", "-> usr/lib"),
        ("docs", "-> /lib/../share"),
    ];
    let with = |changed: &[(&'static str, &'static str)]| {
        let mut all: BTreeMap<_, _> = base.iter().copied().collect();
        for (path, content) in changed {
            match *content {
                "" => all.remove(path),
                content => all.insert(path, content),
            };
        }
        all.into_iter().collect::<Vec<_>>()
    };
    for (entries, changed) in [
        ([("x/new", "7")], [("a/c/new", "7")]),
        ([("x/.wh.old", "")], [("a/c/old", "")]),
        ([("linked", "= x/old")], [("linked", "2")]),
        ([("docs/new", "8")], [("usr/share/new", "8")]),
        ([("docs/.wh.s", "")], [("usr/share/s", "")]),
        ([("linked", "= docs/s")], [("linked", "5")]),
        ([("docs/.wh..wh..opq", "")], [("usr/share/s", "")]),
    ] {
        shows(&[base, &entries], &with(&changed));
    }
}

#[test]
fn hard_links_to_files_below_are_links() {
    let base: &[TestEntry<'_>] = &[("d/", ""), ("d/file", "1")];
    let stack = Stack::new(&[base, &[("other", "= d/file"), ("again", "= other")]]);
    let merged = stack.merged();
    let inode = |path: &str| fs::metadata(merged.join(path)).unwrap().ino();
    assert_eq!(inode("d/file"), inode("other"));
    assert_eq!(inode("d/file"), inode("again"));
    assert_eq!(fs::read(merged.join("other")).unwrap(), b"1");
    // Hidden files cannot be linked to.
    shows(&[base, &[("d/.wh.file", ""), ("other", "= d/file")]], &[]);
}

#[test]
fn whiteouts_apply_to_the_layers_below_only() {
    let base: &[TestEntry<'_>] = &[("a/", ""), ("a/old", "1"), ("b/c/old", "2"), ("f", "3")];
    for entries in [
        &[("a/new", "4"), (".wh.a", "")],
        &[(".wh.a", ""), ("a/new", "4")],
        &[("a/.wh..wh..opq", ""), ("a/new", "4")],
        &[("a/new", "4"), ("a/.wh..wh..opq", "")],
    ] {
        shows(
            &[base, entries],
            &[("a/new", "4"), ("b/c/old", "2"), ("f", "3")],
        );
    }
    shows(&[base, &[(".wh.a", ""), (".wh.b", ""), (".wh.f", "")]], &[]);
    shows(
        &[base, &[("b/c/.wh..wh..opq", "")]],
        &[("a/old", "1"), ("f", "3")],
    );
    shows(
        &[base, &[(".wh..wh..opq", ""), ("b/x", "5")]],
        &[("b/x", "5")],
    );
    shows(
        &[base, &[(".wh.f", ""), ("f", "new"), (".wh.a", "")]],
        &[("b/c/old", "2"), ("f", "new")],
    );
    // Removed in one layer, and created again in the next one.
    shows(
        &[base, &[(".wh.b", "")], &[("b/d", "6")]],
        &[("a/old", "1"), ("b/d", "6"), ("f", "3")],
    );
}

#[test]
fn repeated_markers_have_the_effect_of_one() {
    let base: &[TestEntry<'_>] = &[("a/b/old", "1"), ("a/c", "2"), ("f", "3")];
    let opaque = ("a/.wh..wh..opq", "");
    shows(
        &[
            base,
            &[
                opaque,
                ("a/b/new", "4"),
                opaque,
                ("a/b/.wh.old", ""),
                opaque,
            ],
        ],
        &[("a/b/new", "4"), ("f", "3")],
    );
    // The directory is copied before, and hidden entirely afterwards.
    shows(
        &[base, &[opaque, (".wh.a", ""), opaque, (".wh.a", "")]],
        &[("f", "3")],
    );
    let root = (".wh..wh..opq", "");
    shows(
        &[base, &[root, ("a/new", "5"), root, (".wh.f", "")]],
        &[("a/new", "5")],
    );
}

#[test]
fn layers_contain_no_needless_whiteouts() {
    let base: &[TestEntry<'_>] = &[("a/b", "1")];
    let markers = [
        (".wh.none", ""),
        ("none/.wh.x", ""),
        ("a/.wh.none", ""),
        ("a/b/.wh.x", ""),
        ("none/.wh..wh..opq", ""),
        (".wh..wh.aufs", ""),
        (".wh.", ""),
        (".wh...", ""),
        (".wh.a", ""),
        ("a/.wh.b", ""),
    ];
    let stack = Stack::new(&[base, &markers]);
    let found = paths(&stack.layers[1]);
    assert_eq!(
        found,
        BTreeMap::from([("a".to_owned(), "device".to_owned())])
    );
    // The bottom layer has nothing to hide.
    let bottom = Stack::new(&[&markers]);
    assert_eq!(paths(&bottom.layers[0]), BTreeMap::new());
}

#[test]
fn a_directory_that_replaces_a_file_is_not_merged() {
    let base: &[TestEntry<'_>] = &[("a/old", "1")];
    let entries = [("a", "a file"), ("a/", ""), ("a/new", "2")];
    shows(&[base, &entries], &[("a/new", "2")]);
    shows(&[base, &[("a", "a file")]], &[("a", "a file")]);
    shows(&[base, &[("a", "a file")], &[("a/", "")]], &[]);
}

#[test]
fn layers_without_entries_are_accepted() {
    let zeros = vec![0; 1024];
    let dir = tempfile::tempdir().unwrap();
    let over = (None, XattrSpace::detect());
    let done = import::image_layer(&*zeros, dir.path(), over, Unsupported::Refuse, &mut |_| {});
    assert_eq!(done.unwrap().1, super::image_source::Digest::of(&zeros));
    assert_eq!(fs::metadata(dir.path()).unwrap().mtime(), 0);
}
