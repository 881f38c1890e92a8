//! `cowl exec --snapshot`, with a real apt in a real Debian; the APT hook; signals that reach the command.

use std::path::Path;
use std::process::Command;

use cowl_tests::command::{run, run_command, sh_in};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::rootfs;

/// Installs a package from a directory of the root filesystem, without network access.
const APT: &str = "apt-get install -y --no-install-recommends /root/debs/less_*.deb";

/// Prevents apt from fetching anything over the network.
const OFFLINE: &str = "export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8; \
                       echo 'APT::Sandbox::User \"root\";' > /etc/apt/apt.conf.d/99test; ";

#[test]
fn exec_takes_a_snapshot_that_undoes_apt() {
    if !can(&[Need::Root, Need::Fuse, Need::Debian]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &rootfs::debian_tar().expect("the Debian tar"));
    let line = format!("{OFFLINE}{APT}");
    let done = store
        .cowl(["exec", "--snapshot", "web", "--", "sh", "-euc", &line])
        .ok();
    assert!(
        done.err().contains("cowl restore web snap0"),
        "{}",
        done.report()
    );
    store.exec("web", "less --version");
    let list = store.cowl(["list", "web", "--json"]).ok().json();
    let first = &list["snapshots"][0];
    assert_eq!(first["kind"], "scheduled", "{list}");
    let comment = first["comment"].as_str().expect("a comment");
    assert!(comment.contains("apt-get install"), "{comment}");

    store.restore("web", "snap0");
    store.exec("web", "! command -v less");
    store.exec("web", "test -z \"$(dpkg -l less 2>/dev/null | grep ^ii)\"");
}

#[test]
fn exec_runs_nothing_if_the_requested_snapshot_fails() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &rootfs::busybox_tar().expect("the busybox tar"));
    let hooks = store.scratch().join("hooks");
    let script = hooks.join("pre-snapshot.d/no");
    std::fs::create_dir_all(script.parent().expect("a parent directory")).expect("making it");
    std::fs::write(&script, "#!/bin/sh\nexit 1\n").expect("writing the hook");
    run("chmod", ["755".as_ref(), script.as_os_str()]).ok();
    let mut command = store.command(["exec", "--snapshot", "web", "--", "touch", "/made"]);
    command.env("COWL_HOOKS_DIR", &hooks);
    run_command(command, b"").fails(125, &["pre-snapshot.d/no", "exit code 1"]);
    store.exec("web", "test ! -e /made");
    assert!(store.snapshots("web").is_empty());
}

#[test]
fn signals_reach_a_command_in_a_container() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    store.create("web", &rootfs::busybox_tar().expect("the busybox tar"));
    let blocked = store.exec("web", "grep SigBlk /proc/self/status").out();
    assert!(blocked.ends_with("0000000000000000"), "{blocked}");
    // The command must end by this signal. A caller may have set it to ignored (nohup, a background job), which commands
    // inherit.
    let cowl = cowl_tests::programs::cowl();
    let script = "kill -INT $$; sleep 1; echo alive";
    for (signal, code) in [
        ("--default-signal=INT", 128 + 2),
        ("--ignore-signal=INT", 0),
    ] {
        let output = run(
            "env",
            [
                signal.as_ref(),
                cowl.as_os_str(),
                "--store".as_ref(),
                store.path().as_os_str(),
                "exec".as_ref(),
                "web".as_ref(),
                "--".as_ref(),
                "sh".as_ref(),
                "-c".as_ref(),
                script.as_ref(),
            ],
        );
        assert_eq!(output.code, code, "{signal}: {}", output.report());
    }
}

/// Creates a machine (a Debian in a directory) on which cowl is installed, with the container `app`.
fn machine(store: &Store) -> (std::path::PathBuf, Unmount) {
    let root = store.scratch().join("machine");
    std::fs::create_dir(&root).expect("making the machine");
    let tar = rootfs::debian_tar().expect("the Debian tar");
    let unpack = [
        "-xpf".as_ref(),
        tar.as_os_str(),
        "-C".as_ref(),
        root.as_os_str(),
    ];
    run("tar", unpack).ok();
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../snap-cli/dist/apt");
    let fill = |text: String| {
        text.replace("@bindir@", "/usr/local/bin")
            .replace("@libdir@", "/usr/local/lib")
    };
    let put = |from: &str, to: &str, mode: &str| {
        let text = std::fs::read_to_string(dist.join(from)).expect("reading the hook");
        let to = root.join(to);
        std::fs::create_dir_all(to.parent().expect("a parent directory")).expect("making it");
        std::fs::write(&to, fill(text)).expect("writing the hook");
        run("chmod", [mode.as_ref(), to.as_os_str()]).ok();
    };
    put("apt-snapshot", "usr/local/lib/cowl/apt-snapshot", "755");
    put("80cowl", "etc/apt/apt.conf.d/80cowl", "644");
    std::fs::copy(
        cowl_tests::programs::cowl(),
        root.join("usr/local/bin/cowl"),
    )
    .expect("installing cowl");
    sh_in(&root, "mkdir -p proc; mount --bind /proc proc").ok();
    let proc = Unmount(root.join("proc"));
    let make = "mkdir -p /srv/app/etc /etc/cowl; cowl create app --from /srv/app";
    within(&root, make).ok();
    (root, proc)
}

#[track_caller]
fn within(root: &Path, line: &str) -> cowl_tests::command::Output {
    let mut command = Command::new("chroot");
    command
        .arg(root)
        .args(["sh", "-euc", &format!("{OFFLINE}{line}")])
        .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    run_command(command, b"")
}

#[test]
fn apt_takes_a_snapshot_before_dpkg_runs() {
    if !can(&[Need::Root, Need::Debian]) {
        return;
    }
    let store = Store::for_test();
    let (root, _proc) = machine(&store);

    // No container is configured, so no snapshot is taken.
    within(&root, APT).ok();
    within(&root, "apt-get remove -y less").ok();
    assert_eq!(within(&root, "cowl list app --no-header").ok().out(), "");

    std::fs::write(
        root.join("etc/cowl/apt-snapshot"),
        "# mine\napp # the one\n\n",
    )
    .expect("naming it");
    within(&root, APT).ok();
    let list = within(&root, "cowl list app --json").ok().json();
    let snapshot = &list["snapshots"][0];
    assert_eq!(snapshot["kind"], "scheduled", "{list}");
    assert_eq!(snapshot["tags"]["apt"], "", "{list}");
    let comment = snapshot["comment"].as_str().expect("a comment");
    assert!(comment.starts_with("before apt-get install"), "{comment}");

    // A failed snapshot stops apt before dpkg runs, with a message, unless the configuration ignores failures.
    std::fs::write(root.join("etc/cowl/apt-snapshot"), "ap\n").expect("naming another");
    let stopped = within(&root, "apt-get remove -y less");
    assert_ne!(stopped.code, 0, "{}", stopped.report());
    assert!(
        stopped.err().contains("did you mean app?"),
        "{}",
        stopped.report()
    );
    assert!(
        stopped.err().contains("apt is stopped"),
        "{}",
        stopped.report()
    );
    within(&root, "command -v less").ok();
    within(&root, "COWL_APT=0 apt-get remove -y less").ok();
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        run("umount", [self.0.as_os_str()]);
    }
}
