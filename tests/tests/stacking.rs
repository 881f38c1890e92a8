//! Layers on every kind of filesystem, on each other's mounts, on two at once: the same work as on a
//! plain folder gives the same results, numbers hold over copy-ups and new mounts, and the base can be
//! unmounted as soon as the mount is gone.
//!
//! `COWL_OTHER=N` adds N to every seed: other layers, other operations.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::path::{Path, PathBuf};

use cowl_tests::command::{run_command, sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::images::{self, Kind, Packed};
use cowl_tests::layers;
use cowl_tests::mount::{self, Overlay, Stack};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};
use cowl_tests::workload::{self, Case};

const ALL: &str = "mode,ownership,timestamps,links,xattr";
const WITHOUT_XATTRS: &str = "mode,ownership,timestamps,links";

fn ready(test: &str, more: &[Vec<Need>]) -> bool {
    let needs = [&[Need::Root, Need::Fuse][..], &more.concat()].concat();
    // Modes of what is made are compared.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    can(test, &needs)
}

fn other() -> u64 {
    std::env::var("COWL_OTHER").map_or(0, |text| text.parse().unwrap())
}

/// Three generated layers, topmost first, and the plain folder that they must look like.
fn generated(scratch: &Scratch, seed: u64) -> (Vec<PathBuf>, PathBuf) {
    let seed = seed + other();
    let (lowers, plain) = layers::make_three(&scratch.make("generated"), seed, false).unwrap();
    workload::plant(lowers.last().unwrap(), &plain);
    layers::copy_root(&lowers[0], &plain).unwrap();
    (lowers, plain)
}

/// `upper` and `work` in `base`; the upper's root has the attributes of the topmost layer's.
fn upper_on(base: &Path, top: &Path) -> (PathBuf, PathBuf) {
    let (upper, work) = (base.join("upper"), base.join("work"));
    std::fs::create_dir(&upper).unwrap();
    std::fs::create_dir(&work).unwrap();
    layers::copy_root(top, &upper).unwrap();
    (upper, work)
}

fn moved(from: &Path, to: &Path, preserve: &str) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    images::copy(from, to, preserve);
    to.to_owned()
}

fn exercise(scratch: &Scratch, what: &str, stack: Stack, plain: PathBuf, seed: u64) {
    let case = Case {
        what,
        stack,
        plain,
        seed: seed + other(),
        steps: 150,
        options: "dev,suid",
    };
    workload::exercise(scratch, &case);
}

/// Nobody waits for the daemon here, which may still be on its way out. This process itself opens
/// nothing below the base: what other tests fork would hold it open for a moment.
#[test]
fn a_base_can_be_unmounted_right_after_the_mount() {
    let test = "a_base_can_be_unmounted_right_after_the_mount";
    if !ready(test, &[Kind::Tmpfs.needs()]) {
        return;
    }
    let scratch = Scratch::new("right-after");
    for round in 0..20 {
        let base = Kind::Tmpfs.mount(&scratch, "base");
        let make = "mkdir -p lower/dir upper work; echo text > lower/dir/file";
        sh(&format!("cd '{}'; {make}", base.display())).ok();
        let stack = Stack {
            lowers: vec![base.join("lower")],
            upper: Some((base.join("upper"), base.join("work"))),
        };
        let mounted = Overlay::cowlfs(&stack, &scratch.make("tested"), "");
        let work = "cd dir; echo x >> file; cat file; ls -R";
        sh(&format!("cd '{}'; {work}", mounted.path().display())).ok();
        mount::plain_unmount(mounted.path()).unwrap();
        let done = mount::plain_unmount(&base);
        assert!(done.is_ok(), "round {round}: {done:?}");
    }
}

fn upper_is(kind: Kind, test: &str, seed: u64) {
    if !ready(test, &[kind.needs()]) {
        return;
    }
    let scratch = Scratch::new(test);
    let base = kind.mount(&scratch, "base");
    let (lowers, plain) = generated(&scratch, seed);
    let plain = moved(&plain, &base.join("plain"), ALL);
    let upper = upper_on(&base, &lowers[0]);
    let stack = Stack {
        lowers,
        upper: Some(upper),
    };
    exercise(&scratch, test, stack, plain, seed);
    mount::unmount_free(&base);
}

