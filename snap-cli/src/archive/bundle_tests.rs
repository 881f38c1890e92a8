//! Tests of bundles: imported layers have the same on-disk form as the exported ones, and truncated or damaged archives
//! are refused.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowl_layers::format::{InodeNumberXattr, XattrSpace};
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::xattr;
use cowl_layers::view::View;

use super::bundle::{self, BundleLayer, BundleLayers, BundleReader, BundleReport, DigestMember};
use super::input::{self, Input};
use super::{Compression, import};
use crate::tree::digest;
use crate::tree::error::{ErrorKind, Result, TreeError};
use crate::tree::omissions::Unsupported;
use crate::tree::testing::{self, assert_same, describe, is_root, one_of_everything};

const NAMES: [&str; 2] = ["lower", "upper"];

fn open(path: &Path) -> Arc<Layer> {
    Layer::open(path, XattrSpace::Trusted).unwrap()
}

/// Creates two layers with all kinds of markers; the lower one is first.
fn create_layers(dir: &Path, large: bool) -> [PathBuf; 2] {
    let [lower, upper] = NAMES.map(|name| {
        fs::create_dir(dir.join(name)).unwrap();
        dir.join(name)
    });
    if large {
        one_of_everything(&lower);
    }
    fs::create_dir(lower.join("old")).unwrap();
    fs::write(lower.join("old/file"), b"content").unwrap();
    fs::write(lower.join("meta"), b"12345").unwrap();
    testing::mknod(&lower.join("socket"), FileKind::Socket, 0o640, 0);
    fs::create_dir(upper.join("new")).unwrap();
    testing::set_xattr(&upper.join("new"), "trusted.overlay.redirect", b"/old");
    testing::mknod(&upper.join("old"), FileKind::CharDevice, 0, 0);
    fs::File::create(upper.join("meta"))
        .unwrap()
        .set_len(5)
        .unwrap();
    testing::set_xattr(&upper.join("meta"), "trusted.overlay.metacopy", b"");
    fs::create_dir(upper.join("shut")).unwrap();
    testing::set_xattr(&upper.join("shut"), "trusted.overlay.opaque", b"y");
    testing::set_xattr(
        &upper.join("shut"),
        "trusted.overlay.overlay.opaque",
        b"a user's",
    );
    for (path, lender) in [("new", "old"), ("meta", "meta")] {
        use std::os::unix::fs::MetadataExt as _;
        let mark = InodeNumberXattr {
            layer: open(&lower).id(),
            ino: fs::metadata(lower.join(lender)).unwrap().ino(),
        };
        testing::set_xattr(
            &upper.join(path),
            "trusted.overlay.cowl.ino",
            &mark.to_value(),
        );
    }
    [lower, upper]
}

fn bundle_of(layers: &[PathBuf; 2], compression: Compression) -> Vec<u8> {
    let sent: Vec<BundleLayer> = NAMES
        .iter()
        .zip(layers)
        .map(|(name, path)| BundleLayer {
            name: (*name).to_owned(),
            layer: open(path),
            digest: DigestMember::Omitted,
        })
        .collect();
    let layers = BundleLayers {
        base: Vec::new(),
        sent,
    };
    let mut data = Vec::new();
    bundle::write(
        b"what is in it",
        &layers,
        &mut data,
        compression,
        &mut |_| {},
    )
    .unwrap();
    data
}

fn read(data: &[u8], space: XattrSpace) -> (tempfile::TempDir, Result<()>) {
    let dir = tempfile::tempdir().unwrap();
    let got = read_into(data, dir.path(), space);
    (dir, got)
}

fn read_into(data: &[u8], dir: &Path, space: XattrSpace) -> Result<()> {
    let Input::Container(mut bundle) = input::open(data)? else {
        return Err(TreeError::new(ErrorKind::NotAnArchive, "a tree"));
    };
    if bundle.manifest() != b"what is in it" {
        return Err(TreeError::new(ErrorKind::Damaged, "another manifest"));
    }
    for name in NAMES {
        fs::create_dir(dir.join(name)).unwrap();
        let spaces = (XattrSpace::Trusted, space);
        bundle.read_layer(name, &dir.join(name), spaces, &mut |_| {})?;
    }
    bundle.finish().map(drop)
}

