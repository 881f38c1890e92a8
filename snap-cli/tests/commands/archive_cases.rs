//! Odd, old, damaged and hostile archives, with the results of GNU tar and of cowl.

use Expected::{Other, Refused, Same};

/// The result of cowl.
#[derive(Clone, Copy)]
pub(super) enum Expected {
    /// The tree that GNU tar unpacks, and the notes.
    Same(&'static [&'static str]),
    /// Another tree, with these names, and the notes.
    Other(&'static [&'static str], &'static [&'static str]),
    /// The archive is refused with these words.
    Refused(&'static str),
}

/// An archive, and the results of both programs.
#[derive(Clone)]
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) archive: Vec<u8>,
    /// The exit code of GNU tar.
    pub(super) gnu_tar: i32,
    pub(super) cowl: Expected,
}

pub(super) fn case(name: &'static str, entries: &[Vec<u8>], gnu_tar: i32, cowl: Expected) -> Case {
    let archive = [entries.concat(), END.to_vec()].concat();
    Case {
        name,
        archive,
        gnu_tar,
        cowl,
    }
}

/// Returns all archives. Some of them refer to the directory `outside`, or to the file `kept` in it.
pub(super) fn all(outside: &str) -> Vec<Case> {
    let outside = outside.as_bytes();
    [
        old_headers(),
        ends(),
        escapes(outside),
        replacements(outside),
        records(),
        sizes(),
    ]
    .concat()
}

/// Returns a header of POSIX's format, which `edit` changes before the checksum is computed.
pub(super) fn header(
    name: &[u8],
    kind: u8,
    size: u64,
    edit: impl FnOnce(&mut [u8; 512]),
) -> Vec<u8> {
    let mut block = [0; 512];
    let mut set = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, name);
    set(100, if kind == b'5' { b"0000755" } else { b"0000644" });
    set(108, b"0000000\x000000000\0");
    set(
        124,
        format!("{size:011o}\0{:011o}\0", 1_000_000_000).as_bytes(),
    );
    set(156, &[kind]);
    set(257, b"ustar\x0000");
    set(329, b"0000000\x000000000\0");
    edit(&mut block);
    finish(block, i32::from)
}

/// Adds the checksum, in which `value` is the value of a byte.
fn finish(mut block: [u8; 512], value: impl Fn(u8) -> i32) -> Vec<u8> {
    block[148..156].fill(b' ');
    let sum: i32 = block.iter().map(|&byte| value(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

pub(super) fn put(at: usize, bytes: &[u8]) -> impl Fn(&mut [u8; 512]) + '_ {
    move |block| block[at..at + bytes.len()].copy_from_slice(bytes)
}

fn padded(data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    data
}

pub(super) fn edited(
    name: &[u8],
    kind: u8,
    data: &[u8],
    edit: impl FnOnce(&mut [u8; 512]),
) -> Vec<u8> {
    [header(name, kind, data.len() as u64, edit), padded(data)].concat()
}

pub(super) fn file(name: &[u8]) -> Vec<u8> {
    edited(name, b'0', b"x", |_| {})
}

pub(super) fn dir(name: &[u8]) -> Vec<u8> {
    header(name, b'5', 0, |_| {})
}

/// A symbolic link, or a hard link with the kind '1'.
pub(super) fn link(kind: u8, name: &[u8], target: &[u8]) -> Vec<u8> {
    header(name, kind, 0, put(157, target))
}

pub(super) fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length += 1;
        }
        data.extend_from_slice(format!("{length} {key}=").as_bytes());
        data.extend_from_slice(value);
        data.push(b'\n');
    }
    edited(b"PaxHeader", b'x', &data, |_| {})
}

/// A sparse file in GNU's PAX format 1.0.
fn sparse(size: &str, map: &str, data: &[u8]) -> Vec<u8> {
    let records = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", size.as_bytes()),
    ];
    let content = [padded(map.as_bytes()), data.to_vec()].concat();
    [pax(&records), edited(b"s", b'0', &content, |_| {})].concat()
}

const END: [u8; 1024] = [0; 1024];

