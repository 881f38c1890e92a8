//! Hostile archives against a cowl with 256 MiB of address space: each results in a clear error, or in the container
//! that it describes, and never exhausts memory.

use std::io::{Read as _, Write};
use std::path::Path;
use std::process::Command;

use cowl_tests::command::{Output, run, run_command};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use sha2::Digest as _;
use tar::{EntryType, Header};

/// The limit of the address space in KiB, including program, libraries and stacks.
const MEMORY: &str = "262144";

/// zstd compresses repetitions to almost nothing: gigabytes fit in a few hundred kilobytes.
type Packed = zstd::stream::write::Encoder<'static, Vec<u8>>;

struct Archive(Packed);

impl Archive {
    fn new() -> Self {
        Self(zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap())
    }

    fn header(kind: u8, path: &[u8], link: &[u8], size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_entry_type(EntryType::new(kind));
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Appends an entry whose data repeats a pattern.
    fn repeated(mut self, kind: u8, path: &[u8], pattern: &[u8], times: usize) -> Self {
        let size = (pattern.len() * times) as u64;
        self.raw(Self::header(kind, path, b"", size).as_bytes());
        let at_once = (1 << 16) / pattern.len() + 1;
        let many = pattern.repeat(at_once);
        for _ in 0..times / at_once {
            self.raw(&many);
        }
        self.raw(&pattern.repeat(times % at_once));
        self.raw(&vec![0; (size.next_multiple_of(512) - size) as usize]);
        self
    }

    fn entry(mut self, kind: u8, path: &[u8], data: &[u8]) -> Self {
        if data.is_empty() {
            self.raw(Self::header(kind, path, b"", 0).as_bytes());
            return self;
        }
        self.repeated(kind, path, data, 1)
    }

    fn entry_of(self, kind: u8, data: &[u8]) -> Self {
        self.entry(kind, b"entry", data)
    }

    /// Appends the header of an entry that claims a gigabyte.
    fn huge(mut self, kind: u8, path: &[u8]) -> Self {
        self.raw(Self::header(kind, path, b"", 1 << 30).as_bytes());
        self
    }

    fn pax(self, kind: u8, records: &[(String, Vec<u8>)]) -> Self {
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
        self.entry_of(kind, &data)
    }

    fn file(self, path: &str) -> Self {
        self.entry(b'0', path.as_bytes(), b"x")
    }

    fn end(mut self) -> Vec<u8> {
        self.raw(&[0; 1024]);
        self.0.finish().unwrap()
    }
}

fn record(key: &str, value: impl Into<Vec<u8>>) -> (String, Vec<u8>) {
    (key.to_owned(), value.into())
}

fn cowl(store: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -v \"$1\"; shift; exec \"$@\"", "sh", MEMORY])
        .arg(programs::cowl())
        .arg("--store")
        .arg(store)
        .args(args);
    run_command(command, b"")
}

/// The expected result of an archive.
enum End {
    /// A container with the file `after`.
    Made,
    /// An error with these words.
    Refused(&'static [&'static str]),
    /// Either, depending on the file system.
    MadeOrRefused(&'static [&'static str]),
}

fn check(name: &str, archive: &[u8], end: &End) {
    let dir = Scratch::in_memory();
    let (store, file) = (dir.join("store"), dir.join("a.tar"));
    std::fs::write(&file, archive).unwrap();
    let output = cowl(&store, &["import", file.to_str().unwrap(), "c"]);
    match end {
        End::MadeOrRefused(words) => {
            let end = match output.code == 0 {
                true => End::Made,
                false => End::Refused(words),
            };
            ended(name, &store, &output, &end);
        }
        end => ended(name, &store, &output, end),
    }
    remove(&store);
}

