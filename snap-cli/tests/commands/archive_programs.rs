//! Archives of other programs are imported as GNU tar unpacks them, and by users without privileges.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use cowl_tests::command::{Output, run, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};
use rustix::fs::FileType;

/// A tree with everything that the archive formats support.
const TREE: &str = r#"
    mkdir -p tree && cd tree
    mkdir -p bin etc/deep var/closed "$(printf 'latin\351')"
    echo program > bin/program; chmod 4755 bin/program
    echo one > etc/file; ln etc/file etc/deep/alias; ln etc/file zz-alias
    ln -s ../etc/file bin/link; ln -s /nowhere dangling
    : > empty; echo x > "$(printf 'latin\351/\\ \303\251\nname')"
    long=$(printf 'n%.0s' $(seq 90)); mkdir -p "$long/$long"; echo far > "$long/$long/$long"
    ln -s "$(printf 't%.0s' $(seq 150))" long-link; ln "$long/$long/$long" hard-to-far
    truncate -s 3M hole; echo end >> hole; truncate -s 1M all-hole
    for n in $(seq 0 40); do echo "$n" | dd of=segments bs=1 seek=$((n * 65536)) conv=notrunc status=none; done
    mkfifo fifo; mknod null c 1 3; mknod disk b 259 70000
    chown 1000:1001 etc/deep; chown 70000:2097152 empty; chown -h 3:4 dangling
    chmod 2775 etc/deep; chmod 1777 var; chmod 0 var/closed
    touch -d '2001-02-03 04:05:06.789' etc/file; touch -d '1960-01-01 UTC' empty; touch -d '2100-01-01 UTC' hole
    find . -depth -newermt 2020-01-01 ! -name hole -exec touch -h -d '2010-01-01 00:00:00' {} +
    setfattr -n user.note -v "$(printf 'a\n9 b=c\n')" etc/file; setfattr -n user.a=b% -v x bin/program
    setfattr -n trusted.note -v t dangling -h; setcap cap_net_raw+ep bin/program; chmod 4755 bin/program
    setfacl -m u:1234:rw,g:70000:r etc/file; setfacl -m u:1234:rwx,d:u:1234:rwx,d:g::- etc/deep
    touch -h -d '2010-01-01 00:00:00' bin/program etc/file etc/deep etc bin .
"#;

/// A script that writes `a.tar` with Python's tarfile, in the format that its argument names.
const WRITE_PY: &str = "
import sys, tarfile
format = getattr(tarfile, sys.argv[1] + '_FORMAT')
with tarfile.open('a.tar', 'w', format=format) as archive:
    archive.add('tree', '.')
";

/// The shell lines that write `a.tar` from `tree`: the program that each needs, and the line.
const WRITERS: &[(&str, &str)] = &[
    ("tar", "tar --format=gnu -cf a.tar -C tree ."),
    ("tar", "tar --format=oldgnu -cf a.tar -C tree ."),
    ("tar", "tar --format=posix -cf a.tar -C tree ."),
    (
        "tar",
        "tar --format=ustar --ignore-failed-read -cf a.tar -C tree . || :",
    ),
    ("tar", "tar --format=v7 -cf a.tar -C tree . || :"),
    ("tar", "tar --format=gnu --sparse -cf a.tar -C tree ."),
    (
        "tar",
        "tar --format=posix --sparse --sparse-version=0.0 -cf a.tar -C tree .",
    ),
    (
        "tar",
        "tar --format=posix --sparse --sparse-version=0.1 -cf a.tar -C tree .",
    ),
    (
        "tar",
        "tar --format=posix --sparse --sparse-version=1.0 -cf a.tar -C tree .",
    ),
    (
        "tar",
        "tar --format=posix --numeric-owner --acls --xattrs --xattrs-include='*' --selinux -cf a.tar -C tree .",
    ),
    ("tar", "tar --format=gnu -V label -cf a.tar -C tree ."),
    ("tar", "tar --format=posix -V label -cf a.tar -C tree ."),
    ("tar", "tar --format=gnu -g list -cf a.tar -C tree ."),
    ("tar", "tar --format=posix -g list -cf a.tar -C tree ."),
    ("tar", "tar -P -cf a.tar \"$PWD/tree\""),
    (
        "tar",
        "(cd tree; find . ! -name . -print0 | tar -cf ../a.tar --null -T -)",
    ),
    ("tar", "(cd tree; tar -cf ../a.tar -- *)"),
    ("tar", "tar --hard-dereference -cf a.tar -C tree ."),
    (
        "tar",
        "tar -b 1 -czf a.tar -C tree .; truncate -s +1000 a.tar",
    ),
    ("tar", "tar --zstd -cf a.tar -C tree ."),
    ("tar", "tar -cJf a.tar -C tree ."),
    ("tar", "tar -cf a.tar -C tree bin; tar -rf a.tar -C tree . "),
    ("busybox", "busybox tar -cf a.tar -C tree ."),
    (
        "bsdtar",
        "bsdtar --format pax --numeric-owner -cf a.tar -C tree .",
    ),
    (
        "bsdtar",
        "bsdtar --format pax --no-acls --no-xattrs -cf a.tar -C tree .",
    ),
    ("bsdtar", "bsdtar --format gnutar -cf a.tar -C tree ."),
    ("bsdtar", "bsdtar --format ustar -cf a.tar -C tree . || :"),
    ("bsdtar", "bsdtar --format v7tar -cf a.tar -C tree . || :"),
    ("bsdtar", "bsdtar --format pax -czPf a.tar \"$PWD/tree\""),
    ("python3", "python3 write.py PAX"),
    ("python3", "python3 write.py GNU"),
];

