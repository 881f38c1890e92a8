//! Tests of import: archives of GNU tar, directories, and handmade invalid archives.

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::{Found, View, user_xattrs};
use tar::{EntryType, Header};

use super::import;
use super::pax::Records;
use super::report::TransferReport;
use crate::tree::error::{ErrorKind, Result, TreeError};
use crate::tree::omissions::Unsupported;
use crate::tree::testing::{self, assert_same, describe, is_root, one_of_everything, run};

pub(super) fn import_tar(data: &[u8]) -> (tempfile::TempDir, Result<TransferReport>) {
    let target = tempfile::tempdir().unwrap();
    let got = import::from_stream(
        data,
        target.path(),
        XattrSpace::detect(),
        Unsupported::Refuse,
        &mut |_| {},
    );
    (target, got)
}

fn import_dir(source: &Path, target: &Path) -> Result<TransferReport> {
    import::from_path(
        source,
        target,
        XattrSpace::detect(),
        Unsupported::Refuse,
        &mut |_| {},
    )
}

fn gnu_tar(source: &Path, options: &[&str]) -> Vec<u8> {
    let mut args: Vec<&OsStr> = options.iter().map(OsStr::new).collect();
    args.extend([OsStr::new("-C"), source.as_os_str()]);
    args.extend(
        [
            "--acls",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-cf",
            "-",
            ".",
        ]
        .map(OsStr::new),
    );
    run("tar", &args)
}

#[test]
fn directory_is_copied_exactly() {
    if !is_root() {
        return;
    }
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    one_of_everything(source.path());
    testing::mknod(&source.path().join("socket"), FileKind::Socket, 0o755, 0);
    fs::hard_link(source.path().join("fifo"), source.path().join("fifo2")).unwrap();
    let want = describe(source.path());
    let atime = fs::metadata(source.path().join("plain"))
        .unwrap()
        .accessed()
        .unwrap();
    let before = fs::metadata(source.path().join("sparse")).unwrap();
    // A default ACL that the target inherited must not affect the objects created in it.
    testing::set_xattr(target.path(), "system.posix_acl_default", testing::ACL);
    let got = import_dir(source.path(), target.path()).unwrap();
    assert!(got.notes.is_empty());
    assert_eq!(got.done.entries as usize, want.len() - 1);
    let copied = fs::metadata(target.path().join("plain")).unwrap();
    assert_eq!(copied.accessed().unwrap(), atime);
    assert_same(target.path(), &want, "a directory");
    use std::os::unix::fs::MetadataExt as _;
    let sparse = fs::metadata(target.path().join("sparse")).unwrap();
    assert!(sparse.blocks() <= before.blocks() + 16, "holes were filled");
}

#[test]
fn archives_of_gnu_tar_are_unpacked_exactly() {
    if !is_root() {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    one_of_everything(source.path());
    let want = describe(source.path());
    let posix = ["--format=posix"];
    for options in [
        &posix[..],
        &["--format=posix", "--sparse"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "-z"],
        &["--format=posix", "--zstd"],
        &["--format=posix", "-J"],
    ] {
        let (target, got) = import_tar(&gnu_tar(source.path(), options));
        got.unwrap_or_else(|error| panic!("{options:?}: {error}"));
        assert_same(target.path(), &want, &format!("{options:?}"));
        if options.contains(&"--sparse") {
            use std::os::unix::fs::MetadataExt as _;
            let blocks = fs::metadata(target.path().join("sparse")).unwrap().blocks();
            assert!(
                blocks < 200,
                "{options:?}: {blocks} blocks for a sparse file"
            );
        }
    }
}

#[test]
fn old_gnu_format_is_unpacked_with_whole_seconds() {
    if !is_root() {
        return;
    }
    let source = tempfile::tempdir().unwrap();
    one_of_everything(source.path());
    // 40 segments: more than the header and one extension block can contain.
    let file = fs::File::create(source.path().join("many-segments")).unwrap();
    for segment in 0..40 {
        use std::os::unix::fs::FileExt as _;
        file.write_all_at(b"data", segment << 20).unwrap();
    }
    drop(file);
    let args = [
        "--format=gnu",
        "--sparse",
        "-C",
        source.path().to_str().unwrap(),
        "-cf",
        "-",
        ".",
    ];
    let data = run("tar", &args.map(OsStr::new));
    let (target, got) = import_tar(&data);
    got.unwrap();
    let plain = |tree| -> Vec<(String, String)> {
        let cut = |line: String| {
            let line = line.split(" [").next().unwrap().to_owned();
            let (start, end) = line.split_once('.').unwrap();
            format!("{start}{}", &end[9..])
        };
        describe(tree)
            .into_iter()
            .map(|(path, line)| (path, cut(line)))
            .collect()
    };
    assert_eq!(plain(target.path()), plain(source.path()));
}

/// A builder of handmade archives.
#[derive(Clone, Default)]
pub(super) struct Tar(pub(super) Vec<u8>);

impl Tar {
    pub(super) fn entry(mut self, kind: EntryType, path: &[u8], link: &[u8], data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, path: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, b"", b"x")
    }

    pub(super) fn pax(self, records: &[(&[u8], &[u8])]) -> Self {
        let mut all = Records::default();
        for (key, value) in records {
            all.push(*key, *value);
        }
        let data = all.to_bytes();
        self.entry(EntryType::XHeader, b"pax", b"", &data)
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }

    pub(super) fn refused(self) -> TreeError {
        let (_target, got) = import_tar(&self.end());
        got.unwrap_err()
    }
}

