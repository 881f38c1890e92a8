//! Differences from a plain directory that FUSE imposes, as docs/semantics.md describes them.

use std::ffi::OsStr;

use cowl_tests::beside::{Beside, Content, NEEDS, python};
use cowl_tests::command::run;
use cowl_tests::conditions::can;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;

/// Functions for file handles and fanotify(7) marks.
const HANDLES: &str = r#"
AT_HANDLE_FID = 0x200
def handle(path, flags=0):
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136); mount = ctypes.c_int()
    check(libc.name_to_handle_at(AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount), flags))
    return bytes(buffer[:8 + struct.unpack_from("I", buffer)[0]])
def opened(raw):
    top = os.open(".", os.O_RDONLY)
    return check(libc.open_by_handle_at(top, ctypes.create_string_buffer(raw, 136), os.O_RDONLY))
REPORT_DFID_NAME, CREATED, FILESYSTEM, MOUNT = 0xC00, 0x100, 0x100, 0x10
def mark(kind, events):
    group = check(libc.fanotify_init(REPORT_DFID_NAME, 0))
    check(libc.fanotify_mark(group, 1 | kind, ctypes.c_ulong(events), AT_FDCWD, b"."))
    return group
"#;

#[test]
fn file_handles_identify_objects_but_cannot_be_opened() {
    if !can(&NEEDS) {
        return;
    }
    let build = "os.mkdir('d'); write('d/file'); os.link('d/file', 'd/link'); write('other')";
    for content in [Content::Lower, Content::Upper] {
        let beside = Beside::new(content, build);
        let script = r#"
print(err(handle, "d/file"), err(handle, "."))
for path in ("d/file", "d", "."):
    try: raw = handle(path, AT_HANDLE_FID)
    except OSError as error: sys.exit(f"no identifiers before Linux 6.6: {error}")
    print(err(opened, raw))
assert handle("d/file", AT_HANDLE_FID) == handle("d/link", AT_HANDLE_FID) != handle("other", AT_HANDLE_FID)
"#;
        let script = format!("{HANDLES}{script}");
        let output = python(beside.mount.path(), &script).ok().out();
        assert_eq!(output.trim(), "ENOTSUP ENOTSUP\nESTALE\nESTALE\nESTALE");
        let kernel = beside.scratch.make("kernel");
        let stack = Stack::of(&[&beside.plain, &beside.scratch.join("lower")]);
        let kernel = Overlay::kernel(&stack, &kernel);
        let output = python(kernel.path(), &script).ok().out();
        assert_eq!(output.trim(), "ENOTSUP ENOTSUP\nESTALE\nESTALE\nESTALE");
        kernel.unmount();
        beside.mount.unmount();
    }
}

#[test]
fn fanotify_marks_directories_but_not_the_whole_mount() {
    if !can(&NEEDS) {
        return;
    }
    let beside = Beside::new(Content::Lower, "write('file')");
    let output = python(
        beside.mount.path(),
        &format!(
            "{HANDLES}{}",
            r#"
group = mark(0, CREATED); write("new")
event = os.read(group, 4096)
# After the event (24 bytes) and the header of its record with the fsid (12 bytes) comes the directory's handle.
raw = handle(".", AT_HANDLE_FID); size = len(raw)
assert event[36:36 + size] == raw and event[36 + size:].startswith(b"new\0"), event
print(err(mark, FILESYSTEM, CREATED), err(mark, MOUNT, 0x20))
"#
        ),
    );
    assert_eq!(output.ok().out().trim(), "ENODEV ENODEV");
    let fsid = |path: &std::path::Path| {
        let format: [&OsStr; 3] = ["-f".as_ref(), "-c%i".as_ref(), path.as_ref()];
        run("stat", format).ok().out()
    };
    assert_eq!(fsid(beside.mount.path()).trim(), "0");
    beside.mount.unmount();
}

