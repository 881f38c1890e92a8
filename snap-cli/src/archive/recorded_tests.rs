//! Tests of records in layers: exports and digests contain the original attributes, and ignore hostile records.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{Layer, RecordedAttributes};
use cowl_layers::sys::stat::{self, FileKind};
use cowl_layers::view::View;

use super::bundle::{self, BundleLayer, BundleLayers, DigestMember};
use super::input::{self, Input};
use super::{Compression, export_dir};
use crate::delta::flatten;
use crate::tree::testing::{chmod, chown, describe, is_root, mknod, set_times, set_xattr};
use crate::tree::{digest, digest_dir, digest_portable};

fn view(layer: &Path) -> View {
    View::new(vec![Layer::open(layer, XattrSpace::User).unwrap()])
}

fn record(path: &Path, change: impl FnOnce(&mut RecordedAttributes)) {
    let stat = stat::stat_fd(fs::File::open(path).unwrap().as_fd()).unwrap();
    let mut record = RecordedAttributes::of(&stat);
    change(&mut record);
    let value = record.to_value().unwrap();
    set_xattr(path, XattrSpace::User.recorded(), &value);
}

/// Creates the same tree twice: with real attributes, and with records of them.
fn trees(real: &Path, stored: &Path) {
    for root in [real, stored] {
        fs::create_dir_all(root.join("dir")).unwrap();
        fs::write(root.join("dir/program"), "x").unwrap();
        chmod(&root.join("dir/program"), 0o755);
    }
    let null = rustix::fs::makedev(1, 3);
    chown(&real.join("dir/program"), 33, 34);
    chmod(&real.join("dir/program"), 0o4755);
    set_xattr(&real.join("dir/program"), "trusted.note", b"t");
    mknod(&real.join("null"), FileKind::CharDevice, 0o666, null);
    chmod(&real.join("null"), 0o666);
    fs::write(stored.join("null"), "").unwrap();
    chmod(&stored.join("null"), 0);
    chown(&real.join("dir"), 5, 6);
    for root in [real, stored] {
        for path in ["dir/program", "null", "dir", ""] {
            set_times(&root.join(path), 5, 6);
        }
    }
    record(&stored.join("dir/program"), |record| {
        (record.mode, record.uid, record.gid) = (0o104_755, 33, 34);
        record.set_xattr(b"trusted.note", b"t");
    });
    record(&stored.join("null"), |record| {
        (record.mode, record.rdev) = (0o020_666, null);
    });
    record(&stored.join("dir"), |record| {
        (record.uid, record.gid) = (5, 6)
    });
}

#[test]
fn digests_and_exports_have_the_original_attributes() {
    if !is_root() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let [real, stored, flat, exported] =
        ["real", "stored", "flat", "exported"].map(|name| scratch.path().join(name));
    trees(&real, &stored);
    let want = digest_dir(&real, &mut |_| {}).unwrap();
    assert_eq!(digest(&view(&stored), &mut |_| {}).unwrap(), want);
    fs::create_dir(&flat).unwrap();
    flatten(&view(&stored), None, &flat, &mut |_| {}).unwrap();
    assert_eq!(digest(&view(&flat), &mut |_| {}).unwrap(), want);
    fs::create_dir(&exported).unwrap();
    export_dir::fill(&view(&flat), &exported, &mut |_| {}).unwrap();
    assert_eq!(describe(&exported), describe(&real));
    // The layers of another user, whose records would become devices and programs with setuid of the host.
    let other = scratch.path().join("other");
    fs::create_dir(&other).unwrap();
    chown(&flat, 7, 7);
    export_dir::fill(&view(&flat), &other, &mut |_| {}).unwrap();
    let found = describe(&other);
    assert_ne!(found, describe(&real));
    let null = stat::stat_fd(fs::File::open(other.join("null")).unwrap().as_fd()).unwrap();
    assert_eq!(null.mode, 0o100_000, "{found:?}");
}

/// A bundle of a plain user contains the original attributes, which root can store.
#[test]
fn bundles_have_the_original_attributes() {
    if !is_root() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let [real, stored, imported] =
        ["real", "stored", "imported"].map(|name| scratch.path().join(name));
    trees(&real, &stored);
    fs::create_dir(&imported).unwrap();
    let layer = BundleLayer {
        name: "one".to_owned(),
        layer: Layer::open(&stored, XattrSpace::User).unwrap(),
        digest: DigestMember::Computed,
    };
    let layers = BundleLayers {
        base: Vec::new(),
        sent: vec![layer],
    };
    let mut data = Vec::new();
    bundle::write(b"m", &layers, &mut data, Compression::None, &mut |_| {}).unwrap();
    let Input::Container(mut bundle) = input::open(data.as_slice()).unwrap() else {
        panic!("not a bundle");
    };
    let spaces = (XattrSpace::User, XattrSpace::Trusted);
    let read = bundle.read_layer("one", &imported, spaces, &mut |_| {});
    // The digest does not depend on the store.
    let found = digest_portable(&imported, XattrSpace::Trusted, &mut |_| {}).unwrap();
    assert_eq!(read.unwrap().digest, Some(found));
    assert!(bundle.finish().unwrap().notes.is_empty());
    assert_eq!(describe(&imported), describe(&real));
}

#[test]
fn hostile_records_are_ignored() {
    if !is_root() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let [real, stored] = ["real", "stored"].map(|name| scratch.path().join(name));
    for root in [&real, &stored] {
        fs::create_dir(root).unwrap();
        fs::write(root.join("file"), "").unwrap();
        set_times(&root.join("file"), 5, 6);
        set_times(root, 5, 6);
    }
    let want = digest_dir(&real, &mut |_| {}).unwrap();
    let file = stored.join("file");
    let hostile: [&dyn Fn(&mut RecordedAttributes); 4] = [
        // A whiteout, an invalid ACL, a type without a device, and a record of another file.
        &|record| record.mode = 0o020_666,
        &|record| record.set_xattr(b"system.posix_acl_access", b"garbage"),
        &|record| record.mode = 0o040_755,
        &|record| (record.stored.uid, record.uid, record.stored.mode) = (1, 2, 0o100_600),
    ];
    for (index, change) in hostile.iter().enumerate() {
        record(&file, |record| change(record));
        assert_eq!(
            digest(&view(&stored), &mut |_| {}).unwrap(),
            want,
            "{index}"
        );
    }
    for value in [&b""[..], b"\x01", &[1; 60], &[0; 53]] {
        set_xattr(&file, XattrSpace::User.recorded(), value);
        assert_eq!(digest(&view(&stored), &mut |_| {}).unwrap(), want);
    }
}
