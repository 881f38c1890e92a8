//! Permissions: other users, supplementary groups, sticky directories, and copy-ups on behalf of other users,
//! compared with a plain directory.

use std::os::unix::fs::PermissionsExt;

use cowl_tests::beside::{Beside, Content, NEEDS, beside, python};
use cowl_tests::conditions::can;

#[test]
fn other_users_have_the_same_permissions_as_on_a_plain_directory() {
    beside(
        r#"
MODES = (0o777, 0o755, 0o750, 0o770, 0o711, 0o700, 0o070, 0o007, 0o000, 0o644, 0o622, 0o444)
for mode in MODES:
    d = f"d{mode:o}"; os.mkdir(d); os.mkdir(d + "/sub")
    for n in ("file", "victim", "mine"): write(f"{d}/{n}", mode=0o644)
    os.chown(f"{d}/mine", 1001, 1001); os.chown(d, 1000, 3000); os.chmod(d, mode)
    f = f"f{mode:o}"; write(f); os.chown(f, 1000, 3000); os.chmod(f, mode)
os.chmod(".", 0o777)
"#,
        r#"
MODES = (0o777, 0o755, 0o750, 0o770, 0o711, 0o700, 0o070, 0o007, 0o000, 0o644, 0o622, 0o444)
def tried(call, *args):
    got = err(call, *args)
    if isinstance(got, int) and not isinstance(got, bool): os.close(got); got = "open"
    return got if isinstance(got, (str, bool)) else "" if got is None else "done"
def run(tag):
    for mode in MODES:
        d, f = f"d{mode:o}", f"f{mode:o}"
        print(tag, d, tried(os.listdir, d), tried(os.stat, d + "/file"), tried(os.stat, d + "/none"), tried(os.open, d + "/file", os.O_RDONLY),
              tried(os.open, d + f"/new{tag}", os.O_CREAT | os.O_RDWR), tried(os.mkdir, d + f"/dir{tag}"), tried(os.mkfifo, d + f"/fifo{tag}"),
              tried(os.symlink, "x", d + f"/link{tag}"), tried(os.link, d + "/mine", d + f"/hard{tag}"), tried(os.rename, d + "/file", d + "/file2"),
              tried(os.rename, d + "/file2", d + "/file"), tried(os.unlink, d + "/victim"), tried(os.rmdir, d + "/sub"),
              tried(os.chmod, d + "/mine", 0o600), tried(os.chdir, d), tried(os.access, d, os.W_OK), tried(os.rename, d, d))
        os.chdir(top)
        print(tag, f, [tried(os.open, f, how) for how in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)], [os.access(f, how) for how in (os.R_OK, os.W_OK, os.X_OK)],
              tried(os.truncate, f, 5), tried(os.chmod, f, mode), tried(os.chown, f, 1001, -1), tried(os.chown, f, -1, 3001), tried(os.chown, f, -1, 3000),
              tried(os.utime, f), tried(lambda: os.utime(f, ns=(1, 1))), tried(os.link, f, f + tag), tried(os.getxattr, f, "user.x"), tried(os.setxattr, f, "user.x", b"y"))
# As the kernel's permission checks go, a descriptor outlives them.
top = os.open(".", os.O_RDONLY)
for tag, uid, gid, groups in (("owner", 1000, 1000, ()), ("owner-3001", 1000, 1000, (3001,)), ("group", 1001, 3000, ()), ("supplementary", 1002, 1002, (5, 3000, 7)),
                              ("many", 1003, 1003, tuple(range(6000, 6200)) + (3000,)), ("other", 1004, 1004, (5,)), ("rootgroup", 1005, 0, (0,)), ("root", 0, 0, ())):
    child(lambda: run(tag), uid=uid, gid=gid, groups=groups)
for name in sorted(os.listdir(".")): print(name, of(name))
for mode in MODES: print(mode, [(n, of(f"d{mode:o}/{n}")) for n in sorted(os.listdir(f"d{mode:o}"))])
"#,
    );
}

