//! The passthrough of a mount, by the option of the command that mounts it, and what `cowl status` reports.

use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;

/// A store on a file system with the container `web`.
fn store_on(kind: Kind) -> Option<Store> {
    if !can(&[&[Need::Root, Need::Fuse][..], &kind.needs()].concat()) {
        return None;
    }
    let store = Store::on(|scratch, name| kind.mount(scratch, name));
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "content").unwrap();
    store.create("web", &source);
    Some(store)
}

/// Returns the mode, the option and the reason in the status.
fn passthrough(store: &Store) -> [String; 3] {
    let status = store.cowl(["status", "web", "--json"]).ok().json();
    ["mode", "option", "reason"].map(|key| {
        let value = &status["passthrough"][key];
        value
            .as_str()
            .unwrap_or_else(|| panic!("{status}"))
            .to_owned()
    })
}

fn assert_default(kind: Kind, reason: &str) {
    let Some(store) = store_on(kind) else {
        return;
    };
    let top = store.mount("web");
    let [mode, option, found] = passthrough(&store);
    assert_eq!((&*mode, &*option), ("read", "auto"));
    assert!(found.contains(reason), "{found}");
    let shown = store.ok(["status", "web"]);
    let expected = format!("passthrough: read (default): {found}");
    assert_eq!(shown.lines().nth(2), Some(&*expected), "{shown}");
    // Only for a named container.
    assert!(!store.ok(["status"]).contains("passthrough"));
    std::fs::write(top.join("file"), "changed").unwrap();
    let taken = store.cowl(["-v", "snapshot", "web"]).ok();
    assert!(
        taken
            .err()
            .contains("ms for running requests; other requests waited for "),
        "{}",
        taken.report()
    );
    store.ok(["umount", "web"]);
    assert!(!store.ok(["status", "web"]).contains("passthrough"));
}

#[test]
fn the_status_reports_that_ext4_cannot_share_blocks() {
    assert_default(Kind::Ext4, "ext4 cannot share blocks");
}

#[test]
fn the_status_reports_that_xfs_shares_blocks() {
    assert_default(
        Kind::Xfs,
        "XFS shares blocks, so passthrough=all is possible",
    );
}

#[test]
fn the_choice_of_a_mount_lasts_until_it_is_unmounted() {
    let Some(store) = store_on(Kind::Xfs) else {
        return;
    };
    store.ok(["mount", "web", "--passthrough", "all"]);
    let assert_all = |context: &str| {
        let [mode, option, reason] = passthrough(&store);
        assert_eq!((&*mode, &*option), ("all", "all"), "{context}");
        assert!(reason.contains("XFS shares blocks"), "{context}: {reason}");
    };
    assert_all("mounted");
    store.ok(["mount", "web"]);
    store.ok(["mount", "web", "--passthrough", "all"]);
    store.refused(
        ["mount", "web", "--passthrough", "off"],
        4,
        &["already mounted with passthrough=all", "cowl umount web"],
    );
    let top = store.mount("web");
    std::fs::write(top.join("file"), "changed").unwrap();
    store.ok(["snapshot", "web"]);
    store.ok(["upgrade", "web"]);
    assert_all("after an upgrade");
    // Restoring mounts it again.
    store.restore("web", "snap0");
    assert_all("after a restore");
    store.kill_daemon("web");
    store.ok(["mount", "web"]);
    assert_all("after the death of its daemon");
    store.ok(["umount", "web"]);
    store.ok(["mount", "web", "--passthrough", "off"]);
    let [mode, option, _] = passthrough(&store);
    assert_eq!((&*mode, &*option), ("off", "off"));
    store.ok(["umount", "web"]);
    store.ok(["mount", "web"]);
    assert_eq!(passthrough(&store)[1], "auto");
    store.ok(["umount", "web"]);
}

#[test]
fn mounts_without_a_choice_refuse_the_option() {
    let Some(store) = store_on(Kind::Ext4) else {
        return;
    };
    let all = ["--passthrough", "all"];
    let words = ["mount", "web", "--driver", "kernel"];
    store.refused(
        [&words[..], &all].concat(),
        2,
        &["kernel", "omit --passthrough"],
    );
    store.ok(words);
    store.refused(
        [&["mount", "web"], &all[..]].concat(),
        4,
        &["already mounted with the driver kernel"],
    );
    store.ok(["umount", "web"]);
    store.ok(["snapshot", "web"]);
    store.refused(
        [&["mount", "web@snap0"], &all[..]].concat(),
        2,
        &["omit --passthrough"],
    );
    store.refused(
        ["mount", "web", "--passthrough", "some"],
        2,
        &["some", "auto"],
    );
}
