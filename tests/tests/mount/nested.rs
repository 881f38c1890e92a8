//! Mounts on mounts: layers on a cowlfs mount below another one, on the kernel's overlayfs, and the
//! kernel's overlayfs with its layers on a cowlfs mount.
//!
//! `COWL_OTHER=N` adds N to every seed: other layers, other operations.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::Need;
use cowl_tests::layers;
use cowl_tests::mount::{self, Overlay, Stack};
use cowl_tests::random::{Caller, Op, Side};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};
use cowl_tests::workload::{exercise, generated, ready, upper_on};
use rustix::fs::{FallocateFlags, OFlags};

#[test]
fn a_lower_layer_can_be_on_a_cowl_mount() {
    if !ready(&[]) {
        return;
    }
    let scratch = Scratch::new("lower-on-cowl");
    let (lowers, plain) = generated(&scratch, 13);
    let upper = upper_on(&scratch, &lowers[0]);
    // The inner overlay is writable, so it has an upper layer of its own, which must stay at its path.
    let written = (scratch.make("inner-upper"), scratch.make("inner-work"));
    layers::copy_root(&lowers[1], &written.0).unwrap();
    let inner = Stack {
        lowers: lowers[1..].to_vec(),
        upper: Some(written),
    };
    let inner = Overlay::cowlfs(&inner, &scratch.make("inner"), "dev,suid");
    let work =
        "cd known; echo inner >> append; mv dir/one dir/first; ln hard dir/hard5; chmod 640 cut";
    sh_in(inner.path(), work).ok();
    sh_in(&plain, work).ok();
    let stack = Stack {
        lowers: vec![lowers[0].clone(), inner.path().to_owned()],
        upper: Some(upper),
    };
    exercise(&scratch, stack, plain, 13);
    inner.unmount();
}

/// Two mounts report inode numbers of one file system, and may show one file under two names.
#[test]
fn lower_layers_can_be_on_two_cowl_mounts_of_one_layer() {
    if !ready(&[]) {
        return;
    }
    let scratch = Scratch::new("two-cowl");
    let base = scratch.make("layer");
    sh_in(
        &base,
        "mkdir d; echo one > d/name; ln d/name d/alias; echo two > other",
    )
    .ok();
    let inner = |name: &str, script: &str| {
        let upper = scratch.make(&format!("{name}-upper"));
        let stack = Stack {
            lowers: vec![base.clone()],
            upper: Some((upper, scratch.make(&format!("{name}-work")))),
        };
        let mounted = Overlay::cowlfs(&stack, &scratch.make(name), "");
        sh_in(mounted.path(), script).ok();
        mounted
    };
    let top = inner("top", "mv d/name d/renamed; rm d/alias; mv other another");
    let bottom = inner("bottom", "true");
    let upper = (scratch.make("upper"), scratch.make("work"));
    let stack = Stack {
        lowers: vec![top.path().to_owned(), bottom.path().to_owned()],
        upper: Some(upper),
    };
    let tested = scratch.make("tested");
    let mounted = Overlay::cowlfs(&stack, &tested, "");
    // Six names and four files: objects of one mount differ from those of the other.
    let before = tree::read(&tested).unwrap();
    let numbers = |tree: &tree::Tree, names: [&str; 3]| {
        let of = |name: &str| tree[name.as_bytes()].ino;
        names.map(of)
    };
    let [renamed, name, alias] = numbers(&before, ["d/renamed", "d/name", "d/alias"]);
    let [another, other, dir] = numbers(&before, ["another", "other", "d"]);
    assert_eq!(name, alias, "one file");
    let mut all = [renamed, name, another, other, dir];
    all.sort_unstable();
    assert!(
        all.windows(2).all(|pair| pair[0] != pair[1]),
        "two objects have one number: {all:?}"
    );
    let script = "echo x >> d/name; echo y >> d/renamed; chmod 600 other another";
    sh_in(&tested, script).ok();
    let after = tree::read(&tested).unwrap();
    assert_eq!(
        numbers(&after, ["d/renamed", "d/name", "d/alias"]),
        [renamed, name, alias]
    );
    let text = |name: &str| std::fs::read_to_string(tested.join(name)).unwrap();
    assert_eq!(text("d/alias"), "one\nx\n");
    assert_eq!(text("d/renamed"), "one\ny\n");
    mounted.unmount();
    let mounted = Overlay::cowlfs(&stack, &tested, "");
    // The object that is looked up first must not get the number of another one.
    for name in ["other", "d/name", "d/alias", "another", "d/renamed", "d"] {
        let found = tested.join(name).symlink_metadata().unwrap().ino();
        assert_eq!(
            found,
            after[name.as_bytes()].ino,
            "{name} after a new mount"
        );
    }
    let again = tree::read(&tested).unwrap();
    tree::assert_same("after a new mount", &after, &again, Compare::IDENTICAL);
    mounted.unmount();
    top.unmount();
    bottom.unmount();
}

