//! The end of a plain user's namespace, also while other commands enter it.

use cowl_tests::conditions::{Need, can};
use cowl_tests::plain_user::{Ids, NEEDS, as_user};

#[test]
fn a_namespace_is_not_ended_from_inside() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl create web --from source; M=$(cowl -q mount web); ready
         for inside in '' 'env HOME=/none' 'unshare -Ur' 'unshare -m'; do
             cowl unshare $inside cowl unshare --stop 2> error && exit 1
             grep -c '^hint: leave the namespace first: exit' error; grep -c kill error || :
         done | sort | uniq -c | awk '{ print $1, $2 }'
         unshare -Ur cowl unshare --stop 2> error && exit 1; grep -c 'exit$' error
         ready; cowl unshare cat $M/file; cowl umount web; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(output.out(), "4 0\n4 1\n1\none", "{}", output.report());
}

/// The command mounts between the check of the mounts and the end of the holders.
#[test]
fn a_mount_during_the_end_of_the_namespace_is_retained() {
    if !can(NEEDS) || !can(&[Need::Program("strace")]) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl create web --from source; before=$(cowl unshare readlink /proc/self/ns/mnt)
         (until grep -q SIGTERM trace; do sleep 0.05; done; cowl -q mount web > at) 2> /dev/null &
         strace -qq -o trace -e trace=kill -e inject=kill:delay_enter=3000000:when=1 cowl unshare --stop 2> error && exit 1
         grep -c 'mounted in the namespace' error; wait; ready; cowl unshare cat $(cat at)/file
         [ \"$(cowl unshare readlink /proc/self/ns/mnt)\" = \"$before\" ]
         cowl umount web; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(output.out(), "1\none", "{}", output.report());
}

/// The command has found the namespace before its end, and enters it afterwards.
#[test]
fn a_mount_after_the_end_of_the_namespace_is_retained_or_undone() {
    if !can(NEEDS) || !can(&[Need::Program("strace")]) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl create web --from source; before=$(cowl unshare readlink /proc/self/ns/mnt)
         late() {
             strace -qq -o trace -e trace=setns -e inject=setns:delay_enter=4000000:when=1 cowl -q \"$@\"
         }
         late mount web > at & until [ -s trace ]; do sleep 0.05; done; cowl unshare --stop; wait; ready
         [ \"$(cowl unshare readlink /proc/self/ns/mnt)\" = \"$before\" ]; cowl unshare cat $(cat at)/file
         cowl umount web; rm trace
         late mount web 2> error & until [ -s trace ]; do sleep 0.05; done; cowl unshare --stop; cowl unshare true
         wait $! && exit 1; grep -o 'there is another one' error; cowl status web | grep -o 'not mounted'
         cowl unshare sleep 100 & until cowl unshare ps -e | grep -q 'sleep$'; do sleep 0.05; done
         cowl unshare --stop 2> error && exit 1; grep -o 'run in the namespace: sleep' error; kill $!; wait || :
         cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(
        output.out(),
        "one\nthere is another one\nnot mounted\nrun in the namespace: sleep",
        "{}",
        output.report()
    );
}

/// Mounts a file system of cowl's type, as the user's system might have one of root.
const MOUNT_AS_ROOT: &str = r#"
import ctypes, os, sys
file = os.open("/dev/fuse", os.O_RDWR)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % file
if ctypes.CDLL(None, use_errno=True).mount(b"cowl", sys.argv[1].encode(), b"fuse.cowlfs", 0, options):
    sys.exit(os.strerror(ctypes.get_errno()))"#;

#[test]
fn later_mounts_of_root_do_not_prevent_the_end_of_the_namespace() {
    if !can(NEEDS) {
        return;
    }
    let before = format!(
        "mount --make-rshared /; mkdir $D/roots
         (for attempt in $(seq 400); do [ ! -e $D/user/home/begin ] || break; sleep 0.05; done
          python3 -c '{MOUNT_AS_ROOT}' $D/roots && touch $D/user/home/mounted) &"
    );
    let output = as_user(
        Ids::Ranges,
        &before,
        "cowl create web --from source; M=$(cowl -q mount web); touch begin
         for attempt in $(seq 200); do [ ! -e mounted ] || break; sleep 0.05; done
         cowl unshare grep -c \"$D/roots .* master:.*fuse.cowlfs\" /proc/self/mountinfo
         cowl unshare --stop 2> error && exit 1; grep -c \"namespace: $M$\" error
         cowl umount web; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(output.out(), "1\n1", "{}", output.report());
}
