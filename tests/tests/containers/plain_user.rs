//! A plain user without any privilege: commands enter a namespace of that user, which two processes hold.

use cowl_tests::conditions::{Need, can};
use cowl_tests::plain_user::{Ids, NEEDS, as_user};

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

/// LXC could not start them.
#[test]
fn lxc_containers_with_ids_of_others_are_refused() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(
        Ids::Ranges,
        "",
        "mkdir -p lxc/c1; mv source lxc/c1/rootfs
         printf 'lxc.rootfs.path = dir:%s/lxc/c1/rootfs\\n' $HOME > plain
         (cat plain; echo lxc.idmap = u 0 300000 65536; echo lxc.idmap = g 0 299999 10) > outside
         (cat plain; echo lxc.idmap = u 0 300000 65536) > users
         for name in plain users outside; do
             cp $name lxc/c1/config; cowl adopt c1 -P $HOME/lxc 2> error && exit 1
             grep -o -e 'no valid id map' -e 'ids that your namespace does not have' error; cmp $name lxc/c1/config
         done
         cowl create web --from lxc/c1/rootfs; cowl lxc web --config-file outside -P $HOME/lxc 2> error && exit 1
         grep -o 'ids that your namespace does not have' error; ls lxc; cowl exec web -- cat file",
    )
    .ok();
    let outside = "ids that your namespace does not have";
    assert_eq!(
        output.out(),
        format!("no valid id map\nno valid id map\n{outside}\n{outside}\nc1\none"),
        "{}",
        output.report()
    );
}

/// Creates containers from images without a user, with root, and with another user.
const IMAGE_USERS: &str = r#"
mkdir saved && tar -cf saved/0.tar -C source .
sum=$(sha256sum < saved/0.tar); arch=$(uname -m); case $arch in x86_64) arch=amd64;; aarch64) arch=arm64;; esac
echo '[{"Config": "c.json", "Layers": ["0.tar"]}]' > saved/manifest.json
for user in 0 0:0 1000; do
    name=c${user/:/-}
    printf '{"os": "linux", "architecture": "%s", "config": {"User": "%s", "Cmd": ["id", "-u"]}, "rootfs":
        {"type": "layers", "diff_ids": ["sha256:%s"]}}' $arch $user ${sum%% *} > saved/c.json
    cowl create $name --from saved && cowl exec $name || echo "code $?"
done
"#;

#[test]
fn without_ranges_of_ids_a_command_cannot_be_another_user_of_an_image() {
    if !can(NEEDS) {
        return;
    }
    let output = as_user(Ids::Own, "", IMAGE_USERS).ok();
    assert_eq!(output.out(), "0\n0\ncode 125", "{}", output.report());
    for words in ["cannot become the user 1000 of the image", "/etc/subuid"] {
        assert!(output.err().contains(words), "{}", output.report());
    }
}