/// The index needs file handles that identify an object for ever.
#[test]
fn kernel_overlayfs_on_a_mount_uses_no_index() {
    if !can(&NEEDS) {
        return;
    }
    let scratch = Scratch::for_test();
    let stack = Stack {
        lowers: vec![scratch.make("lower")],
        upper: Some((scratch.make("upper"), scratch.make("work"))),
    };
    let mount = Overlay::cowlfs(&stack, &scratch.make("mount"), "suid,dev");
    let dir = |name: &str| {
        let path = mount.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let inner = Stack {
        lowers: vec![dir("lower")],
        upper: Some((dir("upper"), dir("work"))),
    };
    std::fs::write(mount.path().join("lower/file"), "text").unwrap();
    let kernel = Overlay::kernel_with(
        &inner,
        &dir("merged"),
        "index=on,nfs_export=on,metacopy=off",
    );
    let mounted = cowl_tests::mount::at(kernel.path()).unwrap();
    assert!(!mounted.options.contains("index=on"), "{mounted:?}");
    assert!(!mounted.options.contains("nfs_export=on"), "{mounted:?}");
    let file = kernel.path().join("file");
    let number = || std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&file).unwrap());
    let before = number();
    std::fs::write(&file, "changed").unwrap();
    assert_eq!(number(), before);
    kernel.unmount();
    mount.unmount();
}

/// On ext4 a file has at most 16 TiB.
const BEYOND: &str = r#"
for flags in (os.O_RDONLY, os.O_RDWR):
    fd = os.open("file", flags)
    for at in (1 << 44, (1 << 44) + 1, 1 << 62, (1 << 63) - 4096):
        print(flags, at, err(os.pread, fd, 5, at), err(os.lseek, fd, at, os.SEEK_DATA), err(os.lseek, fd, at, os.SEEK_HOLE))
        if flags == os.O_RDWR: print(err(os.pwrite, fd, b"x", at), err(os.ftruncate, fd, at), err(os.posix_fallocate, fd, at, 1))
"#;

#[test]
fn lseek_can_exceed_the_maximum_file_size_but_writes_cannot() {
    if !can(&NEEDS) {
        return;
    }
    for (content, options) in [
        (Content::Lower, "passthrough=all"),
        (Content::Upper, "passthrough=all"),
        (Content::Upper, "passthrough=off"),
    ] {
        let beside = Beside::with(content, "write('file')", options);
        beside.same(BEYOND);
        let seek = "fd = os.open('file', os.O_RDONLY); print(err(os.lseek, fd, (1 << 63) - 1, 0))";
        let output = python(beside.mount.path(), seek).ok().out();
        assert_eq!(output.trim(), i64::MAX.to_string());
        beside.mount.unmount();
    }
}

/// Reads and writes at positions, sizes and addresses of buffers that are not multiples of a block.
const UNALIGNED: &str = r#"
buffer = mmap.mmap(-1, 8192)
def direct(name, at, address, size, data):
    fd = os.open(name, os.O_RDWR | os.O_DIRECT)
    part = memoryview(buffer)[address:address + size]
    try:
        part[:] = data * size
        assert os.pwritev(fd, [part], at) == size
        part[:] = bytes(size)
        assert os.preadv(fd, [part], at) == size and part == data * size
    finally: os.close(fd)
for at, address, size in ((1, 0, 512), (512, 0, 100), (0, 1, 512), (7, 3, 1), (4095, 4095, 4097)):
    for name in ("file", "new"): direct(name, at, address, size, b"d")
    with open("file", "rb") as file: file.seek(at); assert file.read(size) == b"d" * size
"#;

#[test]
fn direct_io_needs_no_alignment() {
    if !can(&NEEDS) {
        return;
    }
    for options in ["passthrough=all", "passthrough=read", "passthrough=off"] {
        let beside = Beside::with(Content::Lower, "write('file', bytes(10000))", options);
        let script = format!("write('new', bytes(10000))\n{UNALIGNED}");
        python(beside.mount.path(), &script).ok();
        beside.mount.unmount();
    }
}
