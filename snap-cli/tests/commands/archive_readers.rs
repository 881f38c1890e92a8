//! Exports are read by other programs without loss of what these programs support.

use std::path::Path;

use cowl_tests::command::{run, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare, Tree};
use rustix::fs::FileType;

use super::archive_programs::{TREE, cowl, read};

/// A property that a program does not restore.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// xattrs and ACLs.
    Xattrs,
    /// Times of symbolic links.
    TimesOfLinks,
    /// Owners of symbolic links.
    OwnersOfLinks,
    /// Times of directories.
    TimesOfDirs,
    /// Fractions of a second, times before 1970 or after 2242, and ids above 2,097,151, which are in PAX records.
    Records,
    /// Holes.
    Holes,
}

struct Reader {
    program: &'static str,
    /// The shell line that unpacks `a.tar` into the working directory.
    line: &'static str,
    losses: &'static [Loss],
}

const READERS: [Reader; 5] = [
    Reader {
        program: "tar",
        line: "tar --numeric-owner --acls --xattrs --xattrs-include='*' -xpf ../a.tar",
        losses: &[],
    },
    Reader {
        program: "tar",
        line: "tar --numeric-owner -xpf ../a.tar",
        losses: &[Loss::Xattrs],
    },
    // It reports a name that is not UTF-8, and unpacks it.
    Reader {
        program: "bsdtar",
        line: "bsdtar --numeric-owner --acls --xattrs -xpf ../a.tar 2> ../err ||
               ! grep -v -e \"can't be converted from UTF-8\" -e 'Error exit delayed' ../err",
        losses: &[],
    },
    Reader {
        program: "python3",
        line: "python3 -c 'import tarfile
with tarfile.open(\"../a.tar\") as archive: archive.extractall(numeric_owner=True)'",
        losses: &[Loss::Xattrs, Loss::TimesOfLinks],
    },
    Reader {
        program: "busybox",
        line: "busybox tar --numeric-owner -xpf ../a.tar",
        losses: &[
            Loss::Xattrs,
            Loss::TimesOfLinks,
            Loss::OwnersOfLinks,
            Loss::TimesOfDirs,
            Loss::Records,
            Loss::Holes,
        ],
    },
];

fn lose(tree: &mut Tree, losses: &[Loss]) {
    let loses = |loss| losses.contains(&loss);
    // bsdtar does not set the times of the directory in which it runs.
    tree.remove(&b""[..]);
    for entry in tree.values_mut() {
        let is_link = entry.kind == FileType::Symlink;
        let is_dir = entry.kind == FileType::Directory;
        if loses(Loss::Xattrs) {
            entry.xattrs.clear();
        }
        if is_link && loses(Loss::TimesOfLinks) || is_dir && loses(Loss::TimesOfDirs) {
            entry.mtime = (0, 0);
        }
        if is_link && loses(Loss::OwnersOfLinks) {
            (entry.uid, entry.gid) = (0, 0);
        }
        if loses(Loss::Records) {
            entry.mtime = (entry.mtime.0.max(0), 0);
            entry.gid = entry.gid.min(0o7_777_777);
        }
        // Python's tarfile rounds times to a double.
        if loses(Loss::TimesOfLinks) {
            entry.mtime.1 -= entry.mtime.1 % 1000;
        }
    }
}

/// Exports the container with `options`, and unpacks the archive with each reader.
fn check(scratch: &Scratch, suffix: &str, options: &[&str], readers: &[&Reader]) {
    let archive = scratch.join(format!("a.tar{suffix}"));
    let args = ["export", "web", archive.to_str().unwrap()];
    cowl(scratch, &[&args, options].concat()).ok();
    if !suffix.is_empty() {
        std::fs::rename(&archive, scratch.join("a.tar")).unwrap();
    }
    let (want, holes) = read(&scratch.join("tree"));
    for reader in readers {
        let target = scratch.make("got");
        sh_in(&target, reader.line).ok();
        let (mut got, other_holes) = read(&target);
        let mut want = want.clone();
        lose(&mut want, reader.losses);
        lose(&mut got, reader.losses);
        let differences = tree::differences(&want, &got, Compare::HISTORY);
        assert_eq!(differences, [""; 0], "{} {suffix}", reader.line);
        if !reader.losses.contains(&Loss::Holes) {
            assert_eq!(holes, other_holes, "{} {suffix}", reader.line);
        }
        remove(&target);
    }
    remove(&scratch.join("a.tar"));
}

fn remove(path: &Path) {
    run("rm", ["-rf".as_ref(), path.as_os_str()]).ok();
}

#[test]
fn exports_are_unpacked_by_other_programs() {
    let mut needs = vec![Need::Root];
    needs.extend(READERS.iter().map(|reader| Need::Program(reader.program)));
    needs.extend(["setfacl", "setfattr", "setcap"].map(Need::Program));
    if !can(&needs) {
        return;
    }
    let scratch = Scratch::for_test();
    sh_in(&scratch, TREE).ok();
    // Only GNU tar decodes such a name of an xattr.
    let mangled =
        "setfattr -x user.a=b% tree/bin/program; touch -d '2010-01-01 00:00:00' tree/bin/program";
    sh_in(&scratch, mangled).ok();
    let tree = scratch.join("tree");
    cowl(
        &scratch,
        &["create", "web", "--from", tree.to_str().unwrap()],
    )
    .ok();
    let (without_holes, others): (Vec<_>, Vec<_>) =
        (READERS.iter()).partition(|reader| reader.losses.contains(&Loss::Holes));
    check(&scratch, "", &[], &others);
    check(&scratch, "", &["--no-sparse"], &without_holes);
    for suffix in [".gz", ".xz", ".zst"] {
        check(&scratch, suffix, &[], &others[..1]);
    }
}
