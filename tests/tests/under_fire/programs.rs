//! git and make.

use std::path::Path;

use cowl_tests::command::sh_in;
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::samples::PROJECT;

use crate::field::Field;

const GIT: &str = "export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null HOME=/nonexistent
    export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
    export GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000'
    ";

/// Some hundred objects: 200 files in 20 directories, then three commits of changes.
const HISTORY: &str = "git init -q repo; cd repo
    for d in $(seq 20); do mkdir d$d; for f in $(seq 10); do echo \"$d $f\" > d$d/f$f; done; done
    ln -s d1/f1 link; chmod 755 d1/f2; git add .; git commit -qm first
    for n in 1 2 3; do for d in $(seq 20); do echo $n >> d$d/f$n; done; git commit -qam n$n; done";

#[track_caller]
fn git(dir: &Path, script: &str) -> String {
    let output = sh_in(dir, &format!("{GIT}{script}")).ok();
    assert_eq!(output.err(), "", "{}", output.report());
    output.out()
}

#[test]
fn git_clones_packs_and_verifies() {
    if !can_mount(&[Need::Program("git")]) {
        return;
    }
    let field = Field::new(|lower| {
        git(lower, HISTORY);
    });
    field.compare(|dir, round| {
        git(
            dir,
            &format!(
                "git clone -q --no-hardlinks repo clone{round}; git clone -q repo linked{round}
                 cd clone{round}; git gc -q --prune=now; git fsck --full --strict --no-progress
                 git mv d3 moved; git rm -q d4/f4; echo {round} > d5/f5; git add .; git commit -qm more
                 cd ../linked{round}; git pull -q ../clone{round} HEAD; git fsck --full --strict --no-progress
                 cd ../repo; echo {round} > d1/f1; git commit -qam round; git gc -q --prune=now
                 for repo in . ../clone{round} ../linked{round}; do cd $repo
                     git fsck --full --strict --no-progress; git status --porcelain; git rev-parse HEAD
                     git ls-files -s | git hash-object --stdin; git count-objects
                     git diff --stat HEAD; git log --oneline | wc -l
                 done"
            ),
        )
    });
    let mount = field.mount();
    git(
        &mount.path().join("repo"),
        "git fsck --full --strict --no-progress",
    );
    mount.unmount();
}

#[test]
fn make_builds_and_rebuilds_only_changes() {
    if !can_mount(&[Need::Program("make"), Need::Program("gcc")]) {
        return;
    }
    let field = Field::new(|lower| {
        sh_in(lower, PROJECT).ok();
    });
    field.compare(|dir, round| {
        // Objects do not contain the time; the program is compared as a whole.
        let script = format!(
            "make CC=gcc -j2 >/dev/null; ./program; make -q
             echo '/* {round} */' >> f7.h; sleep 0.01; make CC=gcc -j2 | wc -l; make -q
             sha256sum program *.o *.d; rm *.o program; ls"
        );
        let output = sh_in(&dir.join("src"), &script).ok();
        assert_eq!(output.err(), "", "{}", output.report());
        output.out()
    });
}