fn ended(name: &str, store: &Path, output: &Output, end: &End) {
    let message = output.stderr.escape_ascii().to_string();
    match end {
        End::MadeOrRefused(_) => panic!("{name}: it has ended"),
        End::Made => {
            assert!(output.code == 0, "{name}: {message}");
            let cat = cowl(store, &["cat", "c:after"]);
            assert_eq!(cat.stdout, b"x", "{name}: {}", cat.stderr.escape_ascii());
        }
        End::Refused(words) => {
            assert_eq!(output.code, 1, "{name}: {message}");
            for word in *words {
                assert!(message.contains(word), "{name}: no {word:?} in: {message}");
            }
            let list = cowl(store, &["list", "--json"]);
            let list = String::from_utf8(list.stdout).unwrap();
            assert!(!list.contains("\"c\""), "{name}: {list}");
            let layers = std::fs::read_dir(store.join("layers"));
            assert!(
                layers.map_or(true, |mut layers| layers.next().is_none()),
                "{name}: it left a layer"
            );
        }
    }
}

/// Removes a tree that may be too deep for the standard library.
fn remove(tree: &Path) {
    run("rm", ["-rf".as_ref(), tree.as_os_str()]).ok();
}

const LIMIT: End = End::Refused(&["limit", "tar"]);

fn numbered(prefix: &str, count: usize, value: &[u8]) -> Vec<(String, Vec<u8>)> {
    let key = |n| format!("{prefix}{n}");
    (0..count).map(|n| (key(n), value.to_vec())).collect()
}

#[test]
fn maps_of_sparse_files_have_a_limit_in_every_format() {
    let one = |claims: &str| {
        let records = [
            record("GNU.sparse.major", *b"1"),
            record("GNU.sparse.minor", *b"0"),
            record("GNU.sparse.realsize", *b"100"),
        ];
        let archive = Archive::new().pax(b'x', &records);
        let first = [claims.as_bytes(), b"\n"].concat();
        let lines = [first, b"0\n".repeat(1 << 20)].concat();
        archive.entry_of(b'0', &lines).end()
    };
    check("1.0", &one("83886080"), &LIMIT);
    check("1.0, 64 bits", &one("18446744073709551615"), &LIMIT);
    let in_header = |records: &[(String, Vec<u8>)]| {
        let archive = Archive::new().pax(b'x', records);
        archive.file("after").end()
    };
    let map = b"0,0,".repeat(3 << 20);
    let map = [
        record("GNU.sparse.size", *b"9"),
        record("GNU.sparse.map", map),
    ];
    check("0.1", &in_header(&map), &LIMIT);
    let mut pairs = vec![record("GNU.sparse.size", *b"9")];
    for _ in 0..200_000 {
        pairs.push(record("GNU.sparse.offset", *b"0"));
        pairs.push(record("GNU.sparse.numbytes", *b"0"));
    }
    // Below the limit, but not a valid map.
    check("0.0", &in_header(&pairs), &End::Refused(&["sparse map"]));
    let mut header = Archive::header(b'S', b"entry", b"", 0);
    let fields = header.as_gnu_mut().unwrap();
    fields.set_is_extended(true);
    fields.set_real_size(9);
    header.set_cksum();
    let mut archive = Archive::new();
    archive.raw(header.as_bytes());
    let mut block = [0; 512];
    for slot in 0..21 {
        block[slot * 24] = b'0';
        block[slot * 24 + 12] = b'0';
    }
    // "More blocks follow".
    block[504] = 1;
    for _ in 0..240 {
        archive.raw(&block.repeat(256));
    }
    check("GNU", &archive.end(), &LIMIT);
}