/// Markers and whiteouts that the outer mount writes are ordinary xattrs and devices to the inner one.
fn upper_on_a_cowl_mount(seed: u64) {
    if !ready(&[]) {
        return;
    }
    let scratch = Scratch::new("upper-on-cowl");
    let (lowers, plain) = generated(&scratch, seed);
    let outer = Stack {
        lowers: vec![scratch.make("bottom")],
        upper: Some((scratch.make("outer-upper"), scratch.make("outer-work"))),
    };
    let mount_point = scratch.make("outer");
    let mounted = Overlay::cowlfs(&outer, &mount_point, "dev,suid");
    let upper = upper_on(&mount_point, &lowers[0]);
    let stack = Stack {
        lowers,
        upper: Some(upper),
    };
    exercise(&scratch, stack.clone(), plain.clone(), seed);
    // The content is unchanged after a remount of the outer mount.
    mounted.unmount();
    let mounted = Overlay::cowlfs(&outer, &mount_point, "dev,suid");
    let again = Overlay::cowlfs(&stack, &scratch.make("tested"), "dev,suid");
    let found = tree::read(again.path()).unwrap();
    let expected = tree::read(&plain).unwrap();
    tree::assert_same("mounted anew below", &found, &expected, Compare::HISTORY);
    again.unmount();
    mounted.unmount();
}

#[test]
fn an_upper_layer_can_be_on_a_cowl_mount() {
    upper_on_a_cowl_mount(14);
}

#[test]
fn an_upper_layer_can_be_on_a_cowl_mount_with_another_seed() {
    upper_on_a_cowl_mount(15);
}

/// Every change by the owner that clears setuid and setgid of a program, through two mounts.
#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn setuid_is_cleared_through_two_mounts() {
    if !ready(&[]) {
        return;
    }
    let scratch = Scratch::new("setuid-stacked");
    let outer = Stack {
        lowers: vec![scratch.make("bottom")],
        upper: Some((scratch.make("outer-upper"), scratch.make("outer-work"))),
    };
    let (lower, plain) = (scratch.make("lower"), scratch.make("plain"));
    let names = [
        "cut-by-open",
        "cut",
        "written",
        "allocated",
        "given",
        "kept",
    ];
    for dir in [&lower, &plain] {
        for name in names {
            std::fs::write(dir.join(name), "content").unwrap();
        }
        sh_in(dir, "chown 1000:1000 . *; chmod 6755 *").ok();
    }
    let mount_point = scratch.make("outer");
    let ours = Overlay::cowlfs(&outer, &mount_point, "dev,suid");
    let stack = Stack {
        upper: Some(upper_on(&mount_point, &lower)),
        lowers: vec![lower],
    };
    let tested = scratch.make("tested");
    let mounted = Overlay::cowlfs(&stack, &tested, "dev,suid");
    let path = |name: &str| name.as_bytes().to_vec();
    let hold = |name: &str, flags| Op::Hold {
        slot: 0,
        path: path(name),
        flags,
    };
    let (mut one, mut two) = (Side::new(&tested), Side::new(&plain));
    for (op, user) in [
        (hold("cut-by-open", OFlags::WRONLY | OFlags::TRUNC), 1000),
        (
            Op::Truncate {
                path: path("cut"),
                len: 3,
            },
            1000,
        ),
        (hold("written", OFlags::WRONLY), 1000),
        (
            Op::FdWrite {
                slot: 0,
                offset: 2,
                data: (1, 3),
            },
            1000,
        ),
        (hold("allocated", OFlags::RDWR), 1000),
        (
            Op::FdAllocate {
                slot: 0,
                mode: FallocateFlags::empty(),
                offset: 100,
                len: 100,
            },
            1000,
        ),
        (
            Op::Chown {
                path: path("given"),
                uid: Some(1001),
                gid: None,
                follow: true,
            },
            0,
        ),
        (hold("kept", OFlags::WRONLY | OFlags::TRUNC), 0),
    ] {
        assert_eq!(
            one.perform(&op, Caller::user(user)),
            two.perform(&op, Caller::user(user)),
            "{op:?}"
        );
    }
    drop((one, two));
    let modes =
        |mount_point: &Path| names.map(|name| mount_point.join(name).metadata().unwrap().mode());
    let expected = modes(&plain);
    assert_eq!(modes(&tested).map(octal), expected.map(octal));
    assert_eq!(expected.map(|mode| mode & 0o6000)[..5], [0; 5]);
    mounted.unmount();
    ours.unmount();
}

fn octal(mode: u32) -> String {
    format!("{mode:o}")
}

