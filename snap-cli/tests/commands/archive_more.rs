//! More odd archives: links, names, types and headers that no archiver writes by default.

use super::archive_cases::{
    Case,
    Expected::{Other, Refused, Same},
    case, dir, edited, file, header, link, pax, put,
};

/// Returns the archives, with the results of GNU tar and of cowl.
pub(super) fn all() -> Vec<Case> {
    [links(), names(), headers(), values()].concat()
}

const MISSING: &str = "skipped a hard link to a file that no earlier entry contains";

fn links() -> Vec<Case> {
    let z = || file(b"z");
    vec![
        case(
            "a hard link to itself, without the file",
            &[link(b'1', b"l", b"l"), z()],
            2,
            Same(&["l (l): skipped a hard link to a file that no earlier entry contains"]),
        ),
        case(
            "hard links to the root",
            &[link(b'1', b"l", b"."), link(b'1', b"m", b"/"), z()],
            2,
            Same(&["l, m: skipped a hard link to a directory", "leading slash"]),
        ),
        case(
            "a hard link as the root",
            &[file(b"f"), link(b'1', b".", b"f"), z()],
            2,
            Same(&[".: skipped a root that is not a directory"]),
        ),
        case(
            "a hard link to a fifo",
            &[header(b"p", b'6', 0, |_| {}), link(b'1', b"q", b"p")],
            0,
            Same(&[]),
        ),
        case(
            "a hard link below its target",
            &[file(b"f"), link(b'1', b"f/h", b"f")],
            2,
            Same(&["f/h: skipped an entry below a file"]),
        ),
        case(
            "a hard link that would replace the directory of its target",
            &[file(b"d/f"), link(b'1', b"d", b"d/f")],
            2,
            Same(&["d: skipped a file with the name of a directory that is not empty"]),
        ),
        case(
            "a hard link through symbolic links in a circle",
            &[link(b'2', b"a", b"a"), link(b'1', b"h", b"a/f"), z()],
            2,
            Same(&[MISSING]),
        ),
        case(
            "a hard link without a target",
            &[link(b'1', b"h", b""), z()],
            2,
            Same(&["h: skipped a hard link to a name that Linux cannot store"]),
        ),
        case(
            "a hard link to a hard link that was skipped",
            &[link(b'1', b"h", b"no"), link(b'1', b"i", b"h"), z()],
            2,
            Same(&["h (no), i (h): skipped a hard link"]),
        ),
        case(
            "a directory over a symbolic link to a directory",
            &[
                file(b"t/f"),
                link(b'2', b"l", b"t"),
                dir(b"l/"),
                file(b"l/g"),
            ],
            0,
            Same(&[]),
        ),
        case(
            "a directory over a file with another name",
            &[file(b"a"), link(b'1', b"b", b"a"), dir(b"a"), file(b"a/g")],
            0,
            Same(&[]),
        ),
    ]
}

fn names() -> Vec<Case> {
    let z = || file(b"z");
    let long = |size| [b"d/", vec![b'n'; size].as_slice()].concat();
    vec![
        case(
            "only '..' in all names",
            &[file(b"../a"), file(b"../b")],
            2,
            Refused("no entry of the archive can be imported: ../a, ../b: skipped an entry"),
        ),
        case(
            "'..' in the prefix",
            &[edited(b"n", b'0', b"x", put(345, b"a/..")), z()],
            2,
            Same(&["a/../n: skipped an entry with '..'"]),
        ),
        case(
            "a component of 300 bytes",
            &[pax(&[("path", &long(300))]), file(b"f"), z()],
            2,
            Other(&["z"], &["more than 255 bytes"]),
        ),
        case(
            // A file whose name ends with a slash is a directory, as before 1988.
            "the name '/' for a file",
            &[file(b"/"), z()],
            2,
            Same(&["/: removed the leading slash of the name"]),
        ),
        case(
            "an empty name",
            &[file(b""), z()],
            2,
            Same(&["skipped an entry without a name"]),
        ),
        case(
            "a symbolic link whose name ends with a slash",
            &[link(b'2', b"l/", b"t")],
            0,
            Same(&[]),
        ),
        case(
            "whiteouts of images",
            &[file(b".wh.x"), file(b"d/.wh..wh..opq")],
            0,
            Same(&["contains the name .wh.x"]),
        ),
    ]
}