#[test]
fn headers_names_attributes_and_acls_have_limits() {
    for (name, kind) in [
        ("long name", b'L'),
        ("long link", b'K'),
        ("PAX header", b'x'),
        ("Solaris header", b'X'),
        ("global header", b'g'),
    ] {
        let archive = Archive::new().huge(kind, b"big");
        check(name, &archive.file("after").end(), &LIMIT);
    }
    let with = |kind, records: &[(String, Vec<u8>)]| {
        let archive = Archive::new().file("before").pax(kind, records);
        archive.file("after").end()
    };
    let path = vec![b'p'; 2 << 20];
    check("path", &with(b'x', &[record("path", path)]), &LIMIT);
    let tiny = vec![record("k", *b""); 1_000_000];
    check("tiny records", &with(b'x', &tiny), &End::Made);
    let acl = |entries: usize| {
        let text = b"user::rwx,group::r-x,other::r-x,mask::rwx".to_vec();
        let text = [text, b",user:7:r--".repeat(entries)].concat();
        record("SCHILY.acl.access", text)
    };
    check("ACL", &with(b'x', &[acl(1_000_000)]), &LIMIT);
    let value = record("SCHILY.xattr.user.x", vec![0; 8 << 20]);
    check("attribute's value", &with(b'x', &[value]), &End::Made);
    let values = numbered("SCHILY.xattr.com.apple.", 200_000, b"v");
    check("foreign attributes", &with(b'x', &values), &End::Made);
    let many = numbered("SCHILY.xattr.user.", 20_000, b"v");
    check("attributes", &with(b'x', &many), &LIMIT);
    let mut archive = Archive::new();
    for n in 0..500 {
        let value = vec![b'v'; 60_000];
        archive = archive.pax(b'g', &[record(&format!("SCHILY.xattr.user.{n}"), value)]);
    }
    check("global headers", &archive.file("after").end(), &LIMIT);
    let mut archive = Archive::new();
    let megabyte = [
        b"1048576 unknown=".as_slice(),
        &[b'v'; (1 << 20) - 17],
        b"\n",
    ]
    .concat();
    for _ in 0..300 {
        archive = archive.entry_of(b'g', &megabyte);
    }
    let archive = archive.file("after").end();
    check("unknown global headers", &archive, &End::Made);
    let mut archive = Archive::new();
    let many = ",user:7:r--".repeat(7000);
    for n in 0..320 {
        let text = format!("user::rwx,group::r-x,other::r-x,mask::rwx,user:{n}:r--{many}");
        archive = archive
            .pax(b'x', &[record("SCHILY.acl.default", text)])
            .entry(b'5', format!("{n}").as_bytes(), b"");
    }
    let archive = archive.file("after").end();
    // The file system may have a lower limit for one ACL, which is applied later.
    check("ACLs of directories", &archive, &LIMIT);
}

#[test]
fn records_that_are_held_until_the_end_of_an_import_have_limits() {
    let names = |count: usize| {
        let text = b"user::rwx,group::r-x,other::r-x,mask::rwx".to_vec();
        let text = [text, b",user:somebody:r--".repeat(count)].concat();
        record("SCHILY.acl.access", text)
    };
    let mut archive = Archive::new();
    for n in 0..400 {
        let path = format!("{n}");
        archive = archive.pax(b'x', &[names(3000)]).file(&path);
    }
    check("ACLs with names", &archive.file("after").end(), &LIMIT);
    let line = b"some-user-name:x:1000:1000::/home:/bin/sh\n";
    let archive = Archive::new()
        .repeated(b'0', b"etc/passwd", line, 200_000)
        .pax(b'x', &[names(100)]);
    check(
        "a large etc/passwd",
        &archive.file("after").end(),
        &End::Made,
    );
    let mut archive = Archive::new();
    for n in 0..100_000 {
        let path = format!("/{n:0>80}");
        archive.raw(Archive::header(b'2', path.as_bytes(), b"", 0).as_bytes());
    }
    check("skipped entries", &archive.file("after").end(), &End::Made);
    let mut archive = Archive::new();
    let links = Archive::header(b'2', b"l", b".", 0);
    archive.raw(links.as_bytes());
    for _ in 0..20 {
        let path = [b"l/".repeat(30), b"d/".repeat(50_000)].concat();
        archive = archive.entry(b'L', b"long", &path).file("x");
    }
    check(
        "links in deep paths",
        &archive.file("after").end(),
        &End::Made,
    );
}