/// Describes a tree, without the marker xattrs whose values refer to other layers.
fn lines(tree: &Path) -> BTreeMap<String, String> {
    let without = |(path, line): (String, String)| {
        let at = tree.join(&path);
        if path.contains('\\') || at.is_symlink() || !(at.is_file() || at.is_dir()) {
            return (path, line);
        }
        let file = fs::File::open(at).unwrap();
        let mark = "trusted.overlay.cowl.ino";
        let Some(value) = xattr::get(file.as_fd(), mark.as_bytes()).unwrap() else {
            return (path, line);
        };
        let shown = format!(" [{mark}={}]", value.escape_ascii());
        (path, line.replace(&shown, "") + " (borrowed)")
    };
    describe(tree).into_iter().map(without).collect()
}

#[test]
fn layers_round_trip_in_their_on_disk_form() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let old = create_layers(dir.path(), true);
    for compression in [Compression::None, Compression::Zstd] {
        let (new, got) = read(&bundle_of(&old, compression), XattrSpace::Trusted);
        got.unwrap();
        for (name, old) in NAMES.iter().zip(&old) {
            let (got, want) = (lines(&new.path().join(name)), lines(old));
            assert_eq!(got, want, "{name}");
        }
        // The objects borrow the numbers of the new layer.
        let [lower, upper] = NAMES.map(|name| open(&new.path().join(name)));
        let view = View::new(vec![upper, lower]);
        use std::os::unix::fs::MetadataExt as _;
        let names = view.list(&view.root().unwrap()).unwrap();
        for (path, lender) in [("new", "old"), ("meta", "meta")] {
            let shown = names.iter().find(|entry| &*entry.name == path.as_bytes());
            let lower = new.path().join("lower").join(lender);
            assert_eq!(
                shown.unwrap().ino,
                fs::metadata(lower).unwrap().ino(),
                "{path}"
            );
        }
    }
}

#[test]
fn layers_are_converted_to_the_other_xattr_namespace() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let old = create_layers(dir.path(), false);
    let (new, got) = read(&bundle_of(&old, Compression::None), XattrSpace::User);
    got.unwrap();
    let view = |layers: [PathBuf; 2], space| {
        let [lower, upper] = layers.map(|path| Layer::open(&path, space).unwrap());
        View::new(vec![upper, lower])
    };
    let was = view(old, XattrSpace::Trusted);
    let is = view(NAMES.map(|name| new.path().join(name)), XattrSpace::User);
    let digest = |view: &View| digest(view, &mut |_| {}).unwrap();
    assert_eq!(digest(&is), digest(&was));
    let lines = describe(&new.path().join("upper"));
    assert!(
        lines["new"].contains("[user.overlay.redirect=/old]"),
        "{lines:?}"
    );
    assert!(
        lines["new"].contains("[user.overlay.cowl.ino="),
        "{lines:?}"
    );
    assert!(
        lines["shut"].contains("[trusted.overlay.opaque=a user\\'s]"),
        "{lines:?}"
    );
}

#[test]
fn archive_truncated_anywhere_is_refused() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = bundle_of(&create_layers(dir.path(), false), Compression::None);
    // The end of the archive follows the last checksum: two blocks of zeros, and padding.
    let content = data.len() - data.iter().rev().take_while(|&&byte| byte == 0).count();
    let end = content.next_multiple_of(512) + 512;
    for length in (0..end).step_by(97).chain([end - 1, end - 512, content]) {
        let (_, got) = read(&data[..length], XattrSpace::Trusted);
        let error = got.expect_err("a truncated archive was accepted");
        use ErrorKind::{Empty, NotAnArchive, Truncated};
        assert!(
            [Empty, NotAnArchive, Truncated].contains(&error.kind()),
            "{length}: {error}"
        );
    }
}

#[test]
fn changed_byte_anywhere_is_detected() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let old = create_layers(dir.path(), false);
    let data = bundle_of(&old, Compression::None);
    let want = NAMES
        .iter()
        .zip(&old)
        .map(|(_, path)| lines(path))
        .collect::<Vec<_>>();
    let mut detected = 0;
    for at in (0..data.len()).step_by(127) {
        let mut data = data.clone();
        data[at] ^= 1 << (at % 8);
        let (new, got) = read(&data, XattrSpace::Trusted);
        match got {
            Err(_) => detected += 1,
            // The byte has no meaning: it is after the end, or in the header of a checksum file.
            Ok(()) => {
                for (name, want) in NAMES.iter().zip(&want) {
                    assert_eq!(&lines(&new.path().join(name)), want, "byte {at}");
                }
            }
        }
    }
    assert!(
        detected > data.len() / 127 / 3,
        "{detected} of {}",
        data.len() / 127
    );
}

