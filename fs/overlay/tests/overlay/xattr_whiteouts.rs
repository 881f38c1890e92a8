//! Xattr whiteouts, which are used where the file system refuses device nodes.
//!
//! Random operations run on a base file system with device nodes and on one without. All results and trees must be
//! equal, also after a new mount and after a push.

use crate::common::{Fs, Lab, create_files, metacopy, spaces, walk};
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::fault::refuse_devices;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_overlay::OverlayOptions;
use proptest::prelude::*;
use proptest::test_runner::Config;

#[derive(Clone, Debug)]
enum Operation {
    Create(String),
    Mkdir(String),
    Unlink(String),
    Rmdir(String),
    Rename(String, String),
    Exchange(String, String),
    Link(String, String),
    Chmod(String),
    Remount,
    Push,
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|parts| parts.join("/"))
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => path().prop_map(Operation::Create),
        2 => path().prop_map(Operation::Mkdir),
        4 => path().prop_map(Operation::Unlink),
        3 => path().prop_map(Operation::Rmdir),
        5 => (path(), path()).prop_map(|(a, b)| Operation::Rename(a, b)),
        1 => (path(), path()).prop_map(|(a, b)| Operation::Exchange(a, b)),
        1 => (path(), path()).prop_map(|(a, b)| Operation::Link(a, b)),
        1 => path().prop_map(Operation::Chmod),
        1 => Just(Operation::Remount),
        1 => Just(Operation::Push),
    ]
}

fn lab(space: XattrSpace) -> Lab {
    let lab = Lab::new(|top| create_files(top, &["a/a/x", "a/b", "b/a/y", "b/c", "c"]));
    lab.add_lower(|top| create_files(top, &["a/c/z", "b/b/"]));
    // Skip syncs, which would dominate the run time: no power cut is tested here.
    let options = OverlayOptions {
        volatile: true,
        ..metacopy()
    };
    lab.in_space(space).with(options)
}

/// One of the two base file systems.
struct Base {
    lab: Lab,
    fs: Option<Fs>,
    devices: bool,
}

impl Base {
    fn new(space: XattrSpace, devices: bool) -> Self {
        let lab = lab(space);
        refuse_devices(!devices);
        let fs = Some(lab.open());
        Self { lab, fs, devices }
    }

    /// Runs an operation, and returns its result and the merged tree as text.
    fn run(&mut self, operation: &Operation) -> String {
        refuse_devices(!self.devices);
        let fs = self.fs.as_ref().unwrap();
        let result = match operation {
            Operation::Create(path) => fs.create(path, path.as_bytes()),
            Operation::Mkdir(path) => fs.mkdir(path),
            Operation::Unlink(path) => fs.unlink(path),
            Operation::Rmdir(path) => fs.rmdir(path),
            Operation::Rename(from, to) => fs.rename(from, to),
            Operation::Exchange(one, two) => fs.exchange(one, two),
            Operation::Link(from, to) => fs.link(from, to),
            Operation::Chmod(path) => fs.chmod(path, 0o700),
            Operation::Push => {
                self.lab.push(fs).unwrap();
                Ok(())
            }
            Operation::Remount => {
                self.fs = None;
                self.fs = Some(self.lab.open());
                Ok(())
            }
        };
        let mut tree = self.fs.as_ref().unwrap().tree();
        for shown in tree.values_mut() {
            shown.mtime = None::<Time>;
        }
        format!("{result:?} {tree:#?}")
    }

    fn devices_in_upper(&self) -> usize {
        let mut count = 0;
        walk(&self.lab.upper(), &mut |_, stat| {
            count += usize::from(stat.kind() == FileKind::CharDevice);
        });
        count
    }
}

proptest! {
    #![proptest_config(Config { cases: 30, failure_persistence: None, ..Config::default() })]

    #[test]
    fn xattr_whiteouts_behave_like_devices(operations in prop::collection::vec(operation(), 1..40)) {
        for &space in spaces() {
            let mut bases = [Base::new(space, true), Base::new(space, false)];
            for (at, operation) in operations.iter().chain([&Operation::Remount]).enumerate() {
                let [with, without] = bases.each_mut().map(|base| base.run(operation));
                prop_assert_eq!(with, without, "operation {}: {:?}", at, operation);
            }
            prop_assert_eq!(bases[1].devices_in_upper(), 0);
            refuse_devices(false);
        }
    }
}