fn lowers_are(kind: Kind, test: &str, seed: u64) {
    if !ready(test, &[kind.needs()]) {
        return;
    }
    let scratch = Scratch::new(test);
    let base = kind.mount(&scratch, "base");
    let (lowers, plain) = generated(&scratch, seed);
    let copies = lowers
        .iter()
        .map(|layer| moved(layer, &base.join(layer.file_name().unwrap()), ALL))
        .collect();
    let upper = upper_on(&scratch, &lowers[0]);
    let stack = Stack {
        lowers: copies,
        upper: Some(upper),
    };
    exercise(&scratch, test, stack, plain, seed);
    mount::unmount_free(&base);
}

fn lowers_are_packed(kind: Packed, test: &str, seed: u64) {
    if !ready(test, &[kind.needs()]) {
        return;
    }
    let scratch = Scratch::new(test);
    let (lowers, plain) = generated(&scratch, seed);
    for tree in lowers.iter().chain([&plain]) {
        whole_seconds(tree);
    }
    let places: Vec<_> = lowers
        .iter()
        .enumerate()
        .map(|(index, tree)| kind.mount(tree, &scratch, &format!("packed{index}")))
        .collect();
    let upper = upper_on(&scratch, &lowers[0]);
    let stack = Stack {
        lowers: places.clone(),
        upper: Some(upper),
    };
    exercise(&scratch, test, stack, plain, seed);
    for place in &places {
        mount::unmount_free(place);
    }
}

/// squashfs keeps no more; folders after what is in them.
fn whole_seconds(tree: &Path) {
    sh_in(
        tree,
        "find . -depth -exec touch -h -d '2009-08-07 06:05:04' {} +",
    )
    .ok();
}

#[test]
fn upper_on_ext4() {
    upper_is(Kind::Ext4, "upper-on-ext4", 1);
}

#[test]
fn upper_on_xfs() {
    upper_is(Kind::Xfs, "upper-on-xfs", 2);
}

#[test]
fn upper_on_btrfs() {
    upper_is(Kind::Btrfs, "upper-on-btrfs", 3);
}

#[test]
fn upper_on_tmpfs() {
    upper_is(Kind::Tmpfs, "upper-on-tmpfs", 4);
}

#[test]
fn lowers_on_xfs() {
    lowers_are(Kind::Xfs, "lowers-on-xfs", 5);
}

#[test]
fn lowers_on_btrfs() {
    lowers_are(Kind::Btrfs, "lowers-on-btrfs", 6);
}

#[test]
fn lowers_on_tmpfs() {
    lowers_are(Kind::Tmpfs, "lowers-on-tmpfs", 7);
}

#[test]
fn lowers_in_squashfs() {
    lowers_are_packed(Packed::Squashfs, "lowers-in-squashfs", 8);
}

#[test]
fn lowers_in_erofs() {
    lowers_are_packed(Packed::Erofs, "lowers-in-erofs", 9);
}

/// A base that knows no extended attributes at all, not even an empty list of them.
#[test]
fn lower_without_extended_attributes() {
    let test = "lower_without_extended_attributes";
    if !ready(test, &[Kind::Ramfs.needs()]) {
        return;
    }
    let scratch = Scratch::new("no-xattrs");
    let base = Kind::Ramfs.mount(&scratch, "base");
    let (_, merged) = generated(&scratch, 10);
    let lower = moved(&merged, &base.join("lower"), WITHOUT_XATTRS);
    let plain = moved(&merged, &scratch.join("plain"), WITHOUT_XATTRS);
    let upper = upper_on(&scratch, &plain);
    let stack = Stack {
        lowers: vec![lower],
        upper: Some(upper),
    };
    exercise(&scratch, test, stack, plain, 10);
    mount::unmount_free(&base);
}

