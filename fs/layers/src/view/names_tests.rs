//! Checks that listings and lookups with cached names ([`PartialIndex`]) have the same results as without.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::{DirNode, Found, PartialIndex, View};
use crate::format::{OPAQUE, XattrSpace};
use crate::layer::Layer;
use crate::name::Name;
use crate::sys;
use crate::sys::stat::FileKind;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// A generated object in one layer.
#[derive(Clone, Debug)]
enum Object {
    File,
    Whiteout,
    /// A regular file whose content is in a lower layer, optionally at another name.
    Metacopy(Option<usize>),
    Dir {
        opaque: bool,
        /// The name, or with a second name the path from the root, in the layers below.
        redirect: Option<(usize, Option<usize>)>,
        inside: Vec<(usize, Object)>,
    },
}

fn object() -> impl Strategy<Value = Object> {
    let leaf = prop_oneof![
        3 => Just(Object::File),
        2 => Just(Object::Whiteout),
        1 => proptest::option::of(0..NAMES.len()).prop_map(Object::Metacopy),
    ];
    leaf.prop_recursive(2, 12, 5, |inner| {
        let redirect = (0..NAMES.len(), proptest::option::of(0..NAMES.len()));
        let redirect = proptest::option::weighted(0.3, redirect);
        let inside = proptest::collection::vec((0..NAMES.len(), inner), 0..5);
        (proptest::bool::weighted(0.2), redirect, inside).prop_map(|(opaque, redirect, inside)| {
            Object::Dir {
                opaque,
                redirect,
                inside,
            }
        })
    })
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let dir = sys::dir::open_root(path.parent().unwrap()).unwrap();
    let file = path.file_name().unwrap().as_encoded_bytes();
    let fd = sys::dir::open_path(dir.as_fd(), file).unwrap();
    sys::xattr::set(fd.as_fd(), name.as_bytes(), value).unwrap();
}

fn create(parent: &Path, space: XattrSpace, objects: &[(usize, Object)]) {
    for (name, object) in objects {
        let path = parent.join(NAMES[*name]);
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match object {
            Object::File => std::fs::write(&path, b"x").unwrap(),
            Object::Whiteout => {
                let dir = sys::dir::open_root(parent).unwrap();
                sys::node::mknod(
                    dir.as_fd(),
                    NAMES[*name].as_bytes(),
                    FileKind::CharDevice,
                    0,
                    0,
                )
                .unwrap();
            }
            Object::Metacopy(to) => {
                std::fs::write(&path, b"x").unwrap();
                set_xattr(&path, space.metacopy(), b"");
                if let Some(to) = to {
                    set_xattr(&path, space.redirect(), NAMES[*to].as_bytes());
                }
            }
            Object::Dir {
                opaque,
                redirect,
                inside,
            } => {
                std::fs::create_dir(&path).unwrap();
                if *opaque {
                    set_xattr(&path, space.opaque(), OPAQUE);
                }
                match redirect {
                    Some((to, None)) => set_xattr(&path, space.redirect(), NAMES[*to].as_bytes()),
                    Some((to, Some(further))) => {
                        let to = format!("/{}/{}", NAMES[*to], NAMES[*further]);
                        set_xattr(&path, space.redirect(), to.as_bytes());
                    }
                    None => {}
                }
                create(&path, space, inside);
            }
        }
    }
}

/// Compares a directory and everything below it. Returns the number of comparisons.
fn same(view: &View, dir: &DirNode, depth: usize) -> usize {
    let mut compared = 0;
    for above in 0..=dir.locs.len().min(2) {
        let names = view.index_names(&dir.locs[above..]).unwrap();
        let known = Some(PartialIndex {
            above,
            names: &names,
        });
        let listed = |known| {
            let mut entries = view.merged_entries(&dir.locs, known).unwrap();
            entries.sort_by(|one, two| one.name.cmp(&two.name));
            format!("{entries:?}")
        };
        assert_eq!(listed(None), listed(known));
        for name in NAMES.iter().chain(&["none"]) {
            let name = Name::new(name).unwrap();
            let asked = view.lookup_at(&dir.locs, &name, None);
            let knew = view.lookup_at(&dir.locs, &name, known);
            assert_eq!(format!("{asked:?}"), format!("{knew:?}"));
            compared += 1;
            if let Ok(Found::Dir(inner)) = asked
                && above == 0
                && depth > 0
            {
                compared += same(view, &inner, depth - 1);
            }
        }
    }
    compared
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn cached_names_do_not_change_results(
        layers in proptest::collection::vec(
            proptest::collection::vec((0..NAMES.len(), object()), 0..5), 1..7)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let space = XattrSpace::detect();
        let paths: Vec<PathBuf> = (0..layers.len()).map(|at| dir.path().join(at.to_string())).collect();
        for (path, objects) in paths.iter().zip(&layers) {
            std::fs::create_dir(path).unwrap();
            create(path, space, objects);
        }
        for foreign in [false, true] {
            let open = |path: &PathBuf| if foreign { Layer::open_foreign(path, space) } else { Layer::open(path, space) };
            let opened: Vec<Arc<Layer>> = paths.iter().map(|path| open(path).unwrap()).collect();
            let view = View::new(opened);
            assert!(same(&view, &view.root().unwrap(), 3) >= NAMES.len());
        }
    }
}
