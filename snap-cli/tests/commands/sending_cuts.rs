//! Transfers whose connection fails, or is cut.

use cowl_tests::command::Output;

use crate::sending::{LOCAL, Side, ssh};

/// Runs `cowl copy` with a script as its ssh program.
fn copy(side: &Side, script: &str, args: &[&str]) -> Output {
    let (program, cowl) = (ssh(side, script), cowl_tests::programs::cowl());
    let words = [
        "copy",
        "--ssh",
        &program,
        "--remote",
        cowl.to_str().unwrap(),
    ];
    side.cli.cowl([&words[..], args].concat())
}

#[test]
fn failures_of_the_connection_are_reported() {
    let (a, b) = (Side::with_web(), Side::new());
    let url = format!("ssh://there{}", b.cli.path().to_str().unwrap());
    let copy = |script: &str, args: &[&str]| copy(&a, script, args);
    copy("echo no route >&2\nexit 255\n", &["web", &url]).fails(1, &["remote: no route"]);
    copy("exit 255\n", &["--from", &url, "web", "--as", "new"]).fails(1, &["the connection ended"]);
    copy("printf 'Welcome\\033[2J\\n'\n", &["web", &url])
        .fails(1, &["begins with \"Welcome\\x1b[2J\""]);
    let colored = copy("printf '\\033[31mred\\n' >&2\nexit 1\n", &["web", &url]).fails(1, &[]);
    assert!(!colored.err().contains('\u{1b}'), "{}", colored.err());
    // The other side refuses the container, and its reason is shown.
    b.cli.create("web", &a.cli.beside("base"));
    copy(LOCAL, &["web", &url]).fails(1, &["remote: error: cannot add snapshots to web"]);
    copy(LOCAL, &["nothing", &url]).fails(3, &["no container named nothing"]);
    copy(LOCAL, &["web", "ssh://-oProxyCommand=id"]).fails(2, &["invalid host"]);
    copy(LOCAL, &["web", "http://there"]).fails(2, &["ssh://"]);
    copy(LOCAL, &["web"]).fails(2, &[]);
    // A connection that is cut retains complete layers, and the next copy sends the rest.
    let c = Side::new();
    let url = format!("ssh://there{}", c.cli.path().to_str().unwrap());
    let cut =
        "while [ $# -gt 1 ]; do shift; done\ndd bs=1 count=316000 status=none | sh -c \"$1\"\n";
    let output = copy(cut, &["web", &url, "--compress", "none"]);
    output.fails(1, &["complete and retained"]);
    assert!(c.has_no_container());
    let waiting = c.waiting();
    assert!(waiting > 0);
    let output = copy(LOCAL, &["web", &url]).ok();
    assert!(
        output
            .err()
            .contains(&format!("({waiting} more were there already)")),
        "{}",
        output.err()
    );
    assert_eq!(c.states("web"), a.states("web"));
}

/// The connection can be cut between the commit and its confirmation.
#[test]
fn a_transfer_that_is_not_confirmed_is_complete() {
    let (a, b) = (Side::with_web(), Side::new());
    let url = format!("ssh://there{}", b.cli.path().to_str().unwrap());
    let copy = |script: &str, args: &[&str]| {
        let script = format!("while [ $# -gt 1 ]; do shift; done\n{script}\n");
        copy(&a, &script, args)
    };
    // Only the receiver's reply passes.
    copy("sh -c \"$1\" | head -n 1", &["web", &url]).fails(
        1,
        &[
            "before the receiver's confirmation",
            "the other side may have stored everything",
            "remote: error: web was received, but the sender cannot be notified",
        ],
    );
    assert_eq!(b.states("web"), a.states("web"));
    let output = copy("sh -c \"$1\"", &["web", &url]).ok();
    assert!(
        output.err().contains("0 snapshots (3 more"),
        "{}",
        output.report()
    );
    assert_eq!(b.described("web"), a.described("web"));
    let from = ["--from", &url, "web", "--as", "copy"];
    copy("sh -c \"$1\"; exit 255", &from).fails(1, &["the copy is complete"]);
    assert_eq!(a.states("copy"), a.states("web"));
    a.cli.ok(["check"]);
}

#[test]
fn a_reader_that_ends_early_is_a_failure() {
    let a = Side::with_web();
    let cowl = cowl_tests::programs::cowl();
    let script = format!(
        "{{ {} --store {} send web || echo \"code $?\" >&2; }} | head -c 10 >/dev/null",
        cowl.display(),
        a.cli.path().display()
    );
    let output = cowl_tests::command::sh(&script);
    assert!(output.err().contains("code 1"), "{}", output.report());
}
