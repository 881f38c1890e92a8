//! A plain user without any privilege: commands enter a namespace of that user, which two processes hold.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::programs;
use cowl_tests::scratch::Scratch;

pub(crate) const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("setpriv"),
    Need::Program("unshare"),
    Need::Program("newuidmap"),
    Need::Program("busybox"),
    Need::Program("python3"),
];

/// The first id of the users of the tests.
const FIRST_USER: u32 = 1_000_000_000;

/// Whether the user has ranges of subordinate ids.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ids {
    Ranges,
    Own,
}

/// Becomes the user `$5` in a mount namespace, after the lines `$3`, which root executes. `$1` is the directory, `$2` the
/// content of /etc/subuid, `$4` the script.
const BECOME: &str = r#"
D=$1
export D U=$5
mkdir -m 755 "$D/user" "$D/user/home"
cp /etc/passwd /etc/group "$D"
echo "cowl-plain:x:$U:$U::$D/user/home:/bin/sh" >> "$D/passwd"
echo "cowl-plain:x:$U:" >> "$D/group"
printf "$2" > "$D/ids"
for file in passwd:passwd group:group ids:subuid ids:subgid; do
    mount --bind "$D/${file%:*}" "/etc/${file#*:}"
done
mknod -m 666 "$D/fuse" c 10 229
mount --bind "$D/fuse" /dev/fuse
cat > "$D/user/script" <<'SCRIPT'
set -eu
# The processes that hold the namespace; with an argument, all processes of cowl.
holders() { ps -u $U -o pid=,stat=,args= | awk -v all="${1-}" \
    '$2 !~ /Z/ && $3 ~ /cowl$/ && (all || / hold /) { print $1 }'; }
# The processes that hold its lock. A new one is visible before it has the lock.
locks() { stat -c ':%i 0 0$' "$HOME"/.local/state/cowl/namespace-* 2> /dev/null > inode || echo none > inode
    grep -c -f inode /proc/locks || :; }
ready() { for attempt in $(seq 100); do [ "$(holders | wc -l) $(locks)" != "2 2" ] || return 0; sleep 0.05; done; return 1; }
settle() { for attempt in $(seq 100); do [ "$(holders | wc -l)" != "$1" ] || return 0; sleep 0.05; done; holders; return 1; }
# A holder that is killed may have been replaced before.
finish() { for attempt in $(seq 20); do pids=$(holders all); [ -n "$pids" ] || return 0; kill -9 $pids || true; sleep 0.05; done; }
trap finish EXIT
mkdir source source/bin source/etc source/proc source/dev
cp "$(command -v busybox)" source/bin/busybox
for name in sh ls cat id; do ln -s busybox source/bin/$name; done
echo one > source/file
SCRIPT
printf '%s\n' "$4" >> "$D/user/script"
export HOME="$D/user/home" PATH="$D:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
unset XDG_RUNTIME_DIR XDG_STATE_HOME XDG_DATA_HOME XDG_CONFIG_HOME COWL_STORE COWL_KEEPER
eval "$3"
chown -R $U:$U "$D/user"
eval "${LAST-}"
cd "$HOME"
exec ${WRAP-} setpriv --reuid $U --regid $U --clear-groups bash "$D/user/script"
"#;

pub(crate) fn as_user(ids: Ids, before: &str, script: &str) -> Output {
    let scratch = Scratch::for_test();
    programs::copy_for_all_users(&scratch);
    // Tests run at the same time, also those of several processes, and the namespace of each belongs to another user.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let user = FIRST_USER + 32 * std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed);
    let ranges = match ids {
        Ids::Ranges => "cowl-plain:300000:65536\\n",
        Ids::Own => "",
    };
    let mut command = Command::new("unshare");
    command
        .args(["-m", "bash", "-euc", BECOME, "bash"])
        .arg(&*scratch)
        .args([ranges, before, script, &user.to_string()]);
    run_command(command, b"")
}

