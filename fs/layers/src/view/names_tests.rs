//! Where the names of places are known, everything must look as where they are asked one by one.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::{DirNode, Found, Known, View};
use crate::format::{OPAQUE, XattrSpace};
use crate::layer::Layer;
use crate::name::Name;
use crate::sys;
use crate::sys::stat::FileKind;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// What lies under a name in one layer.
#[derive(Clone, Debug)]
enum Thing {
    File,
    Whiteout,
    /// A regular file whose content lies below.
    Metacopy(Option<usize>),
    Dir {
        opaque: bool,
        /// The name, or the path from the root, by which the layers below know it.
        redirect: Option<(usize, Option<usize>)>,
        inside: Vec<(usize, Thing)>,
    },
}

fn thing() -> impl Strategy<Value = Thing> {
    let leaf = prop_oneof![
        3 => Just(Thing::File),
        2 => Just(Thing::Whiteout),
        1 => proptest::option::of(0..NAMES.len()).prop_map(Thing::Metacopy),
    ];
    leaf.prop_recursive(2, 12, 5, |inner| {
        let redirect = (0..NAMES.len(), proptest::option::of(0..NAMES.len()));
        let redirect = proptest::option::weighted(0.3, redirect);
        let inside = proptest::collection::vec((0..NAMES.len(), inner), 0..5);
        (proptest::bool::weighted(0.2), redirect, inside).prop_map(|(opaque, redirect, inside)| {
            Thing::Dir {
                opaque,
                redirect,
                inside,
            }
        })
    })
}

fn mark(path: &Path, name: &str, value: &[u8]) {
    let dir = sys::dir::open_root(path.parent().unwrap()).unwrap();
    let file = path.file_name().unwrap().as_encoded_bytes();
    let fd = sys::dir::open_path(dir.as_fd(), file).unwrap();
    sys::xattr::set(fd.as_fd(), name.as_bytes(), value).unwrap();
}

fn plant(folder: &Path, space: XattrSpace, things: &[(usize, Thing)]) {
    for (name, thing) in things {
        let path = folder.join(NAMES[*name]);
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match thing {
            Thing::File => std::fs::write(&path, b"x").unwrap(),
            Thing::Whiteout => {
                let dir = sys::dir::open_root(folder).unwrap();
                sys::node::mknod(
                    dir.as_fd(),
                    NAMES[*name].as_bytes(),
                    FileKind::CharDevice,
                    0,
                    0,
                )
                .unwrap();
            }
            Thing::Metacopy(to) => {
                std::fs::write(&path, b"x").unwrap();
                mark(&path, space.metacopy(), b"");
                if let Some(to) = to {
                    mark(&path, space.redirect(), NAMES[*to].as_bytes());
                }
            }
            Thing::Dir {
                opaque,
                redirect,
                inside,
            } => {
                std::fs::create_dir(&path).unwrap();
                if *opaque {
                    mark(&path, space.opaque(), OPAQUE);
                }
                match redirect {
                    Some((to, None)) => mark(&path, space.redirect(), NAMES[*to].as_bytes()),
                    Some((to, Some(further))) => {
                        let to = format!("/{}/{}", NAMES[*to], NAMES[*further]);
                        mark(&path, space.redirect(), to.as_bytes());
                    }
                    None => {}
                }
                plant(&path, space, inside);
            }
        }
    }
}

/// Compares a folder and all below it; counts what was compared.
fn same(view: &View, dir: &DirNode, depth: usize) -> usize {
    let mut compared = 0;
    for above in 0..=dir.locs.len().min(2) {
        let names = view.place_names(&dir.locs[above..]).unwrap();
        let known = Some(Known {
            above,
            names: &names,
        });
        let listed = |known| {
            let mut lines = view.lines(&dir.locs, known).unwrap();
            lines.sort_by(|one, two| one.name.cmp(&two.name));
            format!("{lines:?}")
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
    fn known_names_change_nothing(
        layers in proptest::collection::vec(
            proptest::collection::vec((0..NAMES.len(), thing()), 0..5), 1..7)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let space = XattrSpace::detect();
        let paths: Vec<PathBuf> = (0..layers.len()).map(|at| dir.path().join(at.to_string())).collect();
        for (path, things) in paths.iter().zip(&layers) {
            std::fs::create_dir(path).unwrap();
            plant(path, space, things);
        }
        for foreign in [false, true] {
            let open = |path: &PathBuf| if foreign { Layer::open_foreign(path, space) } else { Layer::open(path, space) };
            let opened: Vec<Arc<Layer>> = paths.iter().map(|path| open(path).unwrap()).collect();
            let view = View::new(opened);
            assert!(same(&view, &view.root().unwrap(), 3) >= NAMES.len());
        }
    }
}