/// A layer there could hide nothing and move no folder: better no mount than a wrong one.
#[test]
fn upper_without_extended_attributes_is_refused() {
    let test = "upper_without_extended_attributes_is_refused";
    if !ready(test, &[Kind::Ramfs.needs()]) {
        return;
    }
    let scratch = Scratch::new("no-xattrs-upper");
    let base = Kind::Ramfs.mount(&scratch, "base");
    let lower = scratch.make("lower");
    let stack = Stack {
        upper: Some(upper_on(&base, &lower)),
        lowers: vec![lower],
    };
    let tested = scratch.make("tested");
    let mut command = std::process::Command::new(cowl_tests::programs::cowlfs());
    command.arg("-o").arg(stack.options("")).arg(&tested);
    run_command(command, b"").fails(1, &["extended attributes", "base/upper"]);
    assert!(mount::at(&tested).is_none());
    mount::unmount_free(&base);
}

#[test]
fn lower_is_a_read_only_mount() {
    let test = "lower_is_a_read_only_mount";
    if !ready(test, &[]) {
        return;
    }
    let scratch = Scratch::new("read-only-bind");
    let (lowers, plain) = generated(&scratch, 11);
    let upper = upper_on(&scratch, &lowers[0]);
    let bound: Vec<_> = lowers
        .iter()
        .enumerate()
        .map(|(index, tree)| images::read_only_bind(tree, &scratch, &format!("bound{index}")))
        .collect();
    let stack = Stack {
        lowers: bound.clone(),
        upper: Some(upper),
    };
    exercise(&scratch, test, stack, plain, 11);
    for place in &bound {
        mount::unmount_free(place);
    }
}

/// Numbers of one filesystem meet those of another here: every one of them begins to count at about
/// the same number.
#[test]
fn layers_on_four_filesystems() {
    let test = "layers_on_four_filesystems";
    let kinds = [Kind::Xfs, Kind::Btrfs, Kind::Ext4];
    if !ready(test, &kinds.map(Kind::needs)) {
        return;
    }
    let scratch = Scratch::new("four");
    let (lowers, plain) = generated(&scratch, 12);
    let bases: Vec<_> = kinds
        .iter()
        .enumerate()
        .map(|(index, kind)| kind.mount(&scratch, &format!("base{index}")))
        .collect();
    let copies = lowers
        .iter()
        .zip(&bases)
        .map(|(layer, base)| moved(layer, &base.join("lower"), ALL))
        .collect();
    let upper = upper_on(&scratch, &lowers[0]);
    let stack = Stack {
        lowers: copies,
        upper: Some(upper),
    };
    exercise(&scratch, test, stack, plain, 12);
    for base in &bases {
        mount::unmount_free(base);
    }
}

#[test]
fn lower_on_a_cowl_mount() {
    let test = "lower_on_a_cowl_mount";
    if !ready(test, &[]) {
        return;
    }
    let scratch = Scratch::new("lower-on-cowl");
    let (lowers, plain) = generated(&scratch, 13);
    let upper = upper_on(&scratch, &lowers[0]);
    // One that is written has an upper of its own, which must not move any more.
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
    exercise(&scratch, test, stack, plain, 13);
    inner.unmount();
}

