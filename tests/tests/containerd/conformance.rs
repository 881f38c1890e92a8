//! containerd's own test suite for snapshotters, and requests that containerd would not send.

use std::path::Path;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

/// Runs a test of `tests/conformance/containerd`, which is compiled against Debian's packages of Go.
fn go_test(name: &str) -> Output {
    let scratch = Scratch::for_test();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/containerd");
    for file in source.read_dir().unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), scratch.join(file.file_name())).unwrap();
    }
    let mut command = std::process::Command::new("unshare");
    command
        .args(["-mp", "--fork", "--kill-child", "--mount-proc"])
        .args([
            "go",
            "test",
            "-count=1",
            "-v",
            "-test.root",
            "-run",
            name,
            ".",
        ])
        .current_dir(&*scratch)
        .env("TMPDIR", &*scratch)
        .env("GOPATH", "/usr/share/gocode")
        .env("GO111MODULE", "off")
        // Shared by all runs: the suite takes a minute to compile.
        .env("GOCACHE", "/var/tmp/cowl-go-cache")
        .env("COWL_SNAPSHOTTER_BIN", programs::cowl_snapshotter());
    run_command(command, b"")
}

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("go"),
    Need::Directory("/usr/share/gocode/src/github.com/containerd/containerd/snapshots/testsuite"),
];

#[test]
fn the_conformance_suite_of_containerd_passes() {
    if !can(NEEDS) {
        return;
    }
    let output = go_test("^TestSnapshotter$").ok();
    let text = output.out();
    let count = |word: &str| {
        text.lines()
            .filter(|line| line.trim().starts_with(word))
            .count()
    };
    // One test is disabled by containerd itself.
    assert!(count("--- PASS: ") >= 20, "{text}");
    assert!(count("--- SKIP: ") <= 1, "{text}");
}

#[test]
fn invalid_requests_are_refused_with_the_codes_of_containerd() {
    if !can(NEEDS) {
        return;
    }
    let output = go_test("^TestInvalidRequests$").ok();
    assert!(output.out().contains("--- PASS: TestInvalidRequests"));
}
