//! Test support: a tree with an object of each kind, and a comparison that shares no code with the tested modules.

use cowl_layers::shown::Show as _;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use cowl_layers::sys::attr::{self, SetTime};
use cowl_layers::sys::stat::{FileKind, Time};
use cowl_layers::sys::{dir, node, xattr};
use std::os::fd::AsFd as _;

/// Returns whether the calling test may create devices and set owners; otherwise records it as skipped.
pub(crate) fn is_root() -> bool {
    cowl_tests::conditions::can(&[cowl_tests::conditions::Need::Root])
}

fn to_path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let fd = rustix::fs::open(
        path,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    xattr::set(fd.as_fd(), name.as_bytes(), value).unwrap();
}

pub(crate) fn set_times(path: &Path, secs: i64, nanos: u32) {
    let fd = rustix::fs::open(
        path,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    let atime = SetTime::At(Time {
        secs: secs + 100,
        nanos: 7,
    });
    attr::utimens(fd.as_fd(), atime, SetTime::At(Time { secs, nanos })).unwrap();
}

pub(crate) fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

pub(crate) fn chown(path: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
}

pub(crate) fn mknod(path: &Path, kind: FileKind, mode: u32, rdev: u64) {
    let parent = dir::open_root(path.parent().unwrap()).unwrap();
    let name = path.file_name().unwrap().as_bytes();
    node::mknod(parent.as_fd(), name, kind, mode, rdev).unwrap();
}

/// An access ACL with one named user and one named group.
pub(crate) const ACL: &[u8] = b"\x02\0\0\0\
    \x01\0\x07\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\
    \x08\0\x06\0\x57\x04\0\0\x10\0\x07\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

/// A file capability (cap_net_raw+ep) whose bytes contain a newline.
pub(crate) const CAPABILITY: &[u8] = b"\x01\0\0\x02\x0a\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Creates an object of each kind that a root filesystem can contain. Requires root.
pub(crate) fn one_of_everything(root: &Path) {
    let at = |name: &[u8]| root.join(to_path(name));
    fs::create_dir(at(b"dir")).unwrap();
    fs::create_dir(at(b"dir/inner")).unwrap();
    fs::create_dir(at(b"closed")).unwrap();
    fs::write(at(b"closed/file"), b"in a closed directory").unwrap();
    fs::write(at(b"plain"), b"hello\n").unwrap();
    fs::write(at(b"empty"), b"").unwrap();
    let big: Vec<u8> = (0..300_000_u32)
        .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(at(b"dir/big"), &big).unwrap();
    fs::write(at(b"latin\xe9 \n'name"), b"bytes").unwrap();
    fs::write(at("dir/grün.wh".as_bytes()), b"utf-8").unwrap();
    fs::write(at(b".wh.name"), b"only a name").unwrap();
    let mut long = b"long".to_vec();
    fs::create_dir(at(&long)).unwrap();
    for _ in 0..3 {
        long.extend_from_slice(&[b"/".as_slice(), &[b'n'; 200]].concat());
        fs::create_dir(at(&long)).unwrap();
    }
    long.extend_from_slice(b"/file");
    fs::write(at(&long), b"far down").unwrap();
    symlink("plain", at(b"link")).unwrap();
    symlink("/nowhere/\u{e9}", at(b"dangling")).unwrap();
    symlink("t".repeat(1500), at(b"long-link")).unwrap();
    fs::hard_link(at(b"plain"), at(b"dir/hard")).unwrap();
    fs::hard_link(at(b"plain"), at(b"a-hard")).unwrap();
    fs::hard_link(at(b"link"), at(b"z-hard-symlink")).unwrap();
    fs::hard_link(at(&long), at(b"hard-to-far")).unwrap();
    mknod(&at(b"fifo"), FileKind::Fifo, 0o640, 0);
    mknod(
        &at(b"char"),
        FileKind::CharDevice,
        0o666,
        rustix::fs::makedev(1, 3),
    );
    mknod(
        &at(b"dir/block"),
        FileKind::BlockDevice,
        0o660,
        rustix::fs::makedev(259, 300_000),
    );
    let sparse = fs::File::create(at(b"sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    sparse.write_all_at(&[7; 5000], 10 << 20).unwrap();
    sparse.write_all_at(b"end", 40 << 20).unwrap();
    fs::File::create(at(b"all-hole"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    set_owners_and_attributes(root);
    set_all_times(root);
}

fn set_owners_and_attributes(root: &Path) {
    chown(&root.join("dir/big"), 1000, 2_000_000);
    chown(&root.join("fifo"), 4_000_000_000, 5);
    chown(&root.join("dangling"), 3, 4);
    chown(&root.join("empty"), 12, 34);
    chmod(&root.join("empty"), 0o6755);
    chmod(&root.join("dir"), 0o3770);
    chmod(&root.join("closed"), 0o000);
    chmod(&root.join("plain"), 0o400);
    set_xattr(&root.join("plain"), "user.text", b"value");
    set_xattr(&root.join("plain"), "user.eq=uals%3D", b"a\n9 b=c\n\0\xff");
    set_xattr(&root.join("plain"), "user.none", b"");
    set_xattr(&root.join("dir/big"), "security.capability", CAPABILITY);
    set_xattr(&root.join("dir/big"), "trusted.thing", b"t");
    set_xattr(&root.join("link"), "trusted.on-link", b"l");
    set_xattr(&root.join("fifo"), "trusted.on-fifo", b"f");
    set_xattr(&root.join("dir/inner"), "system.posix_acl_access", ACL);
    set_xattr(&root.join("dir/inner"), "system.posix_acl_default", ACL);
    set_xattr(root, "user.on-root", b"r");
    set_xattr(&root.join("sparse"), "system.posix_acl_access", ACL);
    chmod(root, 0o751);
}

fn set_all_times(root: &Path) {
    let mut at = 1_000_000_000;
    for path in walk(root) {
        at += 1;
        set_times(&root.join(to_path(&path)), at, 123_456_789);
    }
    set_times(&root.join("char"), -5, 250_000_000);
    set_times(&root.join("fifo"), 9_000_000_000, 1);
    set_times(root, 77, 88);
}

/// Returns all paths below `root`, children before their directory.
pub(crate) fn walk(root: &Path) -> Vec<Vec<u8>> {
    fn inner(base: &Path, rel: &Path, out: &mut Vec<Vec<u8>>) {
        for entry in fs::read_dir(base.join(rel)).unwrap() {
            let entry = entry.unwrap();
            let path = rel.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                inner(base, &path, out);
            }
            out.push(path.as_os_str().as_bytes().to_vec());
        }
    }
    let mut out = Vec::new();
    inner(root, Path::new(""), &mut out);
    out
}

/// Returns a line for each path of a tree with everything that must be preserved.
pub(crate) fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut groups: HashMap<(u64, u64), String> = HashMap::new();
    let mut out = BTreeMap::new();
    let mut paths = walk(root);
    paths.push(Vec::new());
    paths.sort();
    for path in paths {
        let full = root.join(to_path(&path));
        let name = path.escape_ascii().to_string();
        let meta =
            fs::symlink_metadata(&full).unwrap_or_else(|error| panic!("{}: {error}", full.shown()));
        let kind = meta.file_type();
        let mut line = format!(
            "{:o} {}:{} {}.{:09}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec()
        );
        if kind.is_char_device() || kind.is_block_device() {
            line += &format!(" dev {:x}", meta.rdev());
        }
        if kind.is_symlink() {
            line += &format!(" -> {:?}", fs::read_link(&full).unwrap());
        }
        if kind.is_file() {
            let data = fs::read(&full).unwrap_or_else(|error| panic!("{}: {error}", full.shown()));
            let sum = data
                .iter()
                .fold(0_u64, |h, &b| h.wrapping_mul(1_000_003) ^ u64::from(b));
            line += &format!(" {} bytes {sum:x}", data.len());
        }
        if !kind.is_dir() && meta.nlink() > 1 {
            // The link count includes names outside the tree and names that a whiteout hides, so only names inside it
            // are compared.
            let first = groups
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| name.clone());
            if *first != name {
                line += &format!(" same as {first}");
            }
        }
        let fd = rustix::fs::open(
            &full,
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        for (key, value) in xattr::all(fd.as_fd()).unwrap() {
            line += &format!(" [{}={}]", key.escape_ascii(), value.escape_ascii());
        }
        out.insert(name, line);
    }
    out
}

/// Panics with the lines that differ if a tree does not match its description.
pub(crate) fn assert_same(got: &Path, want: &BTreeMap<String, String>, name: &str) {
    let got = describe(got);
    let mut wrong = String::new();
    for path in got
        .keys()
        .chain(want.keys())
        .collect::<std::collections::BTreeSet<_>>()
    {
        let (got, want) = (got.get(path), want.get(path));
        if got != want {
            wrong += &format!("{path:.80}\n   got {got:.400?}\n  want {want:.400?}\n");
        }
    }
    assert!(wrong.is_empty(), "{name}: the trees differ\n{wrong}");
}

/// Runs a program; panics with its standard error if it fails.
pub(crate) fn run(program: &str, args: &[&std::ffi::OsStr]) -> Vec<u8> {
    let out = std::process::Command::new(program)
        .args(args)
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        out.stderr.escape_ascii()
    );
    out.stdout
}