#[test]
fn xattrs_and_devices_that_look_like_markers_are_escaped() {
    let root = is_root();
    let space = XattrSpace::detect();
    let name = |mark: &str| [space.prefix(), mark].concat();
    let names = [name("opaque"), name("redirect"), name("overlay.x")];
    let show = |target: &Path| {
        let view = View::new(vec![Layer::open(target, space).unwrap()]);
        let root = view.root().unwrap();
        let shown = view.list(&root).unwrap().into_iter().map(|entry| {
            let Found::File(file) = view.lookup(&root, &entry.name).unwrap() else {
                panic!("{} is not a file", entry.name);
            };
            assert_eq!(file.stat.kind(), entry.kind, "{}", entry.name);
            let xattrs = user_xattrs(space, file.loc.xattrs().unwrap());
            let plain = entry.kind == FileKind::CharDevice && file.stat.rdev == 0;
            (entry.name.to_string(), plain, xattrs)
        });
        shown.collect::<Vec<_>>()
    };
    let mut tar = Tar::default().entry(EntryType::Char, b"a-device", b"", b"");
    for name in &names {
        let key = [b"SCHILY.xattr.", name.as_bytes()].concat();
        tar = tar.pax(&[(&key, b"y")]).file(name.as_bytes());
    }
    let (target, got) = import_tar(&tar.end());
    got.unwrap();
    let mut expected = vec![("a-device".to_owned(), true, Vec::new())];
    for name in &names {
        let value = vec![(name.as_bytes().to_vec(), b"y".to_vec())];
        expected.push((name.clone(), false, value));
    }
    expected.sort();
    assert_eq!(show(target.path()), expected);
    if !root {
        return;
    }
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    testing::mknod(&source.path().join("a-device"), FileKind::CharDevice, 0, 0);
    for name in &names {
        fs::write(source.path().join(name), b"").unwrap();
        testing::set_xattr(&source.path().join(name), name, b"y");
    }
    import_dir(source.path(), target.path()).unwrap();
    assert_eq!(show(target.path()), expected);
}

#[test]
fn inputs_that_are_not_tar_archives_have_different_errors() {
    for (data, want) in [
        (&b""[..], ErrorKind::Empty),
        (&[0; 10240], ErrorKind::Empty),
        (b"just some text", ErrorKind::NotAnArchive),
        (&[b'x'; 2000], ErrorKind::NotAnArchive),
        (b"BZh91AY&SY and so on", ErrorKind::NotAnArchive),
        (b"\x1f\x8b\x08\0broken", ErrorKind::Truncated),
    ] {
        let (_target, got) = import_tar(data);
        assert_eq!(
            got.unwrap_err().kind(),
            want,
            "{}",
            data[..data.len().min(20)].escape_ascii()
        );
    }
    let mut header = Tar::default().file(b"one").file(b"two");
    header.0[1024 + 3] ^= 1;
    assert_eq!(header.refused().kind(), ErrorKind::Damaged);
}

