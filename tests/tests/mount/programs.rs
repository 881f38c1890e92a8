//! Real programs on a mount, compared with a plain directory: dpkg and apt with a large package, git, sqlite with two
//! writers, a build with make. Their files are complete after a new mount, and the times and inode numbers that they
//! recorded are still valid.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cowl_tests::command::{self, sh, sh_in};
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::mount::{Overlay, Stack};
use cowl_tests::rootfs;
use cowl_tests::samples::{PROJECT, ask_sqlite, in_chroot, without_records};
use cowl_tests::scratch::Scratch;
use cowl_tests::tree::{self, Compare};

/// A stack of one lower layer and an empty upper layer.
struct Workspace {
    scratch: Scratch,
    stack: Stack,
}

impl Workspace {
    fn new() -> Workspace {
        let scratch = Scratch::for_test();
        let stack = Stack {
            lowers: vec![scratch.make("lower")],
            upper: Some((scratch.make("upper"), scratch.make("work"))),
        };
        Workspace { scratch, stack }
    }

    fn lower(&self) -> &Path {
        &self.stack.lowers[0]
    }

    /// Creates a plain directory with the content of the lower layer.
    fn plain(&self) -> PathBuf {
        let plain = self.scratch.make("plain");
        command::run("cp", [Path::new("-aT"), self.lower(), &plain]).ok();
        plain
    }

    fn mount(&self) -> Overlay {
        Overlay::cowlfs(&self.stack, &self.scratch.make("tested"), "dev,suid")
    }
}

#[test]
fn a_large_package_is_installed_and_removed() {
    if !can_mount(&[Need::Debian]) {
        return;
    }
    let workspace = Workspace::new();
    rootfs::unpack(&rootfs::debian_tar().unwrap(), workspace.lower()).unwrap();
    sh(&format!(
        "chmod --reference='{0}/lower' '{0}/upper'",
        workspace.scratch.display()
    ))
    .ok();
    let plain = workspace.plain();
    let mounted = workspace.mount();
    let root = mounted.path();
    let before = without_records(root);
    let install = "apt-get -qq -y --no-install-recommends install /root/large/*.deb >/dev/null
        echo WORD | cpp-12 -P -DWORD=55";
    assert_eq!(in_chroot(root, install).out(), "55");
    in_chroot(&plain, install);
    let installed = without_records(root);
    let more = installed.len() - before.len();
    assert!(more > 1000, "only {more} files came");
    let expected = without_records(&plain);
    tree::assert_same("installed", &installed, &expected, Compare::HISTORY);
    mounted.unmount();

    let mounted = workspace.mount();
    let root = mounted.path();
    assert_eq!(in_chroot(root, "dpkg --verify; dpkg --audit").out(), "");
    let remove = format!(
        "apt-get -qq -y purge {} >/dev/null; dpkg --verify",
        rootfs::LARGE.join(" ")
    );
    assert_eq!(in_chroot(root, &remove).out(), "");
    mounted.unmount();

    let mounted = workspace.mount();
    let removed = without_records(mounted.path());
    tree::assert_same("removed", &before, &removed, Compare::IDENTICAL);
    mounted.unmount();
}

const GIT: &str = "export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null HOME=/nonexistent
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
    ";

#[track_caller]
fn git(dir: &Path, script: &str) -> String {
    sh_in(dir, &format!("{GIT}{script}")).ok().out()
}

/// Some thousand objects: 1500 files in 50 directories, then three commits of changes.
const HISTORY: &str = "git init -q repo; cd repo
    for d in $(seq 50); do mkdir d$d; for f in $(seq 30); do echo \"$d $f\" > d$d/f$f; done; done
    ln -s d1/f1 link; chmod 755 d1/f2; git add .; git commit -qm first
    for n in 1 2 3; do for d in $(seq 50); do echo $n >> d$d/f$n; done; git commit -qam n$n; done";

/// Verifies that git considers its index current and reads no file again: diff-files compares stat data, and lists
/// every difference even if the content is equal.
#[track_caller]
fn nothing_to_read_anew(repo: &Path) {
    let index = || {
        let stat = repo.join(".git/index").symlink_metadata().unwrap();
        (stat.mtime(), stat.mtime_nsec(), stat.ino())
    };
    let before = index();
    assert_eq!(git(repo, "git diff-files"), "", "stat data changed");
    assert_eq!(git(repo, "git status --porcelain"), "");
    assert_eq!(index(), before, "git status rewrote the index");
}