/// Two mounts show numbers from one filesystem, and may show one and the same file under two names.
#[test]
fn lowers_on_two_cowl_mounts_of_one_layer() {
    let test = "lowers_on_two_cowl_mounts_of_one_layer";
    if !ready(test, &[]) {
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
    // Six names, four files: what is in one mount is not what is in the other.
    let before = tree::read(&tested).unwrap();
    let numbers = |tree: &tree::Tree, names: [&str; 3]| {
        let of = |name: &str| tree[name.as_bytes()].ino;
        names.map(of)
    };
    let [renamed, name, alias] = numbers(&before, ["d/renamed", "d/name", "d/alias"]);
    let [another, other, folder] = numbers(&before, ["another", "other", "d"]);
    assert_eq!(name, alias, "one file");
    let mut all = [renamed, name, another, other, folder];
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
    // Whoever is asked for first must not get a number that is another's.
    for name in ["other", "d/name", "d/alias", "another", "d/renamed", "d"] {
        use std::os::unix::fs::MetadataExt;
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

/// Marks that one mount writes are a user's attributes to the other, and whiteouts too.
fn upper_on_a_cowl_mount(test: &str, seed: u64) {
    if !ready(test, &[]) {
        return;
    }
    let scratch = Scratch::new("upper-on-cowl");
    let (lowers, plain) = generated(&scratch, seed);
    let outer = Stack {
        lowers: vec![scratch.make("bottom")],
        upper: Some((scratch.make("outer-upper"), scratch.make("outer-work"))),
    };
    let place = scratch.make("outer");
    let mounted = Overlay::cowlfs(&outer, &place, "dev,suid");
    let upper = upper_on(&place, &lowers[0]);
    let stack = Stack {
        lowers,
        upper: Some(upper),
    };
    exercise(&scratch, test, stack.clone(), plain.clone(), seed);
    // It is all still there after a new mount of the one below.
    mounted.unmount();
    let mounted = Overlay::cowlfs(&outer, &place, "dev,suid");
    let again = Overlay::cowlfs(&stack, &scratch.make("tested"), "dev,suid");
    let found = tree::read(again.path()).unwrap();
    let expected = tree::read(&plain).unwrap();
    tree::assert_same("mounted anew below", &found, &expected, Compare::HISTORY);
    again.unmount();
    mounted.unmount();
}

#[test]
fn upper_on_a_cowl_mount_once() {
    upper_on_a_cowl_mount("upper_on_a_cowl_mount_once", 14);
}

#[test]
fn upper_on_a_cowl_mount_with_other_content() {
    upper_on_a_cowl_mount("upper_on_a_cowl_mount_with_other_content", 15);
}

#[test]
fn lower_on_the_kernels_overlayfs() {
    let test = "lower_on_the_kernels_overlayfs";
    if !ready(test, &[vec![Need::KernelOverlay]]) {
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
    exercise(&scratch, test, stack, plain, 16);
    mount::unmount_free(kernel.path());
}

#[test]
fn the_kernels_overlayfs_with_its_lower_on_a_cowl_mount() {
    let test = "the_kernels_overlayfs_with_its_lower_on_a_cowl_mount";
    if !ready(test, &[vec![Need::KernelOverlay]]) {
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
        // It counts and breaks hard links as it always does.
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

/// Its upper wants whiteouts, attributes of its own, RENAME_WHITEOUT and RENAME_EXCHANGE of the mount.
#[test]
fn the_kernels_overlayfs_with_its_upper_on_a_cowl_mount() {
    let test = "the_kernels_overlayfs_with_its_upper_on_a_cowl_mount";
    if !ready(test, &[vec![Need::KernelOverlay]]) {
        return;
    }
    let scratch = Scratch::new("kernel-upper");
    let (lowers, plain) = generated(&scratch, 18);
    let outer = Stack {
        lowers: vec![scratch.make("bottom")],
        upper: Some((scratch.make("outer-upper"), scratch.make("outer-work"))),
    };
    let place = scratch.make("outer");
    let ours = Overlay::cowlfs(&outer, &place, "dev,suid");
    let stack = Stack {
        upper: Some(upper_on(&place, &lowers[0])),
        lowers,
    };
    // It counts hard links by what lies in each layer, and breaks them.
    let compare = |when: &str, place: &Path| {
        let found = tree::read(place).unwrap();
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
        chmod 600 mode; chown 1000:1001 owner; setfattr -n user.a -v b attribute; mv keep kept-folder
        mkdir -p new/deep; echo y > new/deep/file; mv new newer; rm -r newer; mkfifo fifo2; rm null";
    sh_in(theirs.path(), work).ok();
    sh_in(&plain, work).ok();
    compare("after changes", theirs.path());
    theirs.unmount();
    ours.unmount();

    // What it left there is what it finds again, and what cowlfs shows of the same layers.
    let ours = Overlay::cowlfs(&outer, &place, "dev,suid");
    let theirs = Overlay::kernel(&stack, &scratch.make("theirs"));
    compare("after new mounts", theirs.path());
    theirs.unmount();
    let again = Overlay::cowlfs(&stack, &scratch.make("again"), "dev,suid");
    compare("the same layers through cowlfs", again.path());
    again.unmount();
    ours.unmount();
}
