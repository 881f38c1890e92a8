//! The example from the announcement of lxc-snapshot, on a container in a plain directory: a snapshot, a change, a
//! list with comments, and an operation that lxc-snapshot does not support: a restore under the original name while a
//! clone depends on it.

use cowl_tests::conditions::can;
use cowl_tests::lxc::{Lxc, NEEDS};

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn a_change_in_lib_is_undone_under_the_original_name() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    let store = lxc.store();
    lxc.create("c1");
    std::fs::write(lxc.dir("c1").join("rootfs/lib/libthing"), "good\n").unwrap();
    lxc.adopt("c1").ok();
    let config = lxc.config("c1");
    lxc.start("c1");

    // A snapshot while it runs, and the change that goes wrong.
    store
        .cowl(["snapshot", "c1", "-m", "before the upgrade"])
        .ok();
    lxc.run(
        "c1",
        "echo broken > /lib/libthing; rm /etc/group; echo new > /etc/added",
    );
    store
        .cowl_with(["snapshot", "c1", "-c", "-"], b"after the upgrade\n")
        .ok();
    let list = store.cowl(["list", "c1"]).ok().out();
    let lines: Vec<_> = list
        .lines()
        .filter(|line| line.contains("the upgrade"))
        .collect();
    assert!(
        lines[0].starts_with("snap0") && lines[0].contains("before the upgrade"),
        "{list}"
    );
    assert!(
        lines[1].starts_with("snap1") && lines[1].contains("after the upgrade"),
        "{list}"
    );

    // A clone depends on the snapshot.
    store.cowl(["clone", "c1@snap1", "dependent"]).ok();
    lxc.start("dependent");
    assert_eq!(lxc.run("dependent", "cat /lib/libthing"), "broken");

    // Restored under its own name, with its own config.
    store.cowl(["restore", "c1", "snap0", "--stop"]).ok();
    assert_eq!(lxc.config("c1"), config);
    lxc.start("c1");
    assert_eq!(
        lxc.run(
            "c1",
            "cat /lib/libthing; test -e /etc/group; cat /etc/hostname"
        ),
        "good\nc1"
    );
    lxc.run("c1", "! test -e /etc/added");
    assert_eq!(lxc.run("dependent", "cat /lib/libthing"), "broken");

    // And to a new name: both run, each with a host name of its own.
    store.cowl(["restore", "c1", "snap1", "c2"]).ok();
    lxc.start("c2");
    assert_eq!(
        lxc.run("c2", "cat /lib/libthing /etc/hostname; hostname"),
        "broken\nc2\nc2"
    );
    assert_eq!(lxc.run("c1", "cat /lib/libthing; hostname"), "good\nc1");
    // Writes to one of them are not visible in the other.
    lxc.run("c2", "echo other > /lib/libthing");
    assert_eq!(lxc.run("c1", "cat /lib/libthing"), "good");

    // Removed: a snapshot, and the new container by LXC's own tool.
    store.cowl(["rm", "c1", "snap1", "--yes"]).ok();
    assert!(!store.snapshots("c1").contains(&"snap1".to_owned()));
    lxc.kill("c2");
    lxc.tool("destroy", "c2", [] as [&str; 0]).ok();
    assert!(!lxc.dir("c2").try_exists().unwrap());
    assert_eq!(lxc.run("dependent", "cat /lib/libthing"), "broken");

    // Out as a tar, in again, and started.
    lxc.kill("c1");
    lxc.unmounted("c1");
    let tar = lxc.scratch().join("c1.tar");
    let tar = tar.to_str().unwrap();
    store.cowl(["export", "c1", tar]).ok();
    store.cowl(["create", "c3", "--from", tar]).ok();
    store.cowl(["lxc", "c3", "--like", "c1"]).ok();
    lxc.start("c3");
    assert_eq!(lxc.run("c3", "cat /lib/libthing /etc/hostname"), "good\nc3");
    lxc.kill("c3");
    // A clone can be given back as well: as a plain LXC container.
    lxc.unmounted("c3");
    store.cowl(["release", "c3"]).ok();
    assert!(
        !lxc.config("c3").contains("cowl keeps"),
        "{}",
        lxc.config("c3")
    );
    lxc.start("c3");
    assert_eq!(
        lxc.run(
            "c3",
            "cat /lib/libthing; head -1 /proc/mounts | grep -c cowlfs || true"
        ),
        "good\n0"
    );
}
