//! `cowl doctor`: what works on this host.

use cowl_tests::command::{Output, run};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;
use serde_json::Value;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// Runs it with a store in `scratch`, after shell lines in a private mount namespace.
fn doctor(scratch: &Scratch, before: &str, options: &str) -> Output {
    let script = format!(
        "set -e; {before} exec {} --store {}/store doctor {options}",
        programs::cowl().display(),
        scratch.display()
    );
    run("unshare", ["-m", "sh", "-c", &script])
}

fn result<'v>(found: &'v Value, check: &str) -> &'v Value {
    let checks = found["checks"].as_array().unwrap();
    checks.iter().find(|one| one["check"] == check).unwrap()
}

#[test]
fn a_working_host_is_reported_and_nothing_is_left() {
    if !can(NEEDS) {
        return;
    }
    let scratch = Scratch::for_test();
    let found = doctor(&scratch, "", "--json").ok().json();
    for check in ["fuse", "kernel", "xattrs", "whiteouts", "mount"] {
        assert_eq!(result(&found, check)["result"], "works", "{found}");
    }
    for check in [
        "space",
        "reflinks",
        "keeper",
        "passthrough",
        "kernel-driver",
        "id-ranges",
        "lxc",
    ] {
        assert_ne!(result(&found, check)["result"], "broken", "{found}");
    }
    assert_eq!(std::fs::read_dir(&*scratch).unwrap().count(), 0);
    let table = doctor(&scratch, "", "").ok().out();
    assert!(table.starts_with("CHECK"), "{table}");
    assert_eq!(std::fs::read_dir(&*scratch).unwrap().count(), 0);
}

#[test]
fn what_is_broken_is_reported_with_its_remedy() {
    if !can(NEEDS) {
        return;
    }
    let scratch = Scratch::for_test();
    let hidden = "mount -t tmpfs none /mnt; mount --bind /mnt /dev;";
    let output = doctor(&scratch, hidden, "--json");
    assert_eq!(output.code, 1, "{}", output.report());
    let found = output.json();
    let fuse = result(&found, "fuse");
    assert_eq!(fuse["result"], "broken", "{found}");
    assert!(fuse["remedy"].as_str().unwrap().contains("modprobe fuse"));
    assert_eq!(result(&found, "mount")["result"], "broken", "{found}");
    let read_only = format!(
        "mount --bind {0} {0}; mount -o remount,ro,bind {0};",
        scratch.display()
    );
    let output = doctor(&scratch, &read_only, "");
    assert_eq!(output.code, 1, "{}", output.report());
    let message = "store: no container can be mounted; to change that: choose another directory";
    assert!(output.out().contains(message), "{}", output.report());
    assert_eq!(std::fs::read_dir(&*scratch).unwrap().count(), 0);
}
