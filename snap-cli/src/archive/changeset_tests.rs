//! Tests of deltas: unpacked over the one state they give the other, to the last attribute. And of plain
//! folders, which are what they are unpacked over here.

use std::fs;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::view::View;

use super::{Compression, changeset, export_dir, import};
use crate::delta::stack_tests::{Stack, random_stack, seeds, view};
use crate::tree::error::{ErrorKind, TreeError};
use crate::tree::testing::{self, assert_same, describe, is_root, one_of_everything, run};
use crate::tree::{digest, digest_dir};

fn written(old: Option<&View>, new: &View) -> Result<Vec<u8>, TreeError> {
    let mut data = Vec::new();
    changeset::tar(old, new, &mut data, Compression::None, &mut |_| {})?;
    Ok(data)
}

fn names(data: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(data);
    let entries = archive.entries().unwrap();
    let name = |entry: std::io::Result<tar::Entry<'_, _>>| {
        let entry: tar::Entry<'_, &[u8]> = entry.unwrap();
        String::from_utf8(entry.path_bytes().into_owned()).unwrap()
    };
    entries.map(name).collect()
}

/// Unpacked over the lower state, every delta gives the upper one.
fn every_delta_is_right(stack: &Stack, what: &str) {
    let count = stack.layers.len();
    for low in 1..count {
        for high in low + 1..=count {
            let name = format!("{what}-{low}-{high}");
            let (old, new) = (view(&stack.down(..low)), view(&stack.down(..high)));
            let target = stack.create_dir(&format!("apply-{name}"));
            export_dir::fill(&old, &target, &mut |_| {}).unwrap();
            assert_eq!(
                digest_dir(&target, &mut |_| {}).unwrap(),
                digest(&old, &mut |_| {}).unwrap(),
                "{name}: the folder"
            );
            let data = written(Some(&old), &new).unwrap();
            import::changes(&*data, &target, XattrSpace::Trusted, &mut |_| {})
                .unwrap_or_else(|error| panic!("{name}: {error}\n{:#?}", names(&data)));
            let want = stack.create_dir(&format!("want-{name}"));
            export_dir::fill(&new, &want, &mut |_| {}).unwrap();
            assert_same(&target, &describe(&want), &name);
            assert_eq!(
                digest_dir(&target, &mut |_| {}).unwrap(),
                digest(&new, &mut |_| {}).unwrap(),
                "{name}"
            );
        }
    }
}

#[test]
fn a_delta_over_a_random_state_gives_the_next_one() {
    if !is_root() {
        return;
    }
    for seed in seeds() {
        every_delta_is_right(&random_stack(seed), &format!("seed{seed}"));
    }
}

fn everything_but_names_of_marks(at: &Path) {
    one_of_everything(at);
    fs::remove_file(at.join(".wh.name")).unwrap();
}

#[test]
fn a_delta_tells_what_was_done_in_the_words_of_image_layers() {
    if !is_root() {
        return;
    }
    let mut stack = Stack::new();
    let base = stack.layer();
    everything_but_names_of_marks(&base);
    for name in ["gone", "moved", "refilled", "quiet"] {
        fs::create_dir_all(base.join(name).join("inner")).unwrap();
        fs::write(base.join(name).join("inner/file"), name).unwrap();
    }
    stack.write(|at| {
        fs::remove_dir_all(at.join("gone")).unwrap();
        fs::rename(at.join("moved"), at.join("quiet/moved")).unwrap();
        fs::remove_dir_all(at.join("refilled")).unwrap();
        fs::create_dir(at.join("refilled")).unwrap();
        fs::write(at.join("refilled/new"), b"n").unwrap();
        testing::chmod(&at.join("dir/big"), 0o600);
        fs::remove_file(at.join("link")).unwrap();
        fs::create_dir(at.join("link")).unwrap();
        fs::write(at.join("a-hard"), b"all three names").unwrap();
    });
    let (old, new) = (view(&stack.down(..1)), view(&stack.down(..)));
    let told = names(&written(Some(&old), &new).unwrap());
    assert_eq!(
        told,
        [
            "./",
            "./.wh.gone",
            "./.wh.moved",
            // The kernel breaks hard links when it copies up.
            "./a-hard",
            "./dir/",
            "./dir/big",
            "./link/",
            "./quiet/",
            "./quiet/moved/",
            "./quiet/moved/inner/",
            "./quiet/moved/inner/file",
            "./refilled/",
            "./refilled/.wh..wh..opq",
            "./refilled/new",
        ]
    );
    every_delta_is_right(&stack, "hand");
    // Nothing changed: nothing is told.
    assert_eq!(
        names(&written(Some(&new), &new).unwrap()),
        Vec::<String>::new()
    );
    // Against nothing everything is, in the same form as a plain archive.
    let all = written(None, &old).unwrap();
    let plain = stack.create_dir("plain");
    let file = stack.create_dir("tar").join("all.tar");
    fs::write(&file, all).unwrap();
    let args = [
        "--numeric-owner",
        "--acls",
        "--xattrs",
        "--xattrs-include=*",
        "-xpf",
    ];
    let args: Vec<&std::ffi::OsStr> = args.iter().map(AsRef::as_ref).collect();
    let place = [file.as_os_str(), "-C".as_ref(), plain.as_os_str()];
    run("tar", &[&args[..], &place].concat());
    assert_same(&plain, &describe(&base), "all of it");
}

#[test]
fn a_name_that_means_a_deletion_is_refused() {
    let mut stack = Stack::new();
    let base: PathBuf = stack.layer();
    fs::write(base.join(".wh.file"), b"").unwrap();
    let error = written(None, &view(&stack.down(..))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let top = stack.layer();
    testing::mknod(
        &top.join("x"),
        cowl_layers::sys::stat::FileKind::Fifo,
        0o600,
        0,
    );
    let (old, new) = (view(&stack.down(..1)), view(&stack.down(..)));
    // It was there before, so nothing need be said of it.
    assert_eq!(names(&written(Some(&old), &new).unwrap()), ["./", "./x"]);
}

#[test]
fn one_of_everything_as_a_plain_folder() {
    if !is_root() {
        return;
    }
    use std::os::unix::fs::MetadataExt as _;
    let mut stack = Stack::new();
    let base = stack.layer();
    one_of_everything(&base);
    let socket = cowl_layers::sys::stat::FileKind::Socket;
    testing::mknod(&base.join("socket"), socket, 0o755, 0);
    let target = stack.create_dir("target");
    export_dir::fill(&view(&stack.down(..)), &target, &mut |_| {}).unwrap();
    assert_same(&target, &describe(&base), "a plain folder");
    let sparse = |at: &Path| fs::metadata(at.join("sparse")).unwrap().blocks();
    assert!(sparse(&target) <= sparse(&base) + 16, "holes were filled");
}
