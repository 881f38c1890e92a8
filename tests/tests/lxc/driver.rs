//! LXC containers whose root filesystem is mounted with kernel overlayfs.

use std::os::unix::fs::PermissionsExt as _;

use cowl_tests::conditions::{Need, can};
use cowl_tests::lxc::{Lxc, NEEDS};

#[test]
fn an_lxc_container_runs_with_the_kernel_driver() {
    if !can(NEEDS) || !can(&[Need::KernelOverlay]) {
        return;
    }
    let lxc = Lxc::with_kernel_driver();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    lxc.start("c1");
    let shown = lxc.run("c1", "head -1 /proc/mounts");
    assert!(shown.contains("overlay"), "{shown}");
    lxc.run("c1", "echo kept > /etc/written");
    lxc.store()
        .cowl(["snapshot", "c1"])
        .fails(4, &["with the driver kernel"]);
    lxc.store().cowl(["umount", "c1"]).fails(4, &["in use"]);
    lxc.store()
        .cowl(["destroy", "c1", "--yes"])
        .fails(4, &["in use"]);

    // A reboot from inside the container.
    let before = lxc.pid("c1");
    lxc.tool("attach", "c1", ["--", "/bin/reboot"]);
    lxc.wait("another first process", || {
        let now = lxc.pid("c1");
        now.is_some() && now != before
    });
    lxc.wait_for("c1", "RUNNING");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "kept");
    lxc.kill("c1");
    lxc.unmounted("c1");

    // Stopped, it has snapshots, and it starts with either driver.
    assert_eq!(lxc.store().ok(["snapshot", "c1"]), "snap0\n");
    lxc.start("c1");
    lxc.run("c1", "rm /etc/written");
    lxc.kill("c1");
    lxc.unmounted("c1");
    lxc.store().restore("c1", "snap0");
    lxc.start("c1");
    assert_eq!(lxc.run("c1", "cat /etc/written"), "kept");
    let mut mounts = lxc.store().command(["status", "c1", "--json"]);
    mounts.env_remove("COWL_DRIVER");
    let status = cowl_tests::command::run_command(mounts, b"").ok().json();
    assert_eq!(status["driver"], "kernel");
    lxc.kill("c1");
    lxc.tool("destroy", "c1", [] as [&str; 0]).ok();
}

/// A container whose root is another user of this machine, started by root.
#[test]
fn an_unprivileged_container_runs_with_the_kernel_driver() {
    if !can(NEEDS) || !can(&[Need::KernelOverlay, Need::Program("newuidmap")]) {
        return;
    }
    let lxc = Lxc::with_kernel_driver();
    lxc.create_mapped("c1");
    lxc.adopt("c1").ok();
    let line = "head -1 /proc/mounts; echo mine > /etc/written; stat -c %u /etc/written";
    let out = lxc.run_mapped("c1", line);
    assert!(out.contains(" overlay ") && out.ends_with("\n0"), "{out}");
    lxc.unmounted("c1");
    assert_eq!(lxc.store().ok(["snapshot", "c1"]), "snap0\n");
    // No other user can reach the mount point.
    let path = lxc.store().mount("c1");
    assert!(path.starts_with(lxc.store().path().join("mapped")));
    let parent = std::fs::metadata(path.parent().unwrap()).unwrap();
    assert_eq!(parent.permissions().mode() & 0o007, 0);
    lxc.store().ok(["umount", "c1"]);
}