fn cowl(scratch: &Scratch, args: &[&str]) -> Output {
    let store = scratch.join("store");
    let store = store.to_str().unwrap();
    run(programs::cowl(), [&["--store", store], args].concat())
}

/// Unpacks an archive with GNU tar, and returns the tree.
fn unpacked_by_gnu_tar(scratch: &Scratch, archive: &Path) -> Tree {
    let target = scratch.make("gnu");
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755)).unwrap();
    sh_in(
        &target,
        &format!(
            "tar --numeric-owner --acls --xattrs --xattrs-include='*' -xpf '{}'",
            archive.display()
        ),
    )
    .ok();
    let unpacked = tree::read(&target).unwrap();
    remove(&target);
    unpacked
}

/// Imports an archive into a container, exports the container, and returns the tree.
fn imported(scratch: &Scratch, archive: &Path) -> Tree {
    let out = scratch.join("out");
    cowl(
        scratch,
        &["create", "c", "--from", archive.to_str().unwrap()],
    )
    .ok();
    cowl(scratch, &["export", "c", "--dir", out.to_str().unwrap()]).ok();
    cowl(scratch, &["destroy", "c", "--yes", "--now"]).ok();
    let imported = tree::read(&out).unwrap();
    remove(&out);
    imported
}

fn remove(tree: &Path) {
    run("rm", ["-rf".as_ref(), tree.as_os_str()]).ok();
}

/// Removes from both trees what GNU tar does not set: the attributes of a root without an entry, and the times of
/// directories if entries below them follow late, as in archives of bsdtar.
fn exempt(archive: &Path, by_gnu_tar: &mut Tree, imported: &mut Tree) {
    let archive = archive.as_os_str();
    let listed = run("tar", ["-Ptf".as_ref(), archive]).ok().stdout;
    if !listed
        .split(|&byte| byte == b'\n')
        .any(|name| name == b"./")
    {
        by_gnu_tar.remove(&b""[..]);
        imported.remove(&b""[..]);
    }
    for (path, entry) in by_gnu_tar {
        if let Some(other) = imported.get(path)
            && entry.kind == FileType::Directory
            && entry.mtime.0 >= tree::NOW
        {
            entry.mtime = other.mtime;
        }
    }
}