#[test]
fn git_finds_its_index_up_to_date() {
    if !can_mount(&[Need::Program("git")]) {
        return;
    }
    let workspace = Workspace::new();
    git(workspace.lower(), HISTORY);
    // If the index is not newer than the files, git reads their content.
    sh_in(
        workspace.lower(),
        "find repo -name .git -prune -o -exec touch -h -d '2020-01-01' {} +",
    )
    .ok();
    git(&workspace.lower().join("repo"), "git status --porcelain");
    nothing_to_read_anew(&workspace.lower().join("repo"));

    let mounted = workspace.mount();
    let repo = mounted.path().join("repo");
    nothing_to_read_anew(&repo);
    git(&repo, "git fsck --full --strict");
    git(
        mounted.path(),
        "git clone -q --no-hardlinks repo clone; git clone -q repo linked
         cd clone; git gc -q --prune=now; git fsck --full --strict; git log --oneline | wc -l",
    );
    // Operations that copy up directories, files, attributes only, and a file with several names.
    git(
        &repo,
        "echo changed > d1/f1; chmod 755 d2/f1; git mv d3 moved; git rm -q d4/f4; ln d5/f5 d5/alias
         git add .; git commit -qm changes; git gc -q --prune=now; git fsck --full --strict
         touch -d '2020-01-02' d1/f1 d5/alias; git status --porcelain",
    );
    for repo in ["repo", "clone", "linked"] {
        let repo = mounted.path().join(repo);
        git(&repo, "sleep 0.01; git status --porcelain");
        nothing_to_read_anew(&repo);
    }
    mounted.unmount();

    let mounted = workspace.mount();
    for repo in ["repo", "clone", "linked"] {
        let repo = mounted.path().join(repo);
        nothing_to_read_anew(&repo);
        git(&repo, "git fsck --full --strict");
    }
    assert_eq!(
        git(&mounted.path().join("clone"), "git log --oneline | wc -l"),
        "4"
    );
    mounted.unmount();
}

/// The numbers of rows that two processes at once bring the table to.
fn two_writers(database: &Path, mode: &str) {
    let script = format!(
        "PRAGMA busy_timeout = 60000; PRAGMA journal_mode = {mode}; {}",
        "BEGIN IMMEDIATE; INSERT INTO t(v) SELECT hex(randomblob(200)) FROM t LIMIT 5;
         UPDATE t SET v = v || 'x' WHERE id % 100 = 1; COMMIT; SELECT count(*) FROM t;"
            .repeat(40)
    );
    let file = tempfile_with(&script);
    let children: Vec<_> = (0..2)
        .map(|_| {
            Command::new("sqlite3")
                .args(["-bail", "-batch"])
                .arg(database)
                .stdin(std::fs::File::open(file.path()).unwrap())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "sqlite3 in mode {mode}: {}",
            command::show(&output.stderr)
        );
    }
}

fn tempfile_with(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn sqlite_supports_two_concurrent_writers() {
    if !can_mount(&[Need::Program("sqlite3")]) {
        return;
    }
    let workspace = Workspace::new();
    let modes = ["wal", "delete", "truncate", "persist"];
    for mode in modes {
        ask_sqlite(
            &workspace.lower().join(mode),
            &format!(
                "PRAGMA journal_mode = {mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT);
                 CREATE INDEX i ON t(v); WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n
                 WHERE x < 2000) INSERT INTO t(v) SELECT hex(randomblob(100)) FROM n;"
            ),
        );
    }
    let mounted = workspace.mount();
    for mode in modes {
        two_writers(&mounted.path().join(mode), mode);
    }
    let check = |mounted: &Overlay| {
        for mode in modes {
            let database = mounted.path().join(mode);
            let output = ask_sqlite(&database, "PRAGMA integrity_check; SELECT count(*) FROM t;");
            assert_eq!(output, "ok\n2400", "{mode}");
        }
    };
    check(&mounted);
    mounted.unmount();
    let mounted = workspace.mount();
    check(&mounted);
    mounted.unmount();
}

#[test]
fn make_rebuilds_nothing_without_changes() {
    if !can_mount(&[Need::Program("make"), Need::Program("gcc")]) {
        return;
    }
    let workspace = Workspace::new();
    sh_in(workspace.lower(), PROJECT).ok();
    let mounted = workspace.mount();
    let src = mounted.path().join("src");
    let make = |target: &str| sh_in(&src, &format!("make CC=gcc -j2 {target}")).ok().out();
    make("");
    assert_eq!(sh_in(&src, "./program").ok().out(), "1275");
    sh_in(&src, "make -q").ok();
    mounted.unmount();

    let mounted = workspace.mount();
    sh_in(&src, "make -q; ./program").ok();
    // A changed header of the lower layer causes only its two sources and the program to be rebuilt.
    sh_in(&src, "echo '/* more */' >> f7.h").ok();
    let again = make("");
    assert_eq!(again.lines().count(), 3, "{again}");
    sh_in(&src, "make -q; mv ../src ../moved; cd ../moved; make -q").ok();
    mounted.unmount();
    let mounted = workspace.mount();
    sh_in(&mounted.path().join("moved"), "make -q; ./program").ok();
    mounted.unmount();
}
