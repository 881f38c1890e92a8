//! LXC containers that are sent to another store, and the configs that come with them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::can;
use cowl_tests::cowl::Store;
use cowl_tests::lxc::{Lxc, NEEDS};
use cowl_tests::programs;

/// A line that LXC would run as root, on an event that does not occur in these tests.
const HOOK: &str = "lxc.hook.clone = /another/host/program\n";

/// Creates the adopted container c1, which has a snapshot with [`HOOK`] in its config.
fn sender() -> Lxc {
    let lxc = Lxc::for_test();
    lxc.create("c1");
    lxc.adopt("c1").ok();
    let config = lxc.dir("c1").join("config");
    std::fs::write(&config, lxc.config("c1") + HOOK).unwrap();
    lxc.store().cowl(["snapshot", "c1"]).ok();
    lxc
}

/// Runs `cowl copy` with the other store on this machine.
fn copy(here: &Store, there: &Store, args: &[&str]) -> Output {
    let program = here.beside("ssh");
    let script = "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c \"$1\"\n";
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let url = format!("ssh://there{}", there.path().display());
    let cowl = programs::cowl();
    let mut command = here.command(["copy", "--remote", cowl.to_str().unwrap()]);
    command.args(args.iter().map(|arg| match *arg {
        "URL" => url.as_str(),
        other => other,
    }));
    command.env("COWL_SSH", program);
    run_command(command, b"")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// LXC runs the hooks of a config as root of the host: those of another host need the consent of the user.
#[test]
fn configs_of_another_host_are_used_with_consent_only() {
    if !can(NEEDS) {
        return;
    }
    let lxc = sender();
    let there = Store::for_test();
    let stream = lxc.store().cowl(["send", "c1"]).ok().stdout;
    there.cowl_with(["receive", "c2"], &stream).ok();
    // The container is registered with a config of this host.
    lxc.create("plain");
    let own = lxc.dir("plain").join("config");
    let args = [
        "lxc",
        "c2",
        "--config-file",
        text(&own),
        "-P",
        text(lxc.path()),
    ];
    there.cowl(args).ok();
    let output = there.cowl(["clone", "c2@snap0", "c3"]).ok();
    assert!(
        output.err().contains("sent by another host"),
        "{}",
        output.report()
    );
    there.ok(["restore", "c2", "snap0"]);
    let restore = ["restore", "c2", "snap0", "--with-config"];
    there
        .cowl(restore)
        .fails(1, &["another host has sent it", "--trust-config"]);
    for name in ["c2", "c3"] {
        assert!(!lxc.config(name).contains(HOOK), "{}", lxc.config(name));
    }
    let shown = there.ok(["show", "c2@snap0"]);
    assert!(shown.contains("lxc.hook.clone"), "{shown}");
    there.ok(["restore", "c2", "snap0", "--with-config", "--trust-config"]);
    assert!(lxc.config("c2").contains(HOOK), "{}", lxc.config("c2"));
    // A snapshot that is taken here has the config of the container.
    there.ok(["snapshot", "c2", "--name", "own"]);
    there.ok(["clone", "c2@own", "c4"]);
    assert!(lxc.config("c4").contains(HOOK));
    for name in ["c2", "c3", "c4"] {
        lxc.tool("destroy", name, [] as [&str; 0]).ok();
    }
}

#[test]
fn a_copy_registers_a_container_with_lxc() {
    if !can(NEEDS) {
        return;
    }
    let lxc = sender();
    let (here, there) = (lxc.store(), Store::for_test());
    let path = text(lxc.path());
    copy(
        here,
        &there,
        &["c1", "URL", "--as", "c5", "--lxc", "-P", path],
    )
    .ok();
    assert!(lxc.config("c5").contains(HOOK), "{}", lxc.config("c5"));
    lxc.start("c5");
    assert_eq!(lxc.run("c5", "hostname"), "c5");
    lxc.kill("c5");
    lxc.wait("c5 is unmounted", || {
        let status = there.cowl(["status", "c5", "--json"]).ok().json();
        status["state"] == "not-mounted"
    });
    // The user trusts the sender.
    there.ok(["restore", "c5", "snap0", "--with-config"]);
    // A transfer that was cut after its commit, and its repetition.
    copy(here, &there, &["c1", "URL", "--as", "c6"]).ok();
    assert!(!lxc.dir("c6").try_exists().unwrap());
    let again = ["c1", "URL", "--as", "c6", "--lxc", "-P", path];
    copy(here, &there, &again).ok();
    let config = lxc.config("c6");
    assert!(config.contains("lxc.uts.name = c6"), "{config}");
    let output = copy(here, &there, &again).ok();
    assert!(
        output.err().contains("c6 is an LXC container already"),
        "{}",
        output.report()
    );
    assert_eq!(lxc.config("c6"), config);
    // From the other host.
    copy(
        &there,
        here,
        &["--from", "URL", "c1", "--as", "c7", "--lxc", "-P", path],
    )
    .ok();
    assert!(lxc.config("c7").contains("lxc.uts.name = c7"));
    for name in ["c5", "c6", "c7"] {
        lxc.tool("destroy", name, [] as [&str; 0]).ok();
    }
}