#[test]
fn archives_of_every_program_are_imported_as_gnu_tar_unpacks_them() {
    let mut needs = vec![Need::Root];
    needs.extend(WRITERS.iter().map(|(program, _)| Need::Program(program)));
    needs.extend(["setfacl", "setfattr", "setcap"].map(Need::Program));
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::for_test();
    sh_in(&scratch, TREE).ok();
    std::fs::write(scratch.join("write.py"), WRITE_PY).unwrap();
    let archive = scratch.join("a.tar");
    let mut failed = Vec::new();
    for (_, line) in WRITERS {
        sh_in(&scratch, &format!("rm -f a.tar list; {line}")).ok();
        let (mut expected, mut got) = (
            unpacked_by_gnu_tar(&scratch, &archive),
            imported(&scratch, &archive),
        );
        assert!(expected.len() > 15, "{line}: {:?}", expected.keys());
        exempt(&archive, &mut expected, &mut got);
        let differences = tree::differences(&expected, &got, Compare::HISTORY);
        if !differences.is_empty() {
            failed.push(format!("{line}\n  {}", differences.join("\n  ")));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Creates an archive with objects and attributes that only root can store.
fn privileged_archive(scratch: &Scratch) -> PathBuf {
    sh_in(
        scratch,
        "mkdir -p tree/dev tree/bin; echo x > tree/bin/program; mknod tree/dev/null c 1 3
         ln tree/dev/null tree/dev/null2; chown 0:0 tree/bin/program; chmod 6755 tree/bin/program
         setfattr -n trusted.note -v t tree/bin/program; setfattr -n user.note -v u tree/bin/program
         tar --xattrs --xattrs-include='*' -cf a.tar -C tree .; chmod 755 .; chmod 644 a.tar",
    )
    .ok();
    scratch.join("a.tar")
}

#[test]
fn a_user_without_privileges_can_skip_what_only_root_can_store() {
    let programs = ["setpriv", "setfattr"].map(Need::Program);
    if !can(&[&[Need::Root], programs.as_slice()].concat()) {
        return;
    }
    let scratch = Scratch::for_test();
    let archive = privileged_archive(&scratch);
    let own = scratch.make("own");
    std::os::unix::fs::chown(&own, Some(65_534), Some(65_534)).unwrap();
    // The program may be in a directory that the user cannot search.
    std::fs::copy(programs::cowl(), scratch.join("cowl")).unwrap();
    let as_user = |args: &str| {
        let line = format!(
            "XDG_RUNTIME_DIR=\"$PWD/own\" HOME=\"$PWD/own\" setpriv --reuid 65534 --regid 65534 --clear-groups \
             sh -c 'exec ./cowl --store own/store {args}'"
        );
        sh_in(&scratch, &line)
    };
    for source in ["a.tar", "tree"] {
        as_user(&format!("create c --from {source}")).fails(
            1,
            &["cannot set the owner", "as root", "--skip-unsupported"],
        );
    }
    for (source, name) in [("a.tar", "one"), ("tree", "two")] {
        let made = as_user(&format!("create {name} --from {source} --skip-unsupported")).ok();
        let notes = made.err();
        for note in [
            "skipped an owner that this user cannot set",
            "dev/null",
            "skipped an entry that this file system or user cannot store",
        ] {
            assert!(notes.contains(note), "no {note:?} in {notes}");
        }
        as_user(&format!("export {name} --dir own/{name}")).ok();
        let tree = tree::read(&own.join(name)).unwrap();
        let program = &tree[&b"bin/program"[..]];
        // Without its owner, the program would run with the privileges of the caller.
        assert_eq!((program.uid, program.mode), (65_534, 0o755), "{source}");
        assert_eq!(program.xattrs[&b"user.note"[..]], b"u", "{source}");
        let names: Vec<_> = tree
            .keys()
            .map(|path| path.escape_ascii().to_string())
            .collect();
        assert_eq!(names, ["", "bin", "bin/program", "dev"], "{source}");
    }
    let import = as_user("import a.tar three --skip-unsupported --quiet").ok();
    assert_eq!(import.err(), "");
    assert!(archive.is_file());
}

#[test]
fn the_hint_for_an_unsupported_attribute_depends_on_its_cause() {
    let needs = [Need::Root, Need::Program("python3")];
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::for_test();
    let make = "
import tarfile, io
for name, key, size in (('large', 'user.x', 60000), ('nfs', 'system.nfs4_acl', 3)):
    with tarfile.open(name + '.tar', 'w', format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo('f')
        info.pax_headers = {'SCHILY.xattr.' + key: 'x' * size}
        archive.addfile(info)
";
    std::fs::write(scratch.join("make.py"), make).unwrap();
    sh_in(&scratch, "python3 make.py").ok();
    for (name, is_everywhere) in [("nfs", true), ("large", false)] {
        let path = scratch.join(format!("{name}.tar"));
        let path = path.to_str().unwrap();
        let refused = cowl(&scratch, &["create", name, "--from", path]);
        if refused.code == 0 {
            // XFS stores xattrs of 64 KiB.
            assert!(!is_everywhere, "{}", refused.report());
            continue;
        }
        let refused = refused.fails(1, &["cannot set the xattr", "--skip-unsupported"]);
        for wrong in ["free some space", "as root"] {
            assert!(!refused.err().contains(wrong), "{}", refused.report());
        }
        let args = ["create", name, "--from", path, "--skip-unsupported"];
        let made = cowl(&scratch, &args).ok();
        let note = "skipped an xattr that this file system or user cannot store";
        assert!(made.err().contains(note), "{}", made.report());
    }
}