/// Headers of old and unusual writers.
fn old_headers() -> Vec<Case> {
    let signed = {
        let mut block: [u8; 512] = file(b"\xe9\xe8")[..512].try_into().unwrap();
        block[345] = 0;
        finish(block, |byte| i32::from(byte.cast_signed()))
    };
    let binary = |block: &mut [u8; 512]| {
        put(108, b"\x80\0\0\0\0\x11\x22\x33")(block);
        put(136, &[0xff; 12])(block);
    };
    vec![
        case(
            "signed checksum",
            &[signed, padded(b"x"), file(b"z")],
            0,
            Same(&[]),
        ),
        case(
            "base-256 numbers",
            &[edited(b"b", b'0', b"x", binary)],
            0,
            Same(&[]),
        ),
        case(
            "Seventh Edition",
            &[
                edited(b"v7", 0, b"x", put(257, &[0; 8])),
                header(b"d/", 0, 0, put(257, &[0; 8])),
            ],
            0,
            Same(&[]),
        ),
        case(
            "size on a hard link",
            &[
                file(b"a"),
                header(b"b", b'1', 700, put(157, b"a")),
                file(b"c"),
            ],
            0,
            Same(&[]),
        ),
        case(
            "contiguous file",
            &[edited(b"c", b'7', b"x", |_| {})],
            0,
            Same(&[]),
        ),
        case(
            "unknown type",
            &[edited(b"q", b'Q', b"x", |_| {}), file(b"z")],
            0,
            Same(&["q (Q): imported an entry of an unknown type"]),
        ),
        case(
            "blanks and garbage around numbers",
            &[edited(b"f", b'0', b"x", put(108, b"  17 \0ab"))],
            0,
            Same(&[]),
        ),
        case(
            "whiteout device",
            &[header(b"w", b'3', 0, |_| {})],
            0,
            Same(&[]),
        ),
        case(
            "newline and escape in a name",
            &[file(b"a\nb\x1b[31m")],
            0,
            Same(&[]),
        ),
    ]
}

/// The end of the archive.
fn ends() -> Vec<Case> {
    let raw = |name, archive: &[Vec<u8>], gnu_tar, cowl| Case {
        name,
        archive: archive.concat(),
        gnu_tar,
        cowl,
    };
    let (zeros, a, b) = (vec![0; 512], file(b"a"), file(b"b"));
    vec![
        raw("one end block", &[a.clone(), zeros.clone()], 0, Same(&[])),
        raw(
            "no end block",
            std::slice::from_ref(&a),
            0,
            Refused("truncated"),
        ),
        raw(
            "half a header",
            &[a.clone(), b[..200].to_vec()],
            0,
            Refused("truncated"),
        ),
        raw(
            "half a file",
            &[a.clone(), b[..700].to_vec()],
            2,
            Refused("truncated"),
        ),
        raw(
            "garbage after the end",
            &[a.clone(), END.to_vec(), b"garbage".repeat(900)],
            0,
            Same(&[]),
        ),
        raw(
            "another archive after the end",
            &[a.clone(), zeros, b.clone(), END.to_vec()],
            0,
            Same(&["another archive follows"]),
        ),
        raw("an end only", &[END.to_vec()], 0, Refused("no entries")),
        raw("nothing", &[], 2, Refused("is empty")),
        raw(
            "garbage",
            &[b"garbage".repeat(300)],
            2,
            Refused("not a tar archive"),
        ),
        case(
            "invalid checksum of the second header",
            &[
                a,
                edited(b"b", b'0', b"x", |_| {})[..148].to_vec(),
                b[156..].to_vec(),
                vec![0; 8],
            ],
            2,
            Refused("no valid header after this entry"),
        ),
    ]
}

/// Paths that leave the root.
fn escapes(outside: &[u8]) -> Vec<Case> {
    let kept = [outside, b"/kept"].concat();
    vec![
        case(
            "absolute names",
            &[file(b"/a"), link(b'1', b"b", b"/a")],
            0,
            Same(&["leading slash of the name", "leading slash of the target"]),
        ),
        case(
            "'..' in a name",
            &[file(b"../f"), file(b"z")],
            2,
            Other(&["z"], &["../f: skipped an entry with '..' in its name"]),
        ),
        case(
            "below an absolute symbolic link",
            &[link(b'2', b"l", outside), file(b"l/f"), file(b"z")],
            2,
            Other(&["OUTSIDE", "OUTSIDE/f", "l", "z"], &[]),
        ),
        case(
            "below a chain of symbolic links",
            &[
                dir(b"a"),
                link(b'2', b"a/b", b".."),
                link(b'2', b"a/b/c", b"../../.."),
                file(&[b"c", outside, b"/f"].concat()),
            ],
            2,
            Other(&["a", "a/b", "c", "OUTSIDE", "OUTSIDE/f"], &[]),
        ),
        case(
            "a file over a symbolic link",
            &[link(b'2', b"l", &kept), file(b"l")],
            0,
            Same(&[]),
        ),
        case(
            "a hard link to a symbolic link, replaced by a file",
            &[link(b'2', b"l", &kept), link(b'1', b"h", b"l"), file(b"h")],
            0,
            Same(&[]),
        ),
        case(
            "a hard link to a file outside",
            &[link(b'1', b"h", &kept), file(b"h")],
            2,
            // GNU tar unpacks the second entry, too.
            Same(&["leading slash of the target", "no earlier entry contains"]),
        ),
        case(
            "a hard link through a symbolic link",
            &[link(b'2', b"l", outside), link(b'1', b"h", b"l/kept")],
            2,
            Same(&["h (l/kept): skipped a hard link to a file that no earlier entry contains"]),
        ),
        case(
            "a symbolic link as the root",
            &[link(b'2', b".", outside), file(b"f")],
            2,
            Other(&["f"], &["skipped a root"]),
        ),
        case(
            "symbolic links in a circle",
            &[link(b'2', b"a", b"b"), link(b'2', b"b", b"a"), file(b"a/f")],
            2,
            Same(&["a/f: skipped an entry below too many symbolic links"]),
        ),
    ]
}