fn headers() -> Vec<Case> {
    let z = || file(b"z");
    let data = file(b"inside");
    let types = [b'8', b'9', b'A', b'E', b'I', b'N', b' ', b'\xff']
        .map(|kind| edited(&[b't', kind], kind, b"x", |_| {}));
    vec![
        case(
            "unknown types",
            &[types.concat(), z()],
            0,
            Same(&["imported an entry of an unknown type"]),
        ),
        case(
            "a fifo with data",
            &[edited(b"p", b'6', &[b'x'; 700], |_| {}), z()],
            2,
            Same(&[]),
        ),
        case(
            "a device with numbers of 32 bits",
            &[
                header(b"c", b'3', 0, put(329, b"\x80\0\0\0\xff\xff\xff\xff")),
                z(),
            ],
            2,
            Same(&["c: skipped a device"]),
        ),
        case(
            "the rest of a file of another volume",
            &[edited(b"m", b'M', &data, |_| {}), z()],
            2,
            Same(&["m: skipped the rest of a file"]),
        ),
        case(
            "a volume's label with data",
            &[edited(b"label", b'V', b"x", |_| {}), z()],
            0,
            Same(&[]),
        ),
        case(
            "only a volume's label",
            &[header(b"label", b'V', 0, |_| {})],
            0,
            Refused("no entries"),
        ),
        case(
            "an extended header without an entry",
            &[z(), pax(&[("path", b"q")])],
            0,
            Refused("between an extended header and its entry"),
        ),
        case(
            "NUL bytes after the records",
            &[edited(b"x", b'x', b"9 uid=77\n\0\0", |_| {}), file(b"f")],
            0,
            Same(&[]),
        ),
        case(
            "a mode that is no number",
            &[edited(b"f", b'0', b"x", put(100, b"zz")), z()],
            2,
            Other(&["f", "z"], &["f: changed a mode that is not a number"]),
        ),
        case(
            "an owner that is no number",
            &[edited(b"f", b'0', b"x", put(108, b"zz")), z()],
            2,
            Other(&["f", "z"], &["f (uid): changed an owner or group"]),
        ),
    ]
}

fn values() -> Vec<Case> {
    let xattr = |name, key, value: &[u8], note| {
        case(name, &[pax(&[(key, value)]), file(b"f")], 0, Same(note))
    };
    let acl = "SCHILY.xattr.system.posix_acl_access";
    let capability = "SCHILY.xattr.security.capability";
    let map: [(&str, &[u8]); 2] = [("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,1")];
    vec![
        xattr(
            "an invalid ACL",
            acl,
            b"garbage",
            &["f (system.posix_acl_access): skipped an invalid ACL"],
        ),
        xattr(
            "invalid capabilities",
            capability,
            b"garbage",
            &["f (security.capability): skipped invalid capabilities"],
        ),
        xattr(
            "an xattr without a name",
            "SCHILY.xattr.",
            b"x",
            &["skipped an xattr of another"],
        ),
        case(
            "a sparse map of a directory",
            &[pax(&map), dir(b"d"), file(b"z")],
            2,
            Other(&["d", "z"], &[]),
        ),
        case(
            "times that are no numbers",
            &[
                pax(&[("mtime", b"inf")]),
                file(b"f"),
                pax(&[("mtime", b"-")]),
                file(b"g"),
            ],
            2,
            Same(&["f (mtime), g (mtime): ignored a field that is not a number"]),
        ),
    ]
}