#[test]
fn bundle_is_refused_as_a_tree() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let data = bundle_of(&create_layers(dir.path(), false), Compression::None);
    let target = tempfile::tempdir().unwrap();
    let got = import::from_stream(
        &*data,
        target.path(),
        XattrSpace::Trusted,
        Unsupported::Refuse,
        &mut |_| {},
    );
    assert_eq!(got.unwrap_err().kind(), ErrorKind::WholeContainer);
    assert_same(target.path(), &describe(target.path()), "untouched");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 0);
}

fn bundle_layer(name: &str, path: &Path, digest: &DigestMember) -> BundleLayer {
    BundleLayer {
        name: name.to_owned(),
        layer: open(path),
        digest: digest.clone(),
    }
}

fn write(layers: &BundleLayers) -> (&'static [u8], BundleReport) {
    let mut data = Vec::new();
    let none = Compression::None;
    let report = bundle::write(b"m", layers, &mut data, none, &mut |_| {}).unwrap();
    (Box::leak(data.into_boxed_slice()), report)
}

fn reader(data: &'static [u8]) -> BundleReader<'static> {
    match input::open(data).unwrap() {
        Input::Container(bundle) => bundle,
        Input::Tree(_) => panic!("a tree"),
    }
}

/// Asserts that the upper layer at `tree` has borrowed the numbers of the lower layer.
fn assert_borrows_from(tree: &Path, lower: &Path) {
    use std::os::unix::fs::MetadataExt as _;
    for (borrower, lender) in [("new", "old"), ("meta", "meta")] {
        let file = fs::File::open(tree.join(borrower)).unwrap();
        let value = xattr::get(file.as_fd(), b"trusted.overlay.cowl.ino").unwrap();
        let mark = InodeNumberXattr::parse(&value.unwrap()).unwrap().unwrap();
        let ino = fs::metadata(lower.join(lender)).unwrap().ino();
        assert_eq!(
            (mark.layer, mark.ino),
            (open(lower).id(), ino),
            "{borrower}"
        );
    }
}

/// A layer whose base is not in the archive borrows numbers from the reader's copy of the base, also if the base was
/// received again and replaced by that copy.
#[test]
fn borrowed_numbers_refer_to_the_copy_of_the_reader() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let old = create_layers(dir.path(), false);
    let computed = DigestMember::Computed;
    let both = BundleLayers {
        base: Vec::new(),
        sent: vec![
            bundle_layer("lower", &old[0], &computed),
            bundle_layer("upper", &old[1], &computed),
        ],
    };
    let upper = BundleLayers {
        base: vec![("lower".to_owned(), open(&old[0]))],
        sent: vec![bundle_layer("upper", &old[1], &DigestMember::Omitted)],
    };
    let spaces = (XattrSpace::Trusted, XattrSpace::Trusted);
    let [lower, copy, first, second] = ["1", "2", "3", "4"].map(|name| {
        fs::create_dir(dir.path().join(name)).unwrap();
        dir.path().join(name)
    });
    let (data, report) = write(&both);
    let names: Vec<_> = report
        .computed
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, NAMES);
    let mut bundle = reader(data);
    let read = bundle
        .read_layer("lower", &lower, spaces, &mut |_| {})
        .unwrap();
    assert_eq!(read.digest.as_ref(), Some(&report.computed[0].1));
    let mut again = reader(data);
    let read = again
        .read_layer("lower", &copy, spaces, &mut |_| {})
        .unwrap();
    again
        .replace_layer(&read, &copy, (&lower, XattrSpace::Trusted))
        .unwrap();
    again
        .read_layer("upper", &first, spaces, &mut |_| {})
        .unwrap();
    again.finish().unwrap();

    let mut bundle = reader(write(&upper).0);
    bundle
        .read_base("lower", &lower, XattrSpace::Trusted)
        .unwrap();
    bundle
        .read_layer("upper", &second, spaces, &mut |_| {})
        .unwrap();
    bundle.finish().unwrap();
    for tree in [&first, &second] {
        assert_borrows_from(tree, &lower);
    }
    // The list of numbers is required.
    let mut bundle = reader(data);
    let error = bundle
        .read_base("lower", &lower, XattrSpace::Trusted)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
}
