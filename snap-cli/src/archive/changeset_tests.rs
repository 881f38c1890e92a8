//! Tests of changesets: unpacked over one state, they result in the other one, including all attributes. Also tests the
//! export of plain directories, with which the results are compared here.

use std::fs;
use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::view::View;

use super::{Compression, changeset, export_dir, import};
use crate::delta::stack_tests::{Stack, random_stack, seeds, view};
use crate::tree::error::{ErrorKind, TreeError};
use crate::tree::omissions::Unsupported;
use crate::tree::testing::{self, assert_same, describe, is_root, one_of_everything, run};
use crate::tree::{digest, digest_dir};

fn changeset_of(old: Option<&View>, new: &View) -> Result<Vec<u8>, TreeError> {
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

/// Asserts for each pair of states that the changeset, applied to the lower state, results in the upper one.
fn assert_all_changesets_apply(stack: &Stack, label: &str) {
    let count = stack.layers.len();
    for low in 1..count {
        for high in low + 1..=count {
            let name = format!("{label}-{low}-{high}");
            let (old, new) = (view(&stack.down(..low)), view(&stack.down(..high)));
            let data = changeset_of(Some(&old), &new).unwrap();
            let layer = stack.create_dir(&format!("layer-{name}"));
            import::image_layer(
                &*data,
                &layer,
                (Some(old), XattrSpace::Trusted),
                Unsupported::Refuse,
                &mut |_| {},
            )
            .unwrap_or_else(|error| panic!("{name}: {error}\n{:#?}", names(&data)));
            let target = stack.create_dir(&format!("apply-{name}"));
            let applied = view(&[vec![layer], stack.down(..low)].concat());
            export_dir::fill(&applied, &target, &mut |_| {}).unwrap();
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
fn changesets_of_random_states_apply() {
    if !is_root() {
        return;
    }
    for seed in seeds() {
        assert_all_changesets_apply(&random_stack(seed), &format!("seed{seed}"));
    }
}

fn everything_but_whiteout_names(at: &Path) {
    one_of_everything(at);
    fs::remove_file(at.join(".wh.name")).unwrap();
}

#[test]
fn changeset_has_the_entries_of_an_image_layer() {
    if !is_root() {
        return;
    }
    let mut stack = Stack::new();
    let base = stack.layer();
    everything_but_whiteout_names(&base);
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
    let entries = names(&changeset_of(Some(&old), &new).unwrap());
    assert_eq!(
        entries,
        [
            "./",
            "./.wh.gone",
            "./.wh.moved",
            // The kernel's copy-up breaks hard links.
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
    assert_all_changesets_apply(&stack, "hand");
    // Without a change there are no entries.
    assert_eq!(
        names(&changeset_of(Some(&new), &new).unwrap()),
        Vec::<String>::new()
    );
    // Without an old state the changeset contains everything, in the form of a plain archive.
    let all = changeset_of(None, &old).unwrap();
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
    let paths = [file.as_os_str(), "-C".as_ref(), plain.as_os_str()];
    run("tar", &[&args[..], &paths].concat());
    assert_same(&plain, &describe(&base), "all of it");
}

#[test]
fn file_with_a_whiteout_name_is_refused() {
    let mut stack = Stack::new();
    let base: PathBuf = stack.layer();
    fs::write(base.join(".wh.file"), b"").unwrap();
    let error = changeset_of(None, &view(&stack.down(..))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let top = stack.layer();
    testing::mknod(
        &top.join("x"),
        cowl_layers::sys::stat::FileKind::Fifo,
        0o600,
        0,
    );
    let (old, new) = (view(&stack.down(..1)), view(&stack.down(..)));
    // An unchanged file of such a name needs no entry.
    assert_eq!(
        names(&changeset_of(Some(&old), &new).unwrap()),
        ["./", "./x"]
    );
}

#[test]
fn exports_every_kind_of_file_to_a_directory() {
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
    assert_same(&target, &describe(&base), "a plain directory");
    let sparse = |at: &Path| fs::metadata(at.join("sparse")).unwrap().blocks();
    assert!(sparse(&target) <= sparse(&base) + 16, "holes were filled");
}
