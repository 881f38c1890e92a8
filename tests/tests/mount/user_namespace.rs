//! Both programs without privilege: in a user namespace of one id, with user.overlay.* marks.

use std::path::Path;

use cowl_tests::conditions::{Need, can};
use cowl_tests::scratch::Scratch;
use cowl_tests::{command, programs};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("unshare"),
    Need::Program("setpriv"),
];

/// Creates a directory that the user `nobody` owns, with both programs in it.
fn mount_point() -> Scratch {
    let scratch = Scratch::for_test();
    programs::copy_for_all_users(&scratch);
    command::run("chown", [Path::new("65534:65534"), &scratch]).ok();
    scratch
}

/// Runs a script as the user `nobody`, who is root in a user namespace with its own /dev/fuse.
fn as_nobody(scratch: &Scratch, script: &str) -> String {
    let path = scratch.display();
    let outer = format!(
        "set -e; mknod {path}/fuse c 10 229; chmod 666 {path}/fuse; \
         mount --bind {path}/fuse /dev/fuse; cd {path}; \
         export HOME={path}; exec setpriv --reuid=65534 --regid=65534 --clear-groups \
         unshare -Urm sh -euc '{script}'"
    );
    let output = command::run("unshare", ["-m", "sh", "-c", &outer]).ok();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_overlay_works_in_a_user_namespace() {
    if !can(NEEDS) {
        return;
    }
    let scratch = mount_point();
    let output = as_nobody(
        &scratch,
        "mkdir lower upper work mount lower/dir; echo below > lower/file; echo x > lower/gone
         echo inside > lower/dir/file
         ./cowlfs -o lowerdir=lower,upperdir=upper,workdir=work mount
         echo above >> mount/file; rm mount/gone; mv mount/dir mount/moved; mkdir mount/dir
         ln mount/file mount/alias; chmod 700 mount/moved; ln -s target mount/link
         cat mount/file mount/moved/file; ls mount mount/dir; stat -c %h mount/alias
         umount mount
         ./cowlfs -o lowerdir=upper:lower mount
         cat mount/alias mount/moved/file; ls mount mount/dir; umount mount
         cat lower/file; getfattr -n user.overlay.redirect --only-values upper/moved; echo",
    );
    let listing = "mount:\nalias\ndir\nfile\nlink\nmoved\n\nmount/dir:\n";
    assert_eq!(
        output,
        format!("below\nabove\ninside\n{listing}2\nbelow\nabove\ninside\n{listing}below\n/dir\n")
    );
}

#[test]
fn cowl_works_in_a_user_namespace() {
    if !can(NEEDS) {
        return;
    }
    let scratch = mount_point();
    let output = as_nobody(
        &scratch,
        "mkdir source; echo one > source/file; export COWL_STORE=$PWD/store
         ./cowl create web --from source; M=$(./cowl mount web)
         echo two > $M/new; ./cowl snapshot web -m before; rm $M/file; echo three > $M/new
         ./cowl diff web; ./cowl restore web snap0 2> /dev/null; cat $M/file $M/new
         ./cowl export web - | tar t; ./cowl umount web; ./cowl destroy web --yes",
    );
    assert_eq!(
        output,
        "snap0\nD /file\nM /new\none\ntwo\n./\n./file\n./new\n"
    );
}

/// Run-time files of an unprivileged user are in the store. Only on a full disk they are in the runtime directory.
#[test]
fn runtime_files_are_in_the_runtime_directory_on_a_full_disk() {
    if !can(NEEDS) {
        return;
    }
    let scratch = mount_point();
    // An unmounted daemon removes its lock a moment later.
    let output = as_nobody(
        &scratch,
        "mkdir disk xdg source; chmod 700 xdg; mount -t tmpfs -o size=8m tmpfs disk
         echo one > source/file; echo two > source/other
         export COWL_STORE=$PWD/disk/store XDG_RUNTIME_DIR=$PWD/xdg
         ./cowl create web --from source; M=$(./cowl mount web); ls disk/store/run/*/sock | wc -l
         ls xdg; touch $M/new; ./cowl umount web; rm -r disk/store/run/* disk/store/reserve
         for size in 64k 4k 1; do dd if=/dev/zero of=disk/fill$size bs=$size || true; done 2> /dev/null
         M=$(./cowl mount web); cat $M/file; rm $M/file; ls $M
         ls xdg/cowl/*/*/sock | wc -l; ls disk/store/run
         ./cowl umount web; ls xdg/cowl/*/*-* | grep -v lock; rm disk/fill*
         M=$(./cowl mount web); ls $M; ./cowl umount web",
    );
    let seen = "new\nother\n";
    assert_eq!(output, format!("1\none\n{seen}1\nlog\nsock\n{seen}"));
}

/// Shell lines that kill the daemon of the only mount that belongs to the user ten times, while a program writes.
const KILL: &str = "
    daemon() { for pid in $(pgrep -u $1 -x cowlfs); do
        [ \"$(cat /proc/$(ps -o ppid= -p $pid | tr -d \" \")/comm)\" != cowlfs ] || echo $pid; done; }
    kill_often() { for round in 1 2 3 4 5 6 7 8 9 10; do
        old=; while [ -z \"$old\" ]; do old=$(daemon $1); done
        kill -9 $old; echo $round >&4; echo $round > $2/new$round
        while [ \"$(daemon $1)\" = \"$old\" ] || [ -z \"$(daemon $1)\" ]; do :; done; done; }";

#[test]
fn a_mount_in_a_user_namespace_outlives_its_daemon() {
    if !can(NEEDS) || !can(&[Need::Program("pgrep")]) {
        return;
    }
    let scratch = mount_point();
    let output = as_nobody(
        &scratch,
        &format!(
            "{KILL}
             mkdir lower upper work mount; echo below > lower/file; echo x > lower/gone
             ./cowlfs -o lowerdir=lower,upperdir=upper,workdir=work mount
             exec 3< mount/file 4>> mount/log; rm mount/gone; cd mount
             kill_often 0 .
             cat <&3; cat log | tr \"\\n\" \" \"; ls | tr \"\\n\" \" \"; cat new1 new10
             cd ..; exec 3<&- 4>&-; umount mount; ! daemon 0 | grep -q .; echo ended"
        ),
    );
    assert_eq!(
        output,
        "below\n1 2 3 4 5 6 7 8 9 10 file log new1 new10 new2 new3 new4 new5 new6 new7 new8 new9 1\n10\nended\n"
    );
}
