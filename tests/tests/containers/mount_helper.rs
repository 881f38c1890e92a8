//! Containers and snapshots from fstab: `mount -t cowl` and `mount -t fuse.cowl`.

use cowl_tests::command::{Output, run};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::programs;

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("mount.fuse"),
    Need::Program("mount.fuse3"),
];

fn store() -> Store {
    let store = Store::for_test();
    let source = store.scratch().make("source");
    std::fs::write(source.join("file"), "one\n").unwrap();
    store.create("web", &source);
    store.cowl(["snapshot", "web"]).ok();
    std::fs::create_dir(store.scratch().join("dir")).unwrap();
    store
}

/// Runs shell lines in a mount namespace in which the program is installed. `$S` is the store, `$D` a mount point.
fn run_installed(store: &Store, script: &str) -> Output {
    let scratch = store.scratch().display();
    let prepared = format!(
        "set -e; mkdir -p {scratch}/sbin/u {scratch}/sbin/w
         mount -t overlay -o lowerdir=/usr/sbin,upperdir={scratch}/sbin/u,workdir={scratch}/sbin/w none /usr/sbin
         ln -sf {cowl} /usr/sbin/mount.cowl; ln -sf {cowl} /usr/sbin/cowl
         ln -sf {cowlfs} /usr/sbin/cowlfs
         export COWL_KEEPER=off S={root} D={scratch}/dir; {script}",
        cowl = programs::cowl().display(),
        cowlfs = programs::cowlfs().display(),
        root = store.path().display()
    );
    run("unshare", ["-m", "sh", "-c", &prepared])
}

#[test]
fn containers_and_snapshots_are_mounted_from_fstab() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    let script = "
        echo web $D cowl store=$S,nofail,x-systemd.automount 0 0 > $S/../fstab
        mount -T $S/../fstab $D; cat $D/file; echo two >> $D/file
        awk -v dir=$D '$2 == dir { print $1, $3 }' /proc/self/mounts; umount $D
        echo web@snap0 $D cowl store=$S,ro 0 0 > $S/../fstab
        mount -T $S/../fstab $D; cat $D/file; ! touch $D/new 2>&1 | grep -o Read-only; umount $D
        mount -t cowl -o store=$S,nosuid web $D; grep -o \"$D [^ ]* [^ ]*\" /proc/self/mounts | grep -o nosuid,nodev
        umount $D; mount -t cowl -o store=$S web $D; cat $D/file; umount $D
        COWL_STORE=$S mount -t fuse.cowl web $D; cat $D/file; umount $D
        mount -t cowl -o store=$S,driver=kernel web $D; cat $D/file
        awk -v dir=$D '$2 == dir { print $1, $3 }' /proc/self/mounts; umount $D";
    let output = run_installed(&store, script).ok().out();
    assert_eq!(
        output,
        "one\nweb fuse.cowlfs\none\nRead-only\nnosuid,nodev\none\ntwo\none\ntwo\none\ntwo\nweb overlay"
    );
}

/// containerd runs the second command for the type fuse3.cowlfs.
#[test]
fn directories_are_mounted_with_the_type_of_the_overlay() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    std::fs::create_dir(store.scratch().join("dir")).unwrap();
    let script = "
        cd $D/..; mkdir l u w; echo one > l/file; o=lowerdir=$PWD/l,upperdir=$PWD/u,workdir=$PWD/w
        mount -t fuse.cowlfs overlay $D -o $o; echo two >> $D/file; umount $D
        mount.fuse3 overlay $D -o $o -t cowlfs; cat $D/file; umount $D";
    assert_eq!(run_installed(&store, script).ok().out(), "one\ntwo");
}

#[test]
fn mount_reports_why_it_failed() {
    if !can(NEEDS) {
        return;
    }
    let store = store();
    for (line, code, message) in [
        ("-o store=$S,noexec web", 1, "\"noexec\" is not supported"),
        ("-o store=$S none", 32, "there is no container named none"),
        (
            "-o store=$S,ro web",
            1,
            "only snapshots are mounted read-only",
        ),
    ] {
        let output = run_installed(&store, &format!("mount -t cowl {line} $D"));
        assert_eq!(output.code, code, "{}", output.report());
        assert!(output.err().contains(message), "{}", output.report());
    }
}
