//! Archives of other programs are imported as GNU tar unpacks them: stat fields, content, holes, xattrs and ACLs.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cowl_tests::command::{Output, run, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::holes::{Segments, segments};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};
use rustix::fs::FileType;

/// A tree with everything that the archive formats support.
pub(super) const TREE: &str = r#"
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
    for name in ['tree'] if format != tarfile.USTAR_FORMAT else ['tree/bin', 'tree/etc', 'tree/latin\\udce9', 'tree/hole', 'tree/segments']:
        archive.add(name, name.replace('tree', '.', 1))
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
    (
        "tar",
        "tar --format=posix -g list -cf first -C tree .; echo 2 > tree/etc/second; touch -d 2011-01-01 tree/etc/second tree/etc
         tar --format=posix -g list -cf a.tar -C tree .; rm tree/etc/second first",
    ),
    ("tar", "tar -b 64 -cf a.tar -C tree ."),
    (
        "tar",
        "tar --format=posix --pax-option='globexthdr.name=g,gid:=77,exthdr.name=%d/x/%f' -cf a.tar -C tree .",
    ),
    ("7zz", "(cd files; 7zz a -ttar -snh -snl ../a.tar . > ../log)"),
    ("cpio", "(cd tree; find . -print0 | cpio -0oH ustar > ../a.tar || :)"),
    ("cpio", "(cd tree; find . -print0 | cpio -0oH tar > ../a.tar || :)"),
    ("pax", "(cd tree; pax -w -x ustar -f ../a.tar . || :)"),
    (
        "git",
        "(cd files; git init -q .; git add -A; git -c user.name=a -c user.email=b commit -qm x
          git archive -o ../a.tar HEAD; rm -r .git)",
    ),
    ("python3", "python3 write.py PAX"),
    ("python3", "python3 write.py GNU"),
    ("python3", "python3 write.py USTAR"),
];

pub(super) fn cowl(scratch: &Scratch, args: &[&str]) -> Output {
    let store = scratch.join("store");
    let store = store.to_str().unwrap();
    run(programs::cowl(), [&["--store", store], args].concat())
}

/// A tree, and the data segments of its files.
pub(super) type Unpacked = (Tree, Segments);

pub(super) fn read(root: &Path) -> Unpacked {
    let tree = tree::read(root).unwrap();
    let segments = segments(root, &tree).unwrap();
    (tree, segments)
}

/// Unpacks an archive with GNU tar, and returns its output and the tree.
pub(super) fn unpacked_by_gnu_tar(scratch: &Scratch, archive: &Path) -> (Output, Unpacked) {
    let target = scratch.make("gnu");
    std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = sh_in(
        &target,
        &format!(
            "tar --numeric-owner --acls --xattrs --xattrs-include='*' -xpf '{}'",
            archive.display()
        ),
    );
    let unpacked = read(&target);
    remove(&target);
    (output, unpacked)
}

/// Imports an archive into a container with `options`, and exports the container to a directory. Returns the output of
/// the import, and the tree if it succeeded.
pub(super) fn imported(
    scratch: &Scratch,
    archive: &Path,
    options: &[&str],
) -> (Output, Option<Unpacked>) {
    let out = scratch.join("out");
    let args = ["create", "c", "--from", archive.to_str().unwrap()];
    let created = cowl(scratch, &[&args, options].concat());
    if created.code != 0 {
        return (created, None);
    }
    cowl(scratch, &["export", "c", "--dir", out.to_str().unwrap()]).ok();
    cowl(scratch, &["destroy", "c", "--yes", "--now"]).ok();
    let unpacked = read(&out);
    remove(&out);
    (created, Some(unpacked))
}

fn remove(tree: &Path) {
    run("rm", ["-rf".as_ref(), tree.as_os_str()]).ok();
}

/// Removes from both trees what GNU tar does not set: the attributes of a root without an entry, and the times of
/// directories if entries below them follow late, as in archives of bsdtar, or if they have no entry.
pub(super) fn exempt(archive: &Path, by_gnu_tar: &mut Tree, imported: &mut Tree) {
    let archive = archive.as_os_str();
    let listed = run("tar", ["-Ptf".as_ref(), archive]).stdout;
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

/// Returns the differences between the tree that GNU tar unpacks and the imported one.
pub(super) fn differences(
    archive: &Path,
    (mut expected, holes): Unpacked,
    (mut got, other_holes): Unpacked,
) -> Vec<String> {
    exempt(archive, &mut expected, &mut got);
    let mut all = tree::differences(&expected, &got, Compare::HISTORY);
    for (path, data) in &holes {
        let other = other_holes.get(path);
        if other != Some(data) {
            all.push(format!(
                "/{}: data {data:?} != {other:?}",
                path.escape_ascii()
            ));
        }
    }
    all
}

/// Imports an archive, and returns the differences from the tree that GNU tar unpacks.
pub(super) fn compared(scratch: &Scratch, archive: &Path, options: &[&str]) -> Vec<String> {
    let (output, expected) = unpacked_by_gnu_tar(scratch, archive);
    output.ok();
    let (created, got) = imported(scratch, archive, options);
    created.ok();
    differences(archive, expected, got.unwrap())
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
    sh_in(
        &scratch,
        "cp -a tree files; rm files/fifo files/null files/disk",
    )
    .ok();
    std::fs::write(scratch.join("write.py"), WRITE_PY).unwrap();
    let archive = scratch.join("a.tar");
    let mut failed = Vec::new();
    for (_, line) in WRITERS {
        sh_in(&scratch, &format!("rm -f a.tar list; {line}")).ok();
        let entries = run("tar", ["-Ptf".as_ref(), archive.as_os_str()]).stdout;
        assert!(entries.split(|&byte| byte == b'\n').count() > 8, "{line}");
        let differences = compared(&scratch, &archive, &[]);
        if !differences.is_empty() {
            failed.push(format!("{line}\n  {}", differences.join("\n  ")));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
