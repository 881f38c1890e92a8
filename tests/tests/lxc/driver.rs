//! LXC containers whose root filesystem is mounted with kernel overlayfs.

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