/// The commands that a user needs from the creation of a container to its removal.
const MAIN_JOB: &str = "
    cowl create web --from source
    M=$(cowl mount web 2> note); grep -q \"cowl unshare ls $M\" note
    cowl unshare cat $M/file
    cowl unshare sh -c \"echo two > $M/new; rm $M/file\"
    cowl snapshot web -m before
    cowl exec web -- /bin/sh -c 'cat /new; echo three > /new; id -u; echo x > /dev/null'
    cowl diff web@snap0 web
    cowl restore web snap0 2> /dev/null
    cowl exec web -- cat new
    cowl status > status 2> note; grep -c 'web .* mounted' status; grep -q 'cowl unshare' note
    cowl clone web@snap0 second; cowl rename second other; cowl exec other -- /bin/ls /
    cowl export web@snap0 web.tar; tar tf web.tar | sort | tr '\\n' ' '; echo
    cowl export web --with-snapshots all.tar; cowl import all.tar third; cowl list third --format '{name}'
    cowl flatten web 2> /dev/null; cowl prune web --keep-last 1 2> /dev/null > /dev/null; cowl check > /dev/null
    kill -9 $(cowl status web --json | grep -o '\"pid\": [0-9]*' | head -1 | tr -dc 0-9)
    cowl unshare cat $M/new
    cowl upgrade web > /dev/null
    ! ls $M | grep new
    cowl umount web
    cowl destroy web --yes 2> /dev/null; cowl gc --empty-trash > /dev/null
    cowl unshare --stop; settle 0";

const MAIN_JOB_OUTPUT: &str = "one\nsnap0\ntwo\n0\nM /new\ntwo\n1\nbin\ndev\netc\nnew\nproc\n\
    ./ ./bin/ ./bin/busybox ./bin/cat ./bin/id ./bin/ls ./bin/sh ./dev/ ./etc/ ./new ./proc/ \nsnap0\nauto0\ntwo";

#[test]
fn a_plain_user_with_ranges_of_ids_needs_no_privilege() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(Ids::Ranges, "", MAIN_JOB).ok();
    assert_eq!(output.out(), MAIN_JOB_OUTPUT, "{}", output.report());
}

#[test]
fn a_plain_user_without_ranges_and_with_a_runtime_directory_needs_no_privilege() {
    if !can(NEEDS) {
        return;
    }
    let before = "mkdir -m 700 $D/user/run; export XDG_RUNTIME_DIR=$D/user/run";
    let output = as_user(Ids::Own, before, MAIN_JOB).ok();
    assert_eq!(output.out(), MAIN_JOB_OUTPUT, "{}", output.report());
}

#[test]
fn ids_of_the_namespace_are_the_ranges_of_the_user() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl unshare awk '{ print $1, $2, $3 }' /proc/self/uid_map /proc/self/gid_map | sed s/$U/U/
         cowl unshare sh -c 'touch a; chown 7:8 a; stat -c \"%u %g\" a'; stat -c '%u %g' a
         cowl unshare id -u; id -u | sed s/$U/U/",
    )
    .ok();
    let map = "0 U 1\n1 300000 65536\n";
    assert_eq!(
        output.out(),
        format!("{map}{map}7 8\n300006 300007\n0\nU"),
        "{}",
        output.report()
    );
}

#[test]
fn two_commands_at_once_create_one_namespace() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "for n in 1 2 3 4 5 6; do cowl create web$n --from source & done; wait
         for n in 1 2 3 4 5 6; do cowl unshare readlink /proc/self/ns/user /proc/self/ns/mnt; done | sort -u | wc -l
         settle 2; cowl list --format '{name}' > /dev/null; cowl status | wc -l",
    )
    .ok();
    assert_eq!(output.out(), "2\n7", "{}", output.report());
}

#[test]
fn a_killed_holder_is_replaced() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl create web --from source; M=$(cowl -q mount web); ready
         for round in 1 2 3 4 5 6; do
             kill -9 $(holders | head -1); cowl unshare cat $M/file; ready
             kill -9 $(holders | tail -1); cowl unshare cat $M/file; ready
         done | sort | uniq -c
         # SIGHUP, as at the end of a session, has no effect; SIGTERM ends both.
         kill -HUP $(holders); cowl unshare cat $M/file; cowl umount web
         kill $(holders | head -1); settle 0; cowl list | wc -l; ready",
    )
    .ok();
    assert_eq!(output.out().trim(), "12 one\none\n2", "{}", output.report());
}

