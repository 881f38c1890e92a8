//! Where the base refuses devices, whiteouts are marked files. The same operations at random, on a base
//! that takes devices and on one that does not: every answer and every tree must be the same, after a new
//! mount and after a push too.

use crate::common::{Fs, Lab, metacopy, plant, spaces, walk};
use cowl_layers::format::XattrSpace;
use cowl_layers::sys::fault::refuse_devices;
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_overlay::OverlayOptions;
use proptest::prelude::*;
use proptest::test_runner::Config;

#[derive(Clone, Debug)]
enum Step {
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

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => path().prop_map(Step::Create),
        2 => path().prop_map(Step::Mkdir),
        4 => path().prop_map(Step::Unlink),
        3 => path().prop_map(Step::Rmdir),
        5 => (path(), path()).prop_map(|(a, b)| Step::Rename(a, b)),
        1 => (path(), path()).prop_map(|(a, b)| Step::Exchange(a, b)),
        1 => (path(), path()).prop_map(|(a, b)| Step::Link(a, b)),
        1 => path().prop_map(Step::Chmod),
        1 => Just(Step::Remount),
        1 => Just(Step::Push),
    ]
}

fn lab(space: XattrSpace) -> Lab {
    let lab = Lab::new(|top| plant(top, &["a/a/x", "a/b", "b/a/y", "b/c", "c"]));
    lab.add_lower(|top| plant(top, &["a/c/z", "b/b/"]));
    // Nothing is to outlive a power cut here, and syncs are what takes time.
    let options = OverlayOptions {
        volatile: true,
        ..metacopy()
    };
    lab.in_space(space).with(options)
}

/// One of the two bases.
struct Side {
    lab: Lab,
    fs: Option<Fs>,
    devices: bool,
}

impl Side {
    fn new(space: XattrSpace, devices: bool) -> Self {
        let lab = lab(space);
        refuse_devices(!devices);
        let fs = Some(lab.open());
        Self { lab, fs, devices }
    }

    /// What a step answers, as text, and what shows afterwards.
    fn run(&mut self, step: &Step) -> String {
        refuse_devices(!self.devices);
        let fs = self.fs.as_ref().unwrap();
        let answer = match step {
            Step::Create(path) => fs.create(path, path.as_bytes()),
            Step::Mkdir(path) => fs.mkdir(path),
            Step::Unlink(path) => fs.unlink(path),
            Step::Rmdir(path) => fs.rmdir(path),
            Step::Rename(from, to) => fs.rename(from, to),
            Step::Exchange(one, two) => fs.exchange(one, two),
            Step::Link(from, to) => fs.link(from, to),
            Step::Chmod(path) => fs.chmod(path, 0o700),
            Step::Push => {
                self.lab.push(fs).unwrap();
                Ok(())
            }
            Step::Remount => {
                self.fs = None;
                self.fs = Some(self.lab.open());
                Ok(())
            }
        };
        let mut tree = self.fs.as_ref().unwrap().tree();
        for shown in tree.values_mut() {
            shown.mtime = None::<Time>;
        }
        format!("{answer:?} {tree:#?}")
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
    fn marked_files_hide_as_devices_do(steps in prop::collection::vec(step(), 1..40)) {
        for &space in spaces() {
            let mut sides = [Side::new(space, true), Side::new(space, false)];
            for (at, step) in steps.iter().chain([&Step::Remount]).enumerate() {
                let [with, without] = sides.each_mut().map(|side| side.run(step));
                prop_assert_eq!(with, without, "step {}: {:?}", at, step);
            }
            prop_assert_eq!(sides[1].devices_in_upper(), 0);
            refuse_devices(false);
        }
    }
}