#[test]
fn in_a_sticky_directory_users_rename_and_remove_only_their_own_entries() {
    beside(
        r#"
os.mkdir("tmp"); os.chown("tmp", 1009, 1009); os.chmod("tmp", 0o1777); os.mkdir("out"); os.chmod("out", 0o777)
for user in range(1000, 1012):
    for action in ("unlink", "rename", "out", "over", "swap"): write(f"tmp/{user}-{action}"); os.chown(f"tmp/{user}-{action}", user, user)
    os.mkdir(f"tmp/{user}-dir"); os.chown(f"tmp/{user}-dir", user, user); os.mkdir(f"tmp/{user}-move"); os.chown(f"tmp/{user}-move", user, user)
"#,
        r#"
def run(me):
    for user in (1000, 1001):
        n = f"tmp/{user}-"
        write(f"tmp/new-{me}-{user}")
        print(me, user, err(os.unlink, n + "unlink"), err(os.rename, n + "rename", n + f"renamed{me}"), err(os.rename, n + "out", f"out/{me}-{user}"),
              err(os.rename, f"tmp/new-{me}-{user}", n + "over"), err(renameat2, n + "swap", f"tmp/{me}-swap", EXCHANGE), err(os.rmdir, n + "dir"),
              err(os.rename, n + "move", f"out/dir{me}{user}"), err(os.link, n + "over", f"out/link{me}{user}"), err(os.chmod, n + "over", 0o600))
for me in (1000, 1001, 1002, 1009): child(lambda: run(me), uid=me, gid=me)
child(lambda: run(1010), uid=0)
for f in ("tmp", "out"): print([(n, of(f"{f}/{n}")) for n in sorted(os.listdir(f))])
"#,
    );
}

/// A file that is copied up for a user appears under its name only with the owner, mode and ACL of the original, and
/// the work directory in which it is created is not accessible to other users.
#[test]
fn a_copy_up_for_another_user_never_widens_access() {
    if !can(&NEEDS) {
        return;
    }
    let beside = Beside::new(
        Content::Lower,
        r#"
os.mkdir("d"); os.chmod("d", 0o777)
for n in ("secret", "grouped", "listed", "suid", "many"): write("d/" + n, b"s" * 300000); os.chown("d/" + n, 1000, 3000)
os.chmod("d/secret", 0o600); os.chmod("d/grouped", 0o460); os.chmod("d/suid", 0o6777); os.chmod("d/many", 0o620); os.link("d/many", "d/alias")
os.chmod("d/listed", 0o600)
os.setxattr("d/listed", ACCESS, acl(("u", 6, -1), ("user", 6, 1001), ("g", 0, -1), ("mask", 6, -1), ("o", 0, -1)))
os.mkdir("d/closed"); os.chown("d/closed", 1000, 3000); os.chmod("d/closed", 0o700); write("d/closed/in"); os.chown("d/closed/in", 1000, 3000)
"#,
    );
    let work = beside.scratch.join("work/work");
    let mode = std::fs::metadata(&work).unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        mode & 0o077,
        0,
        "{mode:o}: other users can access the work directory"
    );
    let script = format!(
        "UPPER, WORK = {:?}, {:?}\n{}",
        beside.scratch.join("upper"),
        work,
        r#"
IN_ATTRIB, IN_CREATE, IN_MOVED_TO, IN_MODIFY, IN_CLOSE_WRITE = 4, 0x100, 0x80, 2, 8
# Copy up the directory first, so that inotify can watch it.
write("d/other", b"x")
fd = check(libc.inotify_init1(os.O_NONBLOCK))
watches = {check(libc.inotify_add_watch(fd, os.fsencode(p), IN_ATTRIB | IN_CREATE | IN_MOVED_TO)): n for p, n in ((UPPER + "/d", "upper"), (WORK, "work"))}
def events():
    seen = []
    while True:
        data = err(os.read, fd, 65536)
        if data == "EAGAIN": return seen
        while data:
            wd, mask, _, length = struct.unpack_from("iIII", data)
            seen.append((watches[wd], mask & 0xFFF, data[16:16 + length].rstrip(b"\0").decode())); data = data[16 + length:]
def change(path, uid, gid, groups=()):
    before = of(path), os.listxattr(path), [os.getxattr(path, n) for n in os.listxattr(path)]
    events()
    child(lambda: os.close(os.open(path, os.O_WRONLY)), uid=uid, gid=gid, groups=groups)
    seen = events(); after = of(path), os.listxattr(path), [os.getxattr(path, n) for n in os.listxattr(path)]
    name = path.rsplit("/", 1)[1]
    here = [(mask, n) for where, mask, n in seen if where == "upper" and n]
    print(path, before[0], sorted(here))
    assert before == after, (before, after)
    return here
for name, uid, gid, groups in (("secret", 1000, 1, ()), ("grouped", 5, 3000, ()), ("listed", 1001, 1, ()), ("suid", 7, 7, ()), ("secret", 0, 0, ())):
    here = change("d/" + name, uid, gid, groups)
    want = [] if uid == 0 else [(IN_MOVED_TO, name)]
    assert here == want, f"{name}: not moved into the directory in its final state: {here}"
    real = os.lstat(UPPER + "/d/" + name); assert (real.st_uid, real.st_gid) == (1000, 3000)
here = change("d/many", 3, 5, (3000,))
# Creating a hard link updates the ctime, so it counts as a change of attributes.
assert {n for mask, n in here} == {"many", "alias"} and os.lstat(UPPER + "/d/many").st_mode == os.lstat("d/many").st_mode
events(); child(lambda: os.utime("d/closed/in"), uid=1000)
assert [e for e in events() if e[0] == "upper" and e[2]][0] == ("upper", IN_MOVED_TO, "closed"), "a directory is copied up completely before it becomes visible"
print(of("d/closed"), of("d/closed/in"))
def denied():
    for n in ("secret", "grouped", "closed/in"): assert err(os.open, "d/" + n, os.O_RDONLY) == "EACCES"
    assert err(os.listdir, WORK) == "EACCES"
child(denied, uid=1002, gid=1002)
"#
    );
    python(beside.mount.path(), &script).ok();
    beside.mount.unmount();
}

