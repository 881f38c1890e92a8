//! Regressions that the differential test found, each reduced to the fewest steps.

use std::os::unix::fs::MetadataExt;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::layout;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::random::{Caller, Op, Outcome, Side};
use cowl_tests::tree::{self, Compare};
use rustix::fs::OFlags;

const NEEDS: [Need; 3] = [Need::Root, Need::Fuse, Need::KernelOverlay];

/// Regression (seed 23): setgid without group execute permission is not a privilege. A write clears it only if the
/// writer is not in the group.
#[test]
fn a_setgid_bit_without_execute_survives_writes_of_a_group_member() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    let scratch = store.scratch();
    sh_in(
        scratch,
        "mkdir lower plain upper; chmod 777 lower plain upper",
    )
    .ok();
    let stack = Stack {
        lowers: vec![scratch.join("lower")],
        upper: Some((scratch.join("upper"), scratch.make("work"))),
    };
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "suid");
    let create = Op::Create {
        path: b"f".to_vec(),
        flags: OFlags::CREATE | OFlags::RDWR,
        mode: 0o2755,
        data: (1, 100),
    };
    let member = Caller {
        id: 1000,
        groups: &[],
        umask: 0o077,
    };
    for root in [mount.path(), &scratch.join("plain")] {
        assert_eq!(
            Side::new(root).perform(&create, member),
            Outcome::Count(100)
        );
        let mode = root.join("f").metadata().unwrap().mode();
        assert_eq!(mode & 0o7777, 0o2700, "{}", root.display());
    }
    // A write or a truncation by a user outside the group clears it.
    let outsider = Caller { id: 1001, ..member };
    for (name, op) in [
        (
            "w",
            Op::Create {
                path: b"w".to_vec(),
                flags: OFlags::RDWR,
                mode: 0,
                data: (1, 5),
            },
        ),
        (
            "t",
            Op::Cut {
                path: b"t".to_vec(),
                len: 1,
            },
        ),
    ] {
        for root in [mount.path(), &scratch.join("plain")] {
            let line = format!("echo content > {name}; chown 1000:1000 {name}; chmod 2706 {name}");
            sh_in(root, &line).ok();
            let outcome = Side::new(root).perform(&op, outsider);
            assert!(!matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
            let mode = root.join(name).metadata().unwrap().mode();
            assert_eq!(mode & 0o7777, 0o706, "{name} in {}", root.display());
        }
    }
}

/// Regression (seed 147): a flatten retained a whiteout that hid an object only in the merged layers. The kernel listed
/// it in a directory without lower directories.
#[test]
fn a_flattened_layer_contains_no_needless_whiteout() {
    if !can(&NEEDS) {
        return;
    }
    let store = Store::for_test();
    sh_in(
        store.scratch(),
        "mkdir -p base middle/only top/only
         touch base/b middle/only/gone middle/only/stays; mknod top/only/gone c 0 0",
    )
    .ok();
    let layers = ["top", "middle", "base"].map(|name| store.scratch().join(name));
    layout::make(store.path(), "c", &layers, true).unwrap();
    store.cowl(["flatten", "c"]).ok();
    let stack = Stack {
        lowers: layout::stack(store.path(), "c").unwrap(),
        upper: None,
    };
    assert_eq!(stack.lowers.len(), 3);
    let kernel = Overlay::kernel(&stack, &store.scratch().make("kernel"));
    let theirs = tree::read(kernel.path()).unwrap();
    let mount_point = store.mount("c");
    let ours = tree::read(&mount_point).unwrap();
    store.cowl(["umount", "c"]).ok();
    tree::assert_same("kernel, then cowl", &theirs, &ours, Compare::READER);
    assert!(ours.contains_key(&b"only/stays"[..]));
}