#[test]
fn truncation_anywhere_is_detected() {
    let noise: Vec<u8> = (0..5000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let whole = Tar::default()
        .entry(EntryType::Regular, b"first", b"", &noise)
        .entry(EntryType::Regular, b"last", b"", &noise)
        .end();
    let without_end = &whole[..whole.len() - 1024];
    // This includes truncation between two entries, and before the end marker.
    let first = 512 + noise.len().next_multiple_of(512);
    for cut in [
        100,
        600,
        15_000,
        first,
        without_end.len() - 600,
        without_end.len(),
    ] {
        let error = import_tar(&whole[..cut]).1.unwrap_err();
        let want = if cut < 512 {
            ErrorKind::NotAnArchive
        } else {
            ErrorKind::Truncated
        };
        assert_eq!(error.kind(), want, "{cut}: {error}");
    }
    for compression in [
        super::Compression::Gzip,
        super::Compression::Zstd,
        super::Compression::Xz,
    ] {
        let mut encoder = super::compress::Encoder::new(Vec::new(), compression).unwrap();
        encoder.write_all(&whole).unwrap();
        let packed = encoder.finish().unwrap();
        import_tar(&packed).1.unwrap();
        for cut in [packed.len() - 1, packed.len() - 8, packed.len() / 2, 20] {
            let error = import_tar(&packed[..cut]).1.unwrap_err();
            assert_eq!(
                error.kind(),
                ErrorKind::Truncated,
                "{compression:?} {cut}: {error}"
            );
        }
        let mut bad = packed.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 0x55;
        assert!(
            import_tar(&bad).1.is_err(),
            "{compression:?}: damage was not detected"
        );
    }
}

#[test]
fn later_entries_replace_earlier_ones_and_missing_directories_are_created() {
    let archive = Tar::default()
        .file(b"d/e/f")
        .entry(EntryType::Symlink, b"x", b"d", b"")
        .entry(EntryType::Directory, b"x", b"", b"")
        .file(b"x/inside")
        .entry(EntryType::Regular, b"d/e/f", b"", b"second")
        .end();
    let (target, got) = import_tar(&archive);
    got.unwrap();
    assert_eq!(fs::read(target.path().join("d/e/f")).unwrap(), b"second");
    assert!(
        fs::symlink_metadata(target.path().join("x"))
            .unwrap()
            .is_dir()
    );
    assert!(!target.path().join("d/inside").try_exists().unwrap());
}

#[test]
fn nonempty_target_and_source_that_contains_the_target_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("store/layer");
    fs::create_dir_all(&target).unwrap();
    let error = import_dir(dir.path(), &target).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overlap);
    assert_eq!(
        import_dir(&target, &target).unwrap_err().kind(),
        ErrorKind::Overlap
    );
    fs::write(target.join("x"), b"").unwrap();
    let archive = Tar::default().file(b"f").end();
    let error = import::from_stream(
        &archive[..],
        &target,
        XattrSpace::detect(),
        Unsupported::Refuse,
        &mut |_| {},
    )
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let missing = import_dir(&dir.path().join("missing"), &target).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn deep_trees_are_imported() {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut fd = cowl_layers::sys::dir::open_root(source.path()).unwrap();
    use std::os::fd::AsFd as _;
    for _ in 0..600 {
        cowl_layers::sys::node::mkdir(fd.as_fd(), b"deeper-and-deeper", 0o755).unwrap();
        fd = cowl_layers::sys::dir::open_dir(fd.as_fd(), b"deeper-and-deeper").unwrap();
    }
    cowl_layers::sys::node::create(fd.as_fd(), b"end", 0o644, rustix::fs::OFlags::WRONLY).unwrap();
    let got = import_dir(source.path(), target.path()).unwrap();
    assert_eq!(got.done.entries, 601);
    let digest = |tree: &Path| crate::tree::digest_dir(tree, &mut |_| {}).unwrap();
    assert_eq!(digest(target.path()), digest(source.path()));
    let archive = gnu_tar(source.path(), &["--format=posix"]);
    let (unpacked, got) = import_tar(&archive);
    assert_eq!(got.unwrap().done.entries, 602);
    drop(unpacked);
}

