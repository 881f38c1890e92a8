//! Tests of export: GNU tar and cowl's import unpack the exported tree.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;

use super::{Compression, Holes, export, import};
use crate::tree::omissions::Unsupported;
use crate::tree::testing::{self, assert_same, describe, is_root, one_of_everything, run};
use crate::tree::{digest, digest_dir};

fn view(layers: &[&Path]) -> View {
    let open = |path: &&Path| Layer::open(path, XattrSpace::Trusted).unwrap();
    View::new(layers.iter().map(open).collect())
}

fn pack(view: &View, compression: Compression) -> Vec<u8> {
    let mut out = Vec::new();
    export::write_tar(
        view,
        None,
        Holes::Skipped,
        &mut out,
        compression,
        &mut |_| {},
    )
    .unwrap();
    out
}

fn gnu_unpack(archive: &[u8], into: &Path) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), archive).unwrap();
    let mut args = vec![OsStr::new("-C"), into.as_os_str()];
    args.extend(
        [
            "--acls",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-xpf",
        ]
        .map(OsStr::new),
    );
    args.push(file.path().as_os_str());
    run("tar", &args);
}

#[test]
fn gnu_tar_and_import_unpack_the_same_tree() {
    if !is_root() {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    one_of_everything(source.path());
    fs::hard_link(source.path().join("fifo"), source.path().join("fifo2")).unwrap();
    let want = describe(source.path());
    let view = view(&[source.path()]);
    let want_digest = digest(&view, &mut |_| {}).unwrap();
    assert_eq!(digest_dir(source.path(), &mut |_| {}).unwrap(), want_digest);
    for compression in [
        Compression::None,
        Compression::Gzip,
        Compression::Zstd,
        Compression::Xz,
    ] {
        let archive = pack(&view, compression);
        assert_eq!(
            pack(&view, compression),
            archive,
            "not the same bytes again"
        );
        for unpack in [gnu_unpack, |data: &[u8], into: &Path| {
            import::from_stream(
                data,
                into,
                XattrSpace::detect(),
                Unsupported::Refuse,
                &mut |_| {},
            )
            .unwrap();
        }] {
            let target = tempfile::tempdir().unwrap();
            unpack(&archive, target.path());
            assert_same(target.path(), &want, &format!("{compression:?}"));
            let blocks = fs::metadata(target.path().join("sparse")).unwrap().blocks();
            assert!(blocks < 200, "{blocks} blocks for a sparse file");
            assert_eq!(digest_dir(target.path(), &mut |_| {}).unwrap(), want_digest);
        }
    }
}

#[test]
fn file_larger_than_the_ustar_limit_is_exported() {
    use std::os::unix::fs::FileExt as _;
    let source = tempfile::tempdir().unwrap();
    let file = fs::File::create(source.path().join("huge")).unwrap();
    file.set_len(20 << 30).unwrap();
    file.write_all_at(b"in the middle", 12 << 30).unwrap();
    let archive = pack(&view(&[source.path()]), Compression::None);
    let want = digest_dir(source.path(), &mut |_| {}).unwrap();
    for unpack in [gnu_unpack, |data: &[u8], into: &Path| {
        import::from_stream(
            data,
            into,
            XattrSpace::detect(),
            Unsupported::Refuse,
            &mut |_| {},
        )
        .unwrap();
    }] {
        let target = tempfile::tempdir().unwrap();
        unpack(&archive, target.path());
        assert_eq!(digest_dir(target.path(), &mut |_| {}).unwrap(), want);
    }
}

#[test]
fn sockets_are_skipped_with_a_note() {
    let source = tempfile::tempdir().unwrap();
    testing::mknod(&source.path().join("socket"), FileKind::Socket, 0o755, 0);
    fs::write(source.path().join("file"), b"x").unwrap();
    let mut out = Vec::new();
    let got = export::write_tar(
        &view(&[source.path()]),
        None,
        Holes::Skipped,
        &mut out,
        Compression::None,
        &mut |_| {},
    )
    .unwrap();
    let notes = got.notes.lines();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].starts_with("socket: "), "{}", notes[0]);
    assert_eq!(got.done.entries, 2);
    assert_eq!(out.len() % 10240, 0);
}

#[test]
fn full_disk_is_an_error() {
    let source = tempfile::tempdir().unwrap();
    fs::write(source.path().join("file"), vec![1; 1 << 20]).unwrap();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    for compression in [Compression::None, Compression::Zstd] {
        let got = export::write_tar(
            &view(&[source.path()]),
            None,
            Holes::Skipped,
            &full,
            compression,
            &mut |_| {},
        );
        assert_eq!(got.unwrap_err().kind(), crate::tree::ErrorKind::NoSpace);
    }
}