#[test]
fn a_lower_layer_can_be_on_kernel_overlayfs() {
    if !ready(&[vec![Need::KernelOverlay]]) {
        return;
    }
    let scratch = Scratch::new("on-kernel");
    let (lowers, plain) = generated(&scratch, 16);
    let upper = upper_on(&scratch, &lowers[0]);
    let kernel = Overlay::kernel(
        &Stack {
            lowers: lowers[1..].to_vec(),
            upper: None,
        },
        &scratch.make("kernel"),
    );
    let stack = Stack {
        lowers: vec![lowers[0].clone(), kernel.path().to_owned()],
        upper: Some(upper),
    };
    exercise(&scratch, stack, plain, 16);
    mount::unmount_free(kernel.path());
}

#[test]
fn kernel_overlayfs_can_have_its_lower_layer_on_a_cowl_mount() {
    if !ready(&[vec![Need::KernelOverlay]]) {
        return;
    }
    let scratch = Scratch::new("kernel-on-cowl");
    let (lowers, plain) = generated(&scratch, 17);
    let ours = Overlay::cowlfs(
        &Stack {
            lowers: lowers.clone(),
            upper: None,
        },
        &scratch.make("ours"),
        "dev,suid",
    );
    let stack = Stack {
        lowers: vec![ours.path().to_owned()],
        upper: Some(upper_on(&scratch, &lowers[0])),
    };
    let theirs = Overlay::kernel(&stack, &scratch.make("theirs"));
    let compare = |when: &str| {
        let found = tree::read(theirs.path()).unwrap();
        let expected = tree::read(&plain).unwrap();
        // Kernel overlayfs breaks hard links, and reports other link counts.
        let compare = Compare {
            nlink: false,
            groups: false,
            ..Compare::HISTORY
        };
        tree::assert_same(when, &found, &expected, compare);
    };
    compare("before any change");
    let work = "cd known; echo x >> append; mv dir moved; rm gonefile; rm -r replaced; mkdir replaced
                chmod 600 mode; chown 1000:1001 owner; mv big kept; setfattr -n user.a -v b attribute";
    sh_in(theirs.path(), work).ok();
    sh_in(&plain, work).ok();
    compare("after changes");
    theirs.unmount();
    ours.unmount();
}

/// As an upper layer, the mount must support whiteouts, overlay xattrs, RENAME_WHITEOUT and RENAME_EXCHANGE.
#[test]
fn kernel_overlayfs_can_have_its_upper_layer_on_a_cowl_mount() {
    if !ready(&[vec![Need::KernelOverlay]]) {
        return;
    }
    let scratch = Scratch::new("kernel-upper");
    let (lowers, plain) = generated(&scratch, 18);
    let outer = Stack {
        lowers: vec![scratch.make("bottom")],
        upper: Some((scratch.make("outer-upper"), scratch.make("outer-work"))),
    };
    let mount_point = scratch.make("outer");
    let ours = Overlay::cowlfs(&outer, &mount_point, "dev,suid");
    let stack = Stack {
        upper: Some(upper_on(&mount_point, &lowers[0])),
        lowers,
    };
    // Kernel overlayfs reports the link counts of each layer, and breaks hard links.
    let compare = |when: &str, mount_point: &Path| {
        let found = tree::read(mount_point).unwrap();
        let expected = tree::read(&plain).unwrap();
        let compare = Compare {
            nlink: false,
            groups: false,
            ..Compare::HISTORY
        };
        tree::assert_same(when, &found, &expected, compare);
    };
    let theirs = Overlay::kernel(&stack, &scratch.make("theirs"));
    compare("before any change", theirs.path());
    let work = "cd known; echo x >> append; mv dir moved; rm gonefile; rm -r replaced; mkdir replaced
        rm -r gone; mv moved/sub into/sub; rm becomes; mkdir becomes; ln mode mode2; mv big kept
        chmod 600 mode; chown 1000:1001 owner; setfattr -n user.a -v b attribute; mv keep kept-dir
        mkdir -p new/deep; echo y > new/deep/file; mv new newer; rm -r newer; mkfifo fifo2; rm null";
    sh_in(theirs.path(), work).ok();
    sh_in(&plain, work).ok();
    compare("after changes", theirs.path());
    theirs.unmount();
    ours.unmount();

    // After remounts the kernel shows its own changes, and cowlfs shows the same.
    let ours = Overlay::cowlfs(&outer, &mount_point, "dev,suid");
    let theirs = Overlay::kernel(&stack, &scratch.make("theirs"));
    compare("after new mounts", theirs.path());
    theirs.unmount();
    let again = Overlay::cowlfs(&stack, &scratch.make("again"), "dev,suid");
    compare("the same layers through cowlfs", again.path());
    again.unmount();
    ours.unmount();
}