#[test]
fn a_million_entries_and_very_deep_paths_take_little_memory() {
    let block = Archive::header(b'5', b"again/", b"", 0);
    let mut archive = Archive::new();
    let many = block.as_bytes().repeat(1000);
    for _ in 0..1000 {
        archive.raw(&many);
    }
    check("duplicates", &archive.file("after").end(), &End::Made);
    let mut archive = Archive::new().file("first");
    for n in 0..60_000 {
        let header = Archive::header(b'1', format!("links/{n}").as_bytes(), b"first", 0);
        archive.raw(header.as_bytes());
    }
    check("hard links", &archive.file("after").end(), &End::Made);
    let deep = b"d/".repeat(100_000);
    let archive = Archive::new().entry(b'L', b"long", &deep).file("x");
    check("path", &archive.file("after").end(), &End::Made);
}

#[test]
fn windows_and_dictionaries_have_a_limit() {
    let mut packed = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    packed.window_log(31).unwrap();
    packed.write_all(&[0; 1024]).unwrap();
    let window = End::Refused(&["window", "128 MiB", "limit", "tar"]);
    check("zstd", &packed.finish().unwrap(), &window);
    // Built from the decoder's point of view: an encoder for such a dictionary takes ten times its size.
    let mut small = liblzma::stream::LzmaOptions::new_preset(1).unwrap();
    small.dict_size(1 << 16);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&small);
    let stream =
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::None);
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new_stream(&[0; 1024][..], stream.unwrap())
        .read_to_end(&mut packed)
        .unwrap();
    // The dictionary's size in the block header, and the header's checksum.
    let end = 12 + (usize::from(packed[12]) + 1) * 4;
    let at = (12..end)
        .find(|&at| packed[at..at + 2] == [0x21, 1])
        .unwrap();
    packed[at + 2] = 40;
    let mut sum = flate2::Crc::new();
    sum.update(&packed[12..end - 4]);
    packed[end - 4..end].copy_from_slice(&sum.sum().to_le_bytes());
    check("xz", &packed, &window);
}

#[test]
fn the_manifest_of_a_whole_container_has_limits() {
    let with = |pattern: &[u8], times| {
        let name = b"cowl-container.json";
        Archive::new().repeated(b'0', name, pattern, times).end()
    };
    let huge = Archive::new().huge(b'0', b"cowl-container.json");
    check("size", &huge.end(), &LIMIT);
    check("values", &with(b"[1,1,1,1]", 300_000), &LIMIT);
    let refused = End::Refused(&["cannot use the archive"]);
    check("nesting", &with(b"[", 900_000), &refused);
    check("strings", &with(b"\"abc\"", 1 << 20), &refused);
    // The maximum number of values, in an object with a valid checksum.
    let values = "\"\",".repeat((1 << 20) - 100);
    let body = format!("\"extra\":[{values}0],\"format\":1,\"generation\":1}}");
    let sum: String = sha2::Sha256::digest(format!("{{{body}"))
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let whole = format!("{{\"checksum\":\"sha256:{sum}\",{body}");
    let refused = End::Refused(&["cannot use the archive", "missing field"]);
    check("objects", &with(whole.as_bytes(), 1), &refused);
}

#[test]
fn a_file_of_eight_exbibytes_takes_neither_time_nor_space() {
    let mut archive = Archive::new();
    let mut header = Archive::header(b'S', b"entry", b"", 0);
    let fields = header.as_gnu_mut().unwrap();
    fields.set_real_size(i64::MAX.cast_unsigned());
    header.set_cksum();
    archive.raw(header.as_bytes());
    let archive = archive.file("after").end();
    check("sparse", &archive, &End::MadeOrRefused(&["set the size"]));
    let archive = Archive::new().pax(b'x', &[record("size", u64::MAX.to_string())]);
    let archive = archive.file("entry").end();
    check("size", &archive, &End::Refused(&["size"]));
}