/// During the import, a hard-linked file in a deep directory temporarily has another name in the root.
#[test]
fn hard_links_in_deep_directories_do_not_change_attributes_of_the_root() {
    let source = tempfile::tempdir().unwrap();
    let deep = source.path().join(vec!["d"; 80].join("/"));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("one"), "x").unwrap();
    fs::hard_link(deep.join("one"), deep.join("two")).unwrap();
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let root = fs::File::open(source.path()).unwrap();
    root.set_permissions(fs::Permissions::from_mode(0o555))
        .unwrap();
    root.set_modified(then).unwrap();
    let verify = |target: &Path| {
        let meta = fs::metadata(target).unwrap();
        assert_eq!(meta.modified().unwrap(), then);
        assert_eq!(meta.mode() & 0o7777, 0o555);
        assert_eq!(fs::read_dir(target).unwrap().count(), 1);
    };
    let target = || tempfile::tempdir().unwrap();
    let (imported, flattened, exported) = (target(), target(), target());
    import_dir(source.path(), imported.path()).unwrap();
    verify(imported.path());
    let layer = Layer::open(imported.path(), XattrSpace::detect()).unwrap();
    let view = View::new(vec![layer]);
    crate::delta::flatten(&view, None, flattened.path(), &mut |_| {}).unwrap();
    verify(flattened.path());
    super::export_dir::fill(&view, exported.path(), &mut |_| {}).unwrap();
    verify(exported.path());
}

#[test]
fn times_have_nanosecond_precision() {
    use std::os::unix::fs::MetadataExt as _;
    let records: [(&[u8], &[u8]); 2] = [(b"mtime", b"-6.5"), (b"atime", b"7.000000009")];
    let archive = Tar::default().pax(&records).file(b"f").end();
    let (target, got) = import_tar(&archive);
    got.unwrap();
    let meta = fs::metadata(target.path().join("f")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), (-7, 500_000_000));
    assert_eq!((meta.atime(), meta.atime_nsec()), (7, 9));
}

#[test]
fn damaged_archives_never_panic_nor_write_elsewhere() {
    let archive = Tar::default()
        .entry(EntryType::Directory, b"d", b"", b"")
        .pax(&[
            (b"path", b"d/sparse"),
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.realsize", b"5000"),
            (b"SCHILY.xattr.user.x", b"value"),
        ])
        .entry(
            EntryType::Regular,
            b"s",
            b"",
            &[&b"1\n10\n8\n"[..], &[0; 505], b"contents"].concat(),
        )
        .entry(EntryType::GNULongName, b"././@LongLink", b"", &[b'n'; 150])
        .file(b"short")
        .entry(EntryType::Symlink, b"l", b"d", b"")
        .entry(EntryType::Link, b"h", b"d/sparse", b"")
        .end();
    import_tar(&archive).1.unwrap();
    let around = tempfile::tempdir().unwrap();
    let mut number = 1_u64;
    let mut refused = 0;
    for round in 0..600 {
        let mut bad = archive.clone();
        for _ in 0..=round % 4 {
            number = number
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let at = usize::try_from(number >> 33).unwrap() % bad.len();
            bad[at] = [b'/', b'.', b'9', 0, 0xff, b'\n'][usize::try_from(number >> 8).unwrap() % 6];
        }
        // Headers with a valid checksum reach more of the code.
        for block in bad
            .chunks_exact_mut(512)
            .filter(|block| &block[257..262] == b"ustar")
        {
            let header: &mut [u8; 512] = block.try_into().unwrap();
            let mut copy = Header::from_byte_slice(header).clone();
            copy.set_cksum();
            *header = *copy.as_bytes();
        }
        let target = around.path().join("target");
        fs::create_dir(&target).unwrap();
        refused += usize::from(
            import::from_stream(
                &bad[..],
                &target,
                XattrSpace::detect(),
                Unsupported::Refuse,
                &mut |_| {},
            )
            .is_err(),
        );
        assert_eq!(
            fs::read_dir(around.path()).unwrap().count(),
            1,
            "round {round}"
        );
        fs::remove_dir_all(&target).unwrap();
    }
    assert!(
        refused > 50,
        "only {refused} of the damaged archives were refused"
    );
}
