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

/// Packs the layer of an image, and prints its digest.
const PACK: &str = "
mkdir -p root && tar -xf rootfs.tar -C root && cp probe root && chmod 755 root/probe
echo 'web:x:1234:1235::/home/web:/bin/sh' >> root/etc/passwd
tar -cf saved/0.tar -C root . && sha256sum < saved/0.tar
";

/// Prints what a command sees of the session of its caller.
const PROBE: &str = "#!/bin/sh
echo $(id -u) $(id -g)
echo $(ls /proc/self/fd)
cat /proc/1/comm
ls -d /proc/[0-9]* | wc -l
cut -d ' ' -f 6 /proc/self/stat
grep Seccomp: /proc/self/status
echo $(awk '$6 == 0 && / _ses/' /proc/keys)
echo $A
";

#[test]
fn the_user_of_an_image_cannot_act_on_the_session_of_the_caller() {
    if !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let store = Store::for_test();
    let at = |name: &str| store.scratch().join(name);
    let rootfs = rootfs::busybox_tar().expect("the busybox tar");
    std::fs::copy(rootfs, at("rootfs.tar")).expect("copying");
    std::fs::create_dir(at("saved")).expect("a directory");
    std::fs::write(at("probe"), PROBE).expect("writing");
    let digest = sh_in(store.scratch(), PACK).ok().out();
    let digest = digest
        .split_whitespace()
        .next()
        .expect("a digest")
        .to_owned();
    let config = serde_json::json!({
        "os": "linux", "architecture": rootfs::image_architecture(),
        "config": { "User": "web", "Env": ["A=secret"], "Cmd": ["/probe"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let saved = serde_json::json!([{ "Config": "c.json", "Layers": ["0.tar"] }]);
    std::fs::write(at("saved/c.json"), config.to_string()).expect("writing");
    std::fs::write(at("saved/manifest.json"), saved.to_string()).expect("writing");
    store.create("web", &store.scratch().join("saved"));
    let exec = store.command(["exec", "web"]);
    let mut shell = Command::new("sh");
    // With a descriptor of a file that only root may read.
    shell.args(["-c", "exec \"$0\" \"$@\" 7< /etc/shadow"]);
    shell.arg(exec.get_program()).args(exec.get_args());
    for (name, value) in exec.get_envs() {
        shell.env(name, value.unwrap_or_default());
    }
    let output = run_command(shell, b"").ok();
    let printed = output.out();
    let lines: Vec<_> = printed.lines().collect();
    let [
        ids,
        descriptors,
        init,
        processes,
        session,
        seccomp,
        keys,
        secret,
    ] = lines.as_slice()
    else {
        panic!("{}", output.report());
    };
    assert_eq!(*ids, "1234 1235");
    assert_eq!(descriptors.trim(), "0 1 2 3", "3 is the directory");
    assert_eq!(*keys, "");
    assert_eq!(*init, "cowl");
    let processes: u32 = processes.parse().expect("a number");
    assert!(processes < 8, "{processes}");
    assert_ne!(*session, "0", "the session of the caller");
    assert!(seccomp.ends_with('2'), "{seccomp}");
    assert_eq!(*secret, "secret");
    // Other commands are unchanged.
    assert_eq!(store.exec("web", "id -u").out(), "0");
}