/// Nothing holds the mount namespace any more, but a program uses the mount. Its user namespace is entered again.
#[test]
fn a_mount_in_use_is_reached_after_both_holders_were_killed() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl create web --from source; M=$(cowl -q mount web); settle 2
         before=$(cowl unshare readlink /proc/self/ns/user)
         cowl unshare sh -c \"cd $M; exec sleep 100\" & sleep 0.5
         kill -9 $(holders); settle 0
         cowl status web > status 2> note; cat status | grep -c 'mounted elsewhere.*sleep'; grep -c 'was killed' note
         [ \"$(cowl unshare readlink /proc/self/ns/user)\" = \"$before\" ]; settle 2
         cowl umount web 2> error || cat error | grep -o 'in use by'
         kill %1; wait || true
         cowl umount web || true; cowl -q mount web > /dev/null; cowl unshare cat $M/file
         # Without a program, the mount ends with its namespace.
         kill -9 $(holders); settle 0; sleep 0.2
         cowl -q mount web > /dev/null; cowl unshare cat $M/file; settle 2
         kill -9 $(holders all); cowl -q exec web -- /bin/cat file",
    )
    .ok();
    assert_eq!(
        output.out(),
        "1\n1\nin use by\none\none\none",
        "{}",
        output.report()
    );
}

/// Takes a lock like that of a holder, as another user and as a process in no namespace.
const FORGE: &str = r#"
import fcntl, struct, sys, time
file = open(sys.argv[1], "r+")
fcntl.fcntl(file, fcntl.F_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, 0, 0, 1, 0))
print("locked", flush=True)
time.sleep(20)"#;