/// Entries that replace others, and names that Linux cannot store.
fn replacements(outside: &[u8]) -> Vec<Case> {
    vec![
        case(
            "a file as a directory",
            &[file(b"a"), file(b"a/b")],
            2,
            Same(&["a/b: skipped an entry below a file that is not a directory"]),
        ),
        case(
            "a file, then a directory",
            &[file(b"d"), dir(b"d"), file(b"d/f")],
            0,
            Same(&[]),
        ),
        case(
            "an empty directory, then a file",
            &[dir(b"d"), file(b"d")],
            0,
            Same(&[]),
        ),
        case(
            "a full directory, then a file",
            &[file(b"d/f"), file(b"d")],
            2,
            Same(&["d: skipped a file with the name of a directory"]),
        ),
        case(
            "a full directory, then a symbolic link",
            &[file(b"d/f"), link(b'2', b"d", outside), file(b"d/g")],
            2,
            Same(&["d: skipped a file with the name of a directory"]),
        ),
        case(
            "a NUL in a name",
            &[pax(&[("path", b"a\0b")]), file(b"n"), file(b"z")],
            0,
            Other(&["z"], &["a\\x00b: skipped an entry with a NUL byte"]),
        ),
        case(
            "a hard link to a directory",
            &[dir(b"d"), link(b'1', b"d/e", b"d"), file(b"z")],
            2,
            Other(&["d", "z"], &["d/e: skipped a hard link to a directory"]),
        ),
    ]
}

/// PAX records.
fn records() -> Vec<Case> {
    let with = |name, key, value: &[u8], gnu_tar, cowl| {
        case(name, &[pax(&[(key, value)]), file(b"f")], gnu_tar, cowl)
    };
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let raw = |name, data: &[u8]| {
        let header = edited(b"PaxHeader", b'x', data, |_| {});
        case(
            name,
            &[header, file(b"f")],
            2,
            Refused("damaged PAX header"),
        )
    };
    vec![
        with(
            "a time with an exponent",
            "mtime",
            b"1e-05",
            0,
            Other(&["f"], &[]),
        ),
        with(
            "a time that is none",
            "mtime",
            b"nan",
            2,
            Same(&["f (mtime): ignored a field that is not a number"]),
        ),
        with(
            "an owner of 32 bits, all set",
            "uid",
            b"4294967295",
            0,
            Other(&["f"], &["65534"]),
        ),
        with(
            "a capability",
            "SCHILY.xattr.security.capability",
            &capability,
            0,
            Same(&[]),
        ),
        with(
            "an unknown security xattr",
            "SCHILY.xattr.security.unknown",
            b"x",
            0,
            Same(&[]),
        ),
        with(
            "a marker of an overlay",
            "SCHILY.xattr.trusted.overlay.redirect",
            b"/etc",
            0,
            Same(&[]),
        ),
        with(
            "a marker of a user's overlay",
            "SCHILY.xattr.user.overlay.opaque",
            b"y",
            0,
            Same(&[]),
        ),
        with(
            "an xattr of macOS",
            "SCHILY.xattr.com.apple.provenance",
            b"x",
            0,
            Same(&["another operating system"]),
        ),
        raw("a record that is too long", b"999999999 path=pwn\n"),
        raw("a record of 65 bits", b"18446744073709551617 path=pwn\n"),
        raw("a negative length", b"-12 path=pwn\n"),
        raw("a record without '='", b"8 pathx\n"),
    ]
}

/// Sizes, and maps of sparse files.
fn sizes() -> Vec<Case> {
    let sized = |name, field: &'static [u8], cowl| {
        case(
            name,
            &[file(b"a"), header(b"f", b'0', 0, put(124, field))],
            2,
            cowl,
        )
    };
    vec![
        sized(
            "a negative size",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0",
            Refused("size"),
        ),
        sized(
            "a size of 63 bits",
            b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
            Refused("truncated"),
        ),
        sized(
            "a size that is no number",
            b"-0000000001\0",
            Refused("size"),
        ),
        case(
            "a hole",
            &[sparse("100000", "2\n65536\n4\n100000\n0\n", b"data")],
            0,
            Same(&[]),
        ),
        case(
            "overlapping segments",
            &[sparse("100", "2\n10\n20\n5\n20\n", &[b'x'; 40])],
            0,
            Refused("overlaps"),
        ),
        case(
            "a segment behind the end",
            &[sparse("10", "1\n5\n20\n", &[b'x'; 20])],
            0,
            Refused("beyond the end"),
        ),
        case(
            "a segment of 64 bits",
            &[sparse("100", "1\n18446744073709551615\n2\n", b"data")],
            2,
            Refused("sparse map"),
        ),
        case(
            "a negative segment",
            &[sparse("100", "1\n-5\n20\n", b"data")],
            2,
            Refused("sparse map"),
        ),
    ]
}
