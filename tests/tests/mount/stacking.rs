//! Layers on every kind of file system, on each other's mounts, and on two at once: the same operations as on a plain
//! directory have the same results, inode numbers are stable across copy-ups and new mounts, and the base can be
//! unmounted as soon as the mount has ended.
//!
//! `COWL_OTHER=N` adds N to every seed: other layers, other operations.

use std::path::{Path, PathBuf};

use cowl_tests::command::{run_command, sh, sh_in};
use cowl_tests::images::{self, Kind, Packed};
use cowl_tests::mount::{self, Overlay, Stack};

use cowl_tests::scratch::Scratch;

use cowl_tests::workload::{exercise, generated, ready, upper_on};

const ALL: &str = "mode,ownership,timestamps,links,xattr";
const WITHOUT_XATTRS: &str = "mode,ownership,timestamps,links";

fn moved(from: &Path, to: &Path, preserve: &str) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    images::copy(from, to, preserve);
    to.to_owned()
}

/// This does not wait for the daemon, which may still be exiting. This process itself opens nothing below the base,
/// because processes that other tests fork would inherit the descriptor for a moment.
#[test]
fn the_file_system_of_the_layers_can_be_unmounted_after_the_overlay() {
    if !ready(&[Kind::Tmpfs.needs()]) {
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

fn upper_is(kind: Kind, seed: u64) {
    if !ready(&[kind.needs()]) {
        return;
    }
    let scratch = Scratch::for_test();
    let base = kind.mount(&scratch, "base");
    let (lowers, plain) = generated(&scratch, seed);
    let plain = moved(&plain, &base.join("plain"), ALL);
    let upper = upper_on(&base, &lowers[0]);
    let stack = Stack {
        lowers,
        upper: Some(upper),
    };
    exercise(&scratch, stack, plain, seed);
    mount::unmount_free(&base);
}

fn lowers_are(kind: Kind, seed: u64) {
    if !ready(&[kind.needs()]) {
        return;
    }
    let scratch = Scratch::for_test();
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
    exercise(&scratch, stack, plain, seed);
    mount::unmount_free(&base);
}

fn lowers_are_packed(kind: Packed, seed: u64) {
    if !ready(&[kind.needs()]) {
        return;
    }
    let scratch = Scratch::for_test();
    let (lowers, plain) = generated(&scratch, seed);
    for tree in lowers.iter().chain([&plain]) {
        whole_seconds(tree);
    }
    let dirs: Vec<_> = lowers
        .iter()
        .enumerate()
        .map(|(index, tree)| kind.mount(tree, &scratch, &format!("packed{index}")))
        .collect();
    let upper = upper_on(&scratch, &lowers[0]);
    let stack = Stack {
        lowers: dirs.clone(),
        upper: Some(upper),
    };
    exercise(&scratch, stack, plain, seed);
    for dir in &dirs {
        mount::unmount_free(dir);
    }
}

/// Truncates times to seconds, as squashfs does; directories after their entries.
fn whole_seconds(tree: &Path) {
    sh_in(
        tree,
        "find . -depth -exec touch -h -d '2009-08-07 06:05:04' {} +",
    )
    .ok();
}

#[test]
fn an_upper_layer_works_on_ext4() {
    upper_is(Kind::Ext4, 1);
}

#[test]
fn an_upper_layer_works_on_xfs() {
    upper_is(Kind::Xfs, 2);
}

#[test]
fn an_upper_layer_works_on_btrfs() {
    upper_is(Kind::Btrfs, 3);
}

#[test]
fn an_upper_layer_works_on_tmpfs() {
    upper_is(Kind::Tmpfs, 4);
}

#[test]
fn lower_layers_work_on_xfs() {
    lowers_are(Kind::Xfs, 5);
}

#[test]
fn lower_layers_work_on_btrfs() {
    lowers_are(Kind::Btrfs, 6);
}

#[test]
fn lower_layers_work_on_tmpfs() {
    lowers_are(Kind::Tmpfs, 7);
}

#[test]
fn lower_layers_work_in_squashfs() {
    lowers_are_packed(Packed::Squashfs, 8);
}

#[test]
fn lower_layers_work_in_erofs() {
    lowers_are_packed(Packed::Erofs, 9);
}

/// A base that knows no extended attributes at all, not even an empty list of them.
#[test]
fn a_lower_layer_without_xattrs_works() {
    if !ready(&[Kind::Ramfs.needs()]) {
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
    exercise(&scratch, stack, plain, 10);
    mount::unmount_free(&base);
}

/// A layer there could not have whiteouts or renamed directories, so the mount is refused instead of being wrong.
#[test]
fn an_upper_layer_without_xattrs_is_refused() {
    if !ready(&[Kind::Ramfs.needs()]) {
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
fn a_lower_layer_works_on_a_read_only_mount() {
    if !ready(&[]) {
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
    exercise(&scratch, stack, plain, 11);
    for dir in &bound {
        mount::unmount_free(dir);
    }
}

/// Inode numbers of several file systems collide: all of them start at about the same number.
#[test]
fn layers_can_be_on_four_file_systems() {
    let kinds = [Kind::Xfs, Kind::Btrfs, Kind::Ext4];
    if !ready(&kinds.map(Kind::needs)) {
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
    exercise(&scratch, stack, plain, 12);
    for base in &bases {
        mount::unmount_free(base);
    }
}