#[test]
fn no_other_namespace_is_entered() {
    if !can(NEEDS) {
        return;
    }
    // The directory of another user, with its process, is not used; another one is.
    let before = format!(
        "
        mkdir -m 700 $D/user/run; export XDG_RUNTIME_DIR=$D/user/run FORGE='{FORGE}'
        export BOOT=$(cat /proc/sys/kernel/random/boot_id)-$(stat -Lc %i /proc/self/ns/pid)
        LAST='mkdir -p -m 755 $HOME/.local/state/cowl; touch $HOME/.local/state/cowl/namespace-'$BOOT'
            chmod 600 $HOME/.local/state/cowl/*; chown -R $U $HOME/.local; chown -R 54399 $HOME/.local/state/cowl
            mkfifo $D/done; chmod 666 $D/done
            setpriv --reuid 54399 --regid 54399 --clear-groups unshare -Ur \
                python3 -c \"$FORGE\" $HOME/.local/state/cowl/namespace-'$BOOT' > $D/done 2> /dev/null &
            read line < $D/done'"
    );
    let output = as_user(
        Ids::Ranges,
        &before,
        "cowl unshare awk '{ print $2 }' /proc/self/uid_map | sed s/$U/U/; ls $XDG_RUNTIME_DIR/cowl | wc -l
         cowl unshare --stop; settle 0
         # A process of the user that is in no namespace, or in another one of its own.
         rm -r $XDG_RUNTIME_DIR/cowl; mkdir -m 700 $XDG_RUNTIME_DIR/cowl
         file=$XDG_RUNTIME_DIR/cowl/namespace-$BOOT; touch $file; chmod 600 $file
         python3 -c \"$FORGE\" $file > locked & until grep -q locked locked; do sleep 0.05; done
         cowl list > /dev/null; cowl unshare id 2> error || grep -o 'holds no namespace of your user' error
         kill %1; wait || true
         # The file that remains is no holder, and a wrong mode is refused.
         cowl unshare id -u; cowl unshare --stop; settle 0
         chmod 644 $file; cowl unshare id 2> error || grep -o 'has access to it' error",
    )
    .ok();
    assert_eq!(
        output.out(),
        "U\n300000\n1\nholds no namespace of your user\n0\nhas access to it",
        "{}",
        output.report()
    );
}

/// Runs the script `inside` as the user in a pid namespace, like a container that has the home directory of the user.
const CONTAINER: &str = r#"
printf 'set -eu\n%s\ntouch here\nuntil [ -e left ]; do sleep 0.05; done' "$inside" > $D/user/inside
export FORGED=$HOME/.local/state/cowl/namespace-$(cat /proc/sys/kernel/random/boot_id)-$(stat -Lc %i /proc/self/ns/pid)
LAST='cd $HOME; unshare -pfm --mount-proc setpriv --reuid $U --regid $U --clear-groups timeout 60 bash $D/user/inside &
    for attempt in $(seq 200); do [ ! -e here ] || break; sleep 0.05; done; [ -e here ]'
"#;

#[test]
fn a_holder_in_a_container_with_the_same_home_is_not_entered() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        &format!(
            "inside='cowl unshare readlink /proc/self/ns/user > theirs; cowl unshare sh -c \"touch alive\"'\n{CONTAINER}"
        ),
        "[ -e alive ]; cowl create web --from source; M=$(cowl -q mount web); settle 4
         cowl unshare readlink /proc/self/ns/user > own; cmp -s theirs own || echo different
         cowl unshare cat $M/file; ls .local/state/cowl | wc -l; holders | wc -l
         cowl umount web; cowl unshare --stop; settle 2; holders | wc -l; touch left; settle 0",
    )
    .ok();
    assert_eq!(
        output.out(),
        "different\none\n2\n4\n2",
        "{}",
        output.report()
    );
}

#[test]
fn a_lock_that_a_container_has_forged_is_refused() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        &format!(
            "export FORGE='{FORGE}'
             inside='mkdir -p -m 700 $HOME/.local/state/cowl; touch $FORGED; chmod 600 $FORGED
             unshare -Ur python3 -c \"$FORGE\" $FORGED > locked & until grep -q locked locked; do sleep 0.05; done'
             {CONTAINER}"
        ),
        "for command in 'unshare id' 'create web --from source' 'unshare --stop'; do
             cowl $command 2> error && exit 1; grep -o 'which is in a container' error; grep -c kill error || :
         done
         export XDG_STATE_HOME=$HOME/other; cowl unshare id -u; cowl unshare --stop; touch left; settle 0",
    )
    .ok();
    let refused = "which is in a container\n0\n";
    assert_eq!(
        output.out(),
        format!("{refused}{refused}{refused}0"),
        "{}",
        output.report()
    );
}

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
         cowl unshare sh -c 'until grep -q SIGTERM trace; do sleep 0.05; done; cowl -q mount web > at' &
         strace -qq -o trace -e trace=kill -e inject=kill:delay_enter=3000000:when=1 cowl unshare --stop 2> error && exit 1
         grep -c 'mounted in the namespace' error; wait; ready; cowl unshare cat $(cat at)/file
         [ \"$(cowl unshare readlink /proc/self/ns/mnt)\" = \"$before\" ]
         cowl umount web; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(output.out(), "1\none", "{}", output.report());
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

#[test]
fn a_linked_state_directory_is_used_and_a_file_in_its_place_is_skipped() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "mkdir -m 700 $D/user/run; export XDG_RUNTIME_DIR=$D/user/run",
        "mkdir -p .local/state linked; ln -s $HOME/linked .local/state/cowl
         cowl unshare id -u; ls linked | wc -l; cowl unshare --stop
         rm .local/state/cowl; touch .local/state/cowl
         cowl unshare id -u; ls $XDG_RUNTIME_DIR/cowl | wc -l; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(output.out(), "0\n1\n0\n1", "{}", output.report());
}

/// Before Linux 6.5, the kernel does not identify a daemon safely, so its namespace is not entered.
#[test]
fn a_kernel_without_handles_of_daemons_gets_another_namespace() {
    if !can(NEEDS) || !can(&[Need::Program("strace")]) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl create web --from source; M=$(cowl -q mount web); settle 2
         before=$(cowl unshare readlink /proc/self/ns/user)
         cowl unshare sh -c \"cd $M; exec sleep 100\" & sleep 0.5
         kill -9 $(holders); settle 0
         strace -qq -o trace -e trace=getsockopt -e inject=getsockopt:error=ENOPROTOOPT:when=1 cowl unshare true
         grep -c 'ENOPROTOOPT.*INJECTED' trace; settle 2
         [ \"$(cowl unshare readlink /proc/self/ns/user)\" != \"$before\" ]
         cowl status web 2> note | grep -o 'mounted elsewhere'; cowl umount web 2> error || grep -o 'web is in use' error
         kill %1; wait || true
         for attempt in $(seq 100); do [ -n \"$(holders all | tail -n +3)\" ] || break; sleep 0.05; done
         cowl status web | grep -o 'not mounted'; cowl -q mount web > note; cowl unshare cat $M/file",
    )
    .ok();
    assert_eq!(
        output.out(),
        "1\nmounted elsewhere\nweb is in use\nnot mounted\none",
        "{}",
        output.report()
    );
}

/// A second holder that cannot take the lock ends itself. The first one starts another one later.
#[test]
fn a_second_holder_without_the_lock_ends() {
    if !can(NEEDS) || !can(&[Need::Program("strace")]) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "cowl unshare true; ready; first=$(holders | head -1)
         strace -qq -f -o trace -e trace=fcntl -e inject=fcntl:error=ENOLCK -p $first & sleep 0.5
         kill -9 $(holders | tail -1)
         for attempt in $(seq 100); do ! grep -q ENOLCK trace || break; sleep 0.05; done; sleep 0.5
         holders | wc -l; kill %1; wait || true
         cowl unshare true; ready || ready; cowl unshare --stop; settle 0",
    )
    .ok();
    assert_eq!(output.out(), "1", "{}", output.report());
}

#[test]
fn a_kernel_that_permits_no_namespace_is_named() {
    if !can(NEEDS) {
        return;
    }
    let before = "
        printf '%s\\n' '#!/bin/bash' 'echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"' > $D/limit
        chmod 755 $D/limit; echo root:0:2000000000 > $D/ids
        WRAP=\"unshare --user --map-users=0,0,2000000000 --map-groups=0,0,2000000000 $D/limit\"";
    let output = as_user(
        Ids::Own,
        before,
        "cowl create web --from source 2> error && exit 1; cat error
         cowl doctor 2> /dev/null | grep -o 'user-namespaces *broken'
         cowl list 2>&1; cowl --help > /dev/null; cowl config > /dev/null; ls -A .local/share 2> /dev/null || true",
    )
    .ok();
    let out = output.out();
    for part in [
        "error: cannot create a user namespace",
        "hint: as root: sysctl user.max_user_namespaces=10000",
        "user-namespaces  broken",
        "there is no store at",
    ] {
        assert!(out.contains(part), "no {part:?}: {}", output.report());
    }
}

#[test]
fn root_of_a_namespace_of_a_user_uses_the_store_of_that_user() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Own,
        "",
        "cowl create web --from source
         unshare -Ur cowl list | grep -o web
         cowl unshare cowl list | grep -o web
         cowl unshare bash -c 'cowl unshare id -u'
         unshare -Ur cowl config | grep -o 'hooks.*.config/cowl' | wc -l
         cowl doctor | grep -E '^(user-namespaces|mount) ' | awk '{ print $1, $2 }'
         mkdir sub; cd sub; cowl unshare pwd | grep -o 'home/sub'
         cowl unshare sh -c 'exit 7' || echo $?; cowl unshare none 2> /dev/null || echo $?
         exec 9< /etc/passwd; cowl unshare readlink /proc/self/fd/9 || true",
    )
    .ok();
    assert_eq!(
        output.out(),
        "web\nweb\n0\n1\nmount works\nuser-namespaces works\nhome/sub\n7\n127\n/etc/passwd",
        "{}",
        output.report()
    );
}

#[test]
fn changed_ranges_are_reported() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "printf '' > $D/empty; chmod 666 $D/ids $D/empty; export IDS=$D/ids",
        "cowl unshare sh -c 'wc -l < /proc/self/uid_map'
         echo cowl-plain:500000:1000 >> $IDS
         cowl unshare sh -c 'wc -l < /proc/self/uid_map' 2> error; grep -o 'cowl unshare --stop' error
         M=$(cowl create web --from source 2> /dev/null; cowl -q mount web)
         cowl unshare --stop 2> error || grep -o \"mounted in the namespace: $M\" error | wc -l
         cowl -q umount web; cowl unshare --stop
         cowl unshare sh -c 'wc -l < /proc/self/uid_map'",
    )
    .ok();
    assert_eq!(
        output.out(),
        "2\n2\ncowl unshare --stop\n1\n3",
        "{}",
        output.report()
    );
}

/// LXC creates the container of a plain user in a namespace in which it could not reach the mount.
#[test]
fn lxc_containers_of_a_plain_user_are_refused() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "mkdir -p lxc/c1; mv source lxc/c1/rootfs
         printf 'lxc.rootfs.path = dir:%s/lxc/c1/rootfs\\nlxc.idmap = u 0 300000 65536\\n' $HOME > lxc/c1/config
         cp lxc/c1/config before; cowl adopt c1 -P $HOME/lxc 2> error && exit 1
         grep -o 'LXC could not start it' error; grep -o 'cowl create NAME --from' error; cmp before lxc/c1/config
         cowl create web --from lxc/c1/rootfs; cowl lxc web --config-file before -P $HOME/lxc 2> error && exit 1
         grep -o 'LXC could not start it' error; ls lxc; cowl exec web -- cat file",
    )
    .ok();
    assert_eq!(
        output.out(),
        "LXC could not start it\ncowl create NAME --from\nLXC could not start it\nc1\none",
        "{}",
        output.report()
    );
}
