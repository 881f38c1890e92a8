//! Programs that run commands in a directory: chroot, bubblewrap and systemd-nspawn (docs/hosts.md). Units and machines of
//! systemd are tested in `lxc::systemd`.

use std::path::Path;

use cowl_tests::command::run;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::rootfs;

/// Runs a shell line, in which `$D` is the mounted container, in a mount namespace of its own.
fn beside(dir: &Path, line: &str) -> String {
    let script = format!("set -eu; D={}; {line}", dir.display());
    run("unshare", ["-m", "sh", "-c", &script]).ok().out()
}

/// A container in a mounted state, on which each program makes a change.
fn mounted() -> (Store, std::path::PathBuf) {
    let store = Store::for_test();
    store.create("web", &rootfs::busybox_tar().unwrap());
    let dir = store.mount("web");
    (store, dir)
}

/// Verifies that a restore undoes what the programs wrote.
fn assert_restorable(store: &Store) {
    store.restore("web", "snap0");
    assert_eq!(store.exec("web", "ls /root").out(), "");
    store.cowl(["check"]).ok();
}

#[test]
fn chroot_and_bubblewrap_run_commands() {
    if !can(&[Need::Root, Need::Fuse, Need::Program("bwrap")]) {
        return;
    }
    let (store, dir) = mounted();
    store.cowl(["snapshot", "web"]).ok();
    let out = beside(
        &dir,
        "chroot $D /bin/sh -c 'echo one > /root/chroot; cat /root/chroot'
         run() { bwrap --bind $D / --dev /dev --proc /proc --unshare-pid \"$@\"; }
         run /bin/sh -c 'echo two > /root/bwrap; cat /root/chroot /root/bwrap; echo $$; test -c /dev/null'
         run --uid 7 --unshare-user /bin/sh -c 'id -u; cat /root/bwrap'",
    );
    assert_eq!(out, "one\none\ntwo\n2\n7\ntwo");
    // A plain user can use it if the path to the mount allows that.
    let open = store.scratch().make("open");
    store.cowl(["umount", "web"]).ok();
    let at = [Path::new("mount"), Path::new("web"), &open];
    store.cowl(at).ok();
    run("chmod", [Path::new("755"), store.scratch().as_ref()]).ok();
    let out = beside(
        &open,
        "setpriv --reuid 1000 --regid 1000 --clear-groups bwrap --ro-bind $D / --dev /dev --proc /proc --unshare-all \\
             /bin/sh -c 'id -u; cat /root/chroot; echo x > /root/chroot || echo refused' 2> /dev/null",
    );
    assert_eq!(out, "1000\none\nrefused");
    assert_restorable(&store);
}

#[test]
fn nspawn_runs_commands() {
    if !can(&[Need::Root, Need::Fuse, Need::Program("systemd-nspawn")]) {
        return;
    }
    let (store, dir) = mounted();
    store.cowl(["snapshot", "web"]).ok();
    let out = beside(
        &dir,
        "run() { systemd-nspawn -q -D $D --register=no --keep-unit --as-pid2 \"$@\" < /dev/null 2> /dev/null | tr -d '\\r'; }
         run /bin/sh -c 'echo one > /root/file; cat /root/file; echo $$'
         run --read-only /bin/sh -c '{ echo two > /root/file; } 2> /dev/null || echo refused'
         run --volatile=overlay /bin/sh -c 'echo three > /root/file; cat /root/file'
         cat $D/root/file
         run --private-users=6553600:65536 --private-users-ownership=chown /bin/sh -c 'echo four > /root/file; id -u'
         stat -c %u $D/root/file",
    );
    assert_eq!(out, "one\n2\nrefused\nthree\none\n0\n6553600");
    store.restore("web", "snap0");
    let owner = beside(&store.mount("web"), "stat -c %u $D/root");
    assert_eq!(owner, "0");
    assert_restorable(&store);
}
