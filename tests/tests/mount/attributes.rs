//! Modes, owners, ACLs, times and xattrs, compared with a plain directory.

use cowl_tests::beside::{beside, beside_lower};

#[test]
fn mode_and_umask_of_the_request_are_honored() {
    beside(
        "os.mkdir('open'); os.chmod('open', 0o777)",
        r#"
def make():
    tag = f"open/{os.umask(0):o}"; os.umask(int(tag[5:], 8))
    os.mkdir(tag + "d", 0o777); os.mkdir(tag + "D", 0o1753)
    os.close(os.open(tag + "f", os.O_CREAT | os.O_RDWR, 0o666))
    os.close(os.open(tag + "F", os.O_CREAT | os.O_RDWR, 0o4777))
    os.close(os.open(tag + "0", os.O_CREAT | os.O_RDWR, 0))
    os.mkfifo(tag + "p", 0o666); os.mknod(tag + "n", stat.S_IFREG | 0o640)
    os.symlink("to", tag + "l")
    for kind in "dDfF0pnl": print(kind, of(tag + kind))
for umask in (0, 0o022, 0o027, 0o077, 0o777):
    child(make, uid=1000 + umask, gid=2000, umask=umask)
    child(lambda: os.mknod(f"open/c{umask}", stat.S_IFCHR | 0o666, os.makedev(1, 3)), umask=umask)
    print(of(f"open/c{umask}"))
# Replacing a whiteout takes another code path, on which the mode must not depend.
def again():
    tag = "open/77"
    os.rmdir(tag + "d"); os.unlink(tag + "f"); os.unlink(tag + "p")
    os.mkdir(tag + "d", 0o777); os.close(os.open(tag + "f", os.O_CREAT | os.O_RDWR, 0o666))
    os.mkfifo(tag + "p", 0o666)
    for kind in "dfp": print(of(tag + kind))
child(again, uid=1000 + 0o77, gid=7, umask=0o007)
"#,
    );
}

#[test]
fn an_object_created_over_a_whiteout_has_the_requested_mode() {
    beside_lower(
        "os.mkdir('d'); os.chmod('d', 0o777)
for kind in 'abcd': write('d/' + kind)",
        r#"
def make():
    for kind in "abcd": os.unlink("d/" + kind)
    os.mkdir("d/a", 0o777); os.mkfifo("d/b", 0o777); os.symlink("x", "d/d")
    os.close(os.open("d/c", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o6777))
    for kind in "abcd": print(of("d/" + kind))
child(make, uid=4711, gid=4712, umask=0o027)
"#,
    );
}

#[test]
fn default_acls_are_inherited_and_override_the_umask() {
    beside(
        r#"
os.mkdir("d"); os.chmod("d", 0o777); write("d/hidden")
os.setxattr("d", DEFAULT, acl(("u", 7, -1), ("user", 6, 1234), ("g", 5, -1), ("mask", 7, -1), ("o", 4, -1)))
os.mkdir("no-mask"); os.chmod("no-mask", 0o777)
os.setxattr("no-mask", DEFAULT, acl(("u", 7, -1), ("g", 2, -1), ("o", 1, -1)))
"#,
        r#"
def show(path):
    names = sorted(n for n in os.listxattr(path, follow_symlinks=False) if n.startswith("system"))
    print(path, of(path), [(n, os.getxattr(path, n, follow_symlinks=False).hex()) for n in names])
def make():
    for top in ("d", "no-mask"):
        os.mkdir(top + "/sub", 0o777); os.mkdir(top + "/sub/sub", 0o751)
        os.close(os.open(top + "/file", os.O_CREAT | os.O_RDWR, 0o666))
        os.close(os.open(top + "/sub/file", os.O_CREAT | os.O_RDWR, 0o600))
        os.mkfifo(top + "/fifo", 0o640); os.mknod(top + "/node", stat.S_IFREG | 0o666)
        os.symlink("x", top + "/link")
        for name in ("sub", "sub/sub", "file", "sub/file", "fifo", "node", "link"):
            show(f"{top}/{name}")
    # Also where the name is hidden by a whiteout.
    os.unlink("d/hidden"); os.mkdir("d/hidden", 0o777); show("d/hidden")
    os.rmdir("d/hidden"); os.close(os.open("d/hidden", os.O_CREAT | os.O_RDWR, 0o666)); show("d/hidden")
child(make, uid=1000, gid=1000, umask=0o077)
assert os.getxattr("d/sub", DEFAULT) == os.getxattr("d", DEFAULT)
"#,
    );
}