/// Flags that chattr(1) sets are refused, clearly; those set on the base below are honoured.
#[test]
fn file_flags_are_refused_and_those_of_the_layer_are_honored() {
    if !can(&NEEDS) {
        return;
    }
    let build = "write('file'); os.mkdir('dir'); write('dir/in')
for n in ('immutable', 'append'): write(n)";
    let beside = Beside::new(Content::Upper, build);
    let flags = r#"
GET, SET, FSGET, FSSET = 0x80086601, 0x40086602, 0x801C581F, 0x401C5820
def flags(path, call, size=28):
    fd = os.open(path, os.O_RDONLY)
    try: return err(fcntl.ioctl, fd, call, bytes(size))
    finally: os.close(fd)
for path in ("file", "dir"):
    for call in (GET, SET, FSGET, FSSET): assert flags(path, call) == "ENOTTY", (path, hex(call), flags(path, call))
os.chmod("file", 0o600); write("file", b"still writable"); write("dir/new")
"#;
    python(beside.mount.path(), flags).ok();
    let upper = beside.scratch.join("upper");
    let chattr = |flag: &str, name: &str| {
        cowl_tests::command::run(
            "chattr",
            [std::ffi::OsStr::new(flag), upper.join(name).as_os_str()],
        )
        .ok()
    };
    for (flag, name) in [("+i", "immutable"), ("+a", "append")] {
        chattr(flag, name);
    }
    let honoured = python(
        beside.mount.path(),
        r#"
for n in ("immutable", "append"):
    print(n, err(lambda: os.close(os.open(n, os.O_WRONLY))), err(lambda: os.close(os.open(n, os.O_WRONLY | os.O_APPEND))),
          err(os.chmod, n, 0o600), err(os.unlink, n), err(os.rename, n, "x"), err(os.link, n, "y"), err(os.setxattr, n, "user.a", b""), read(n))
"#,
    );
    for (flag, name) in [("-i", "immutable"), ("-a", "append")] {
        chattr(flag, name);
    }
    let output = honoured.ok().out();
    assert!(!output.contains("None EPERM"), "{output}");
    assert!(
        output.starts_with("immutable EPERM EPERM EPERM EPERM EPERM EPERM EPERM b'content'"),
        "{output}"
    );
    beside.mount.unmount();
}
