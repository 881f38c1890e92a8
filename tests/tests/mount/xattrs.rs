//! Xattrs up to the limits of the base file system, and the overlay's own xattrs, which are not visible.

use cowl_tests::beside::{Beside, Content, NEEDS, beside, python};
use cowl_tests::command::{sh, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::scratch::Scratch;

#[test]
fn limits_of_the_layer_apply_to_names_and_values() {
    beside(
        r#"
write("file"); os.mkdir("dir"); os.symlink("x", "link"); os.mkfifo("fifo"); write("full"); write("many")
os.mknod("device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
for i in range(40): os.setxattr("many", f"user.{i}", b"v" * i)
"#,
        r#"
set = lambda path, *rest: err(lambda: os.setxattr(path, *rest, follow_symlinks=False))
get = lambda path, name: err(lambda: os.getxattr(path, name, follow_symlinks=False))
for path in ("file", "dir", "link", "fifo", "device"):
    for name in ("user.a", "trusted.a", "security.a", "system.a", "other.a", "noprefix", "user.", "trusted.", "user",
                 "user." + "n" * 250, "user." + "n" * 251, "trusted." + "n" * 247, "trusted." + "n" * 248):
        for value in (b"value", b""):
            print(path, name[:12], len(name), len(value), set(path, name, value), get(path, name))
    print(sorted(n for n in os.listxattr(path, follow_symlinks=False)))
for path in ("file", "dir"):
    for size in (1, 255, 1000, 2000, 65536, 65537):
        got = set(path, "user.big", b"v" * size); print(path, size, got)
        got = get(path, "user.big"); print(got if isinstance(got, str) else len(got))
    os.removexattr(path, "user.big") if "user.big" in os.listxattr(path) else None
    C, R = os.XATTR_CREATE, os.XATTR_REPLACE
    print(set(path, "user.new", b"1", R), set(path, "user.new", b"1", C), set(path, "user.new", b"2", C), get(path, "user.new"))
    print(set(path, "user.new", b"3", R), get(path, "user.new"), set(path, "user.new", b"4", C | R), set(path, "user.new", b"", R))
    print(get(path, "user.new"), err(os.removexattr, path, "user.new"), err(os.removexattr, path, "user.new"), get(path, "user.new"))
# How much the answer's buffer holds.
def sized(call, *args, size):
    buffer = ctypes.create_string_buffer(max(size, 1))
    got = call(*args, buffer if size else None, size)
    return got if got >= 0 else errno.errorcode[ctypes.get_errno()]
os.setxattr("file", "user.ten", b"0123456789")
print([sized(libc.getxattr, b"file", b"user.ten", size=n) for n in (0, 1, 9, 10, 11, 100)])
print([sized(libc.getxattr, b"file", b"user.none", size=n) for n in (0, 1, 100)])
os.setxattr("dir", "user.empty", b"")
print([sized(libc.getxattr, b"dir", b"user.empty", size=n) for n in (0, 1)], sized(libc.listxattr, b"many", size=4) )
print(sorted((n, os.getxattr("many", n)) for n in os.listxattr("many")))
write("none"); print(sized(libc.listxattr, b"none", size=0), sized(libc.listxattr, b"none", size=1))
# Add xattrs until ENOSPC. Existing ones remain unchanged.
n = 0
while set("full", f"user.{n}", b"v" * 300) is None: n += 1
last = set("full", f"user.{n}", b"v" * 300); print(last); assert last == "ENOSPC" and n >= 10, n
print(set("full", "user.0", b"w" * 300), get("full", "user.0") == b"w" * 300, len(os.listxattr("full")) == n)
"#,
    );
}

#[test]
fn files_with_invalid_capabilities_are_copied_up_and_changed() {
    beside(
        r#"
for name in ("read", "written", "renamed", "removed", "replaced", "cut", "moded"):
    write(name, b"x" * 8000); os.setxattr(name, "security.capability", b"")
"#,
        r#"
def show(name):
    print(name, os.stat(name).st_size, sorted(os.listxattr(name)), err(os.getxattr, name, "security.capability"))
show("read")
fd = os.open("written", os.O_WRONLY); show("written"); os.write(fd, b"x"); os.close(fd); show("written")
os.rename("renamed", "new"); show("new"); open("new").close(); write("new"); show("new")
print(err(os.setxattr, "removed", "security.capability", b"", os.XATTR_CREATE))
print(err(os.removexattr, "removed", "security.capability")); show("removed")
print(err(os.setxattr, "replaced", "security.capability", b"", os.XATTR_REPLACE)); show("replaced")
os.truncate("cut", 5); show("cut")
os.chmod("moded", 0o600); show("moded"); os.close(os.open("moded", os.O_RDWR)); show("moded")
"#,
    );
}

#[test]
fn xattr_access_of_other_users_is_as_on_a_plain_directory() {
    beside(
        r#"
write("own", mode=0o644); os.chown("own", 1000, 1000); write("rooted", mode=0o646)
os.mkdir("sticky"); os.chmod("sticky", 0o1777); os.mkdir("open"); os.chmod("open", 0o777)
for p in ("own", "rooted"):
    for n in ("user.u", "trusted.t", "security.s"): os.setxattr(p, n, b"v")
write("hidden", mode=0o600); os.setxattr("hidden", "user.u", b"v"); os.symlink("own", "link"); os.setxattr("link", "trusted.l", b"v", follow_symlinks=False)
"#,
        r#"
def run():
    for path in ("own", "rooted", "sticky", "open", "hidden"):
        print(path, err(lambda: sorted(os.listxattr(path))))
        for name in ("user.u", "trusted.t", "security.s", "system.posix_acl_access", "user.new"):
            print(path, name, err(os.getxattr, path, name), err(os.setxattr, path, name, b"w"), err(os.removexattr, path, name))
    print(sorted(os.listxattr("link", follow_symlinks=False)), err(os.getxattr, "link", "trusted.l", follow_symlinks=False))
child(run, uid=1000, gid=1000); child(run, uid=1001, gid=1000)
# Visibility depends on CAP_SYS_ADMIN (21), not on the user.
child(run, uid=1002, gid=1000, hold=(21,)); child(run, hold=(0, 1, 2, 3)); run()
"#,
    );
}

/// The overlay's own xattrs are never visible, whatever happens to the object, and a user that sets an xattr of the
/// same name gets one of its own.
#[test]
fn xattrs_of_the_overlay_are_hidden_and_stored_escaped() {
    if !can(&NEEDS) {
        return;
    }
    let build = "os.makedirs('dir/sub'); write('dir/file'); write('file'); os.symlink('x', 'link'); os.mkfifo('fifo')";
    let beside = Beside::new(Content::Lower, build);
    beside.same(
        r#"
os.rename("dir", "moved"); os.mkdir("dir"); os.rename("dir", "other"); os.unlink("file"); os.mkdir("file")
os.chmod("moved/file", 0o600); os.rename("moved/file", "moved/f"); os.chown("link", 1, 1, follow_symlinks=False); os.chmod("fifo", 0o600)
paths = [os.path.join(top, name) for top, dirs, files in os.walk(".") for name in dirs + files]
for path in sorted(paths): print(path, os.listxattr(path, follow_symlinks=False)); assert not os.listxattr(path, follow_symlinks=False)
for space in ("trusted", "user"):
    for name in ("opaque", "redirect", "metacopy", "origin", "whiteout", "cowl.ino", "overlay.opaque", "anything", ""):
        full = f"{space}.overlay.{name}"
        for path in ("moved", "moved/f"):
            print(full, path, err(os.getxattr, path, full), err(os.removexattr, path, full), err(os.setxattr, path, full, b"y"))
            print(err(os.getxattr, path, full), full in os.listxattr(path))
print(sorted(os.listdir("moved")), sorted(os.listdir(".")))
"#,
    );
    let upper = beside.scratch.join("upper");
    let stored = python(
        &upper,
        "print('trusted.overlay.overlay.opaque' in os.listxattr('moved'), 'trusted.overlay.opaque' in os.listxattr('moved'))",
    );
    assert_eq!(stored.ok().out(), "True False");
    let list =
        "print([(p, sorted(os.listxattr(p))) for p in ('moved', 'moved/f', 'other', 'file')])";
    let before = beside.same(list);
    let again = beside.remounted();
    assert_eq!(again.same(list), before);
    again.mount.unmount();
}

/// XFS lists an ACL a second time, as an attribute of its own. Copied as such it would outlive the ACL, and be
/// one again where it comes to XFS.
#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn a_removed_acl_does_not_reappear_through_its_alias() {
    let mut needs = NEEDS.to_vec();
    needs.extend(Kind::Xfs.needs());
    needs.extend(["setfacl", "tar"].map(Need::Program));
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::new("acl-alias");
    let xfs = Kind::Xfs.mount(&scratch, "xfs");
    let make =
        "mkdir -p source/dir upper work out; echo secret > source/file; chmod 600 source/file
        setfacl -m u:1234:rw source/file; setfacl -m u:1234:rwx -m d:u:1234:rwx source/dir
        tar --acls --xattrs --xattrs-include='*' -C source -cf packed.tar .";
    sh_in(&xfs, make).ok();
    let aliases = |dir: &std::path::Path| {
        let list = "getfattr -d -m trusted file dir; getfacl -cn file dir";
        sh_in(dir, list).ok().out()
    };
    let there = aliases(&xfs.join("source"));
    assert!(
        there.contains("SGI_ACL_FILE") && there.contains("SGI_ACL_DEFAULT"),
        "{there}"
    );
    let clean = |label: &str, dir: &std::path::Path| {
        let list = aliases(dir);
        assert!(!list.contains("SGI_ACL"), "{label}: {list}");
        assert!(list.contains("1234"), "{label}: {list}");
        sh_in(dir, "setfacl -b file dir; setfacl -k dir").ok();
        let list = aliases(dir);
        assert!(
            !list.contains("1234") && !list.contains("SGI_ACL"),
            "{label}: {list}"
        );
        // Nor can it be set or read there.
        let set = "setfattr -n trusted.SGI_ACL_FILE -v x file 2>&1 || true; getfattr -n trusted.SGI_ACL_FILE file 2>&1 || true";
        let output = sh_in(dir, set).out();
        assert!(
            output.contains("not supported") && output.contains("No such attribute"),
            "{output}"
        );
    };
    // Copy-up: from XFS to another file system, and on XFS itself.
    let other = scratch.make("other");
    for (label, up) in [("from XFS", &other), ("on XFS", &xfs)] {
        let stack = Stack {
            lowers: vec![xfs.join("source")],
            upper: Some((up.join("upper"), up.join("work"))),
        };
        sh_in(up, "mkdir -p upper work").ok();
        let mounted = Overlay::cowlfs(&stack, &scratch.make("mounted"), "");
        sh_in(mounted.path(), "touch file dir/new").ok();
        clean(label, mounted.path());
        drop(mounted);
        let raw = sh_in(
            &up.join("upper"),
            "getfattr -d -m trusted file dir; getfacl -cn file dir",
        );
        let raw = raw.ok().out();
        assert!(
            !raw.contains("SGI_ACL") && !raw.contains("1234"),
            "{label}: {raw}"
        );
    }
    // A directory and an archive into a store, out of it again, and back to XFS.
    let store = Store::for_test();
    for (name, source) in [("dir", "source"), ("tar", "packed.tar")] {
        let source = xfs.join(source);
        store
            .cowl(["create", name, "--from", source.to_str().unwrap()])
            .ok();
        let mount = store.mount(name);
        clean(name, &mount);
        store.cowl(["umount", name]).ok();
        let (archive, out) = (scratch.join("out.tar"), xfs.join("out").join(name));
        store.cowl(["export", name, archive.to_str().unwrap()]).ok();
        store
            .cowl(["export", name, "--dir", out.to_str().unwrap()])
            .ok();
        let list = aliases(&out);
        assert!(
            !list.contains("1234") && !list.contains("SGI_ACL"),
            "{name}: {list}"
        );
        let unpacked = format!("{}/{name}-unpacked", xfs.display());
        let unpack = format!(
            "mkdir {unpacked}; tar --acls --xattrs --xattrs-include='*' -C {unpacked} -xpf {}",
            archive.display()
        );
        sh(&unpack).ok();
        let list = aliases(std::path::Path::new(&unpacked));
        assert!(
            !list.contains("1234") && !list.contains("SGI_ACL"),
            "{name}: {list}"
        );
    }
}