#[test]
fn mode_and_acl_remain_consistent() {
    beside(
        "write('file', mode=0o640); os.mkdir('dir')",
        r#"
for path in ("file", "dir"):
    def show(): print(of(path), err(lambda: os.getxattr(path, ACCESS).hex()))
    os.setxattr(path, ACCESS, acl(("u", 6, -1), ("user", 7, 1), ("group", 3, 5), ("g", 4, -1), ("mask", 6, -1), ("o", 0, -1))); show()
    os.chmod(path, 0o711); show()
    os.chmod(path, 0o2770); show()
    os.setxattr(path, ACCESS, acl(("u", 7, -1), ("user", 1, 1), ("g", 1, -1), ("mask", 1, -1), ("o", 2, -1))); show()
    # No more than a mode: no attribute is left.
    os.setxattr(path, ACCESS, acl(("u", 6, -1), ("g", 4, -1), ("o", 4, -1))); show()
    os.setxattr(path, ACCESS, acl(("u", 6, -1), ("user", 7, 9), ("g", 4, -1), ("mask", 7, -1), ("o", 0, -1)))
    os.removexattr(path, ACCESS); show()
    print(err(os.removexattr, path, ACCESS), err(os.setxattr, path, ACCESS, b"junk"))
    print(err(os.setxattr, path, DEFAULT, acl(("u", 6, -1), ("g", 4, -1), ("o", 4, -1)))); show()
    def other():
        print(err(os.setxattr, path, ACCESS, acl(("u", 6, -1), ("g", 6, -1), ("o", 6, -1))))
        print(err(os.removexattr, path, ACCESS), err(os.chmod, path, 0o777))
    child(other, uid=1000, gid=1000)
# Access is granted and denied exactly as the ACL says.
os.chmod("file", 0o600)
os.setxattr("file", ACCESS, acl(("u", 6, -1), ("user", 4, 1001), ("user", 0, 1002), ("group", 6, 2000), ("g", 0, -1), ("mask", 6, -1), ("o", 4, -1)))
def tried():
    for flags in (os.O_RDONLY, os.O_WRONLY):
        fd = err(os.open, "file", flags); print(fd if isinstance(fd, str) else "open")
for uid, gid, groups in ((1001, 1, ()), (1002, 2000, ()), (1003, 1, (2000,)), (1004, 4, ()), (1005, 0, ())):
    print(uid, gid, groups); child(tried, uid=uid, gid=gid, groups=groups)
"#,
    );
}

#[test]
fn setfacl_clears_setgid_only_for_users_outside_the_group() {
    beside(
        r#"
for name in ("outsider", "member", "supplementary", "root", "many"):
    write(name, mode=0o2775); os.chown(name, 1000, 3000); os.chmod(name, 0o2775)
    os.mkdir(name + ".d"); os.chown(name + ".d", 1000, 3000); os.chmod(name + ".d", 0o2775)
"#,
        r#"
value = acl(("u", 7, -1), ("user", 7, 1), ("g", 7, -1), ("mask", 7, -1), ("o", 5, -1))
def change(name):
    os.setxattr(name, ACCESS, value); os.setxattr(name + ".d", ACCESS, value)
    print(name, of(name), of(name + ".d"))
many = tuple(range(5000, 5300)) + (3000,)
child(lambda: change("outsider"), uid=1000, gid=1000, groups=(1000, 2000))
child(lambda: change("member"), uid=1000, gid=3000)
child(lambda: change("supplementary"), uid=1000, gid=1000, groups=(2000, 3000))
child(lambda: change("many"), uid=1000, gid=1000, groups=many)
change("root")
modes = {n: os.stat(n).st_mode & 0o2000 for n in ("outsider", "member", "supplementary", "many", "root")}
assert modes == {"outsider": 0, "member": 0o2000, "supplementary": 0o2000, "many": 0o2000, "root": 0o2000}, modes
# Only the owner may at all.
child(lambda: print(err(os.setxattr, "member", ACCESS, value)), uid=1001, gid=3000)
"#,
    );
}

#[test]
fn a_setgid_directory_passes_its_group_to_new_entries() {
    beside(
        r#"
os.mkdir("team"); write("team/hidden"); os.mkdir("team/lower"); os.mkdir("team/hidden.d")
os.chown("team", 0, 3000); os.chmod("team", 0o2777); write("other"); os.chown("other", 1000, 1000)
"#,
        r#"
def make():
    os.mkdir("team/d", 0o755); os.mkdir("team/d/d", 0o700)
    os.close(os.open("team/f", os.O_CREAT | os.O_RDWR, 0o644))
    os.close(os.open("team/g", os.O_CREAT | os.O_RDWR, 0o2775)); os.mkfifo("team/p"); os.symlink("x", "team/l")
    os.mknod("team/n", stat.S_IFREG | 0o2755); os.link("team/f", "team/h")
    os.unlink("team/hidden"); os.close(os.open("team/hidden", os.O_CREAT | os.O_RDWR, 0o2775))
    os.rmdir("team/hidden.d"); os.mkdir("team/hidden.d", 0o755); os.mkdir("team/hidden.d/x")
    os.rename("other", "team/other")
    for name in ("d", "d/d", "f", "g", "p", "l", "n", "h", "hidden", "hidden.d", "hidden.d/x", "other"):
        print(name, of("team/" + name))
os.chmod(".", 0o777)
child(make, uid=1000, gid=1000)
assert os.stat("team/d/d").st_gid == 3000 and os.stat("team/d/d").st_mode & 0o2000
for name in ("f", "g", "h", "p", "n", "l"): os.unlink("team/" + name)
os.rmdir("team/d/d"); os.rmdir("team/d"); os.unlink("team/hidden")
os.rmdir("team/hidden.d/x"); os.rmdir("team/hidden.d"); os.rename("team/other", "other")
write("team/hidden"); os.mkdir("team/hidden.d"); os.chown("other", 1000, 1000)
child(make, uid=1000, gid=1000, groups=(3000,))
"#,
    );
}
