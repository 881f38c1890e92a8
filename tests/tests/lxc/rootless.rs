//! LXC containers of plain users, with LXC's own tools (docs/decisions/0037).

use cowl_tests::conditions::{Need, can};
use cowl_tests::plain_user::{self, Ids, as_user};

const NEEDS: &[Need] = &[
    Need::Program("lxc-start"),
    Need::Program("lxc-usernsexec"),
    Need::Program("setcap"),
];

/// Creates the container t1 with LXC, and checks that LXC itself can start it. `l NAME COMMAND` runs a command in a
/// container.
const CREATE: &str = r#"
mkdir -p .config/lxc .local/share/lxc
printf 'lxc.idmap = u 0 300000 65536\nlxc.idmap = g 0 300000 65536\nlxc.net.0.type = empty\n' > .config/lxc/default.conf
LXC=$HOME/.local/share/lxc STORE=$HOME/.local/share/cowl
l() { name=$1; shift; lxc-attach -n $name -- "$@"; }
state() { lxc-info -n $1 -s | awk '{ print $2 }'; }
start() { lxc-start -n $1 -l DEBUG -o log || { grep -i -e cowl -e error log; exit 1; }; }
stop() { lxc-stop -k -n $1; while [ $(state $1) != STOPPED ]; do sleep 0.05; done; }
end() { for name in $(lxc-ls); do lxc-stop -k -n $name || true; done 2> /dev/null; finish; }
trap end EXIT
lxc-create -n t1 -t busybox > log 2>&1 || { cat log; exit 1; }
inside() { lxc-usernsexec -m u:0:300000:65536 -m g:0:300000:65536 -- "$@"; }
inside sh -c "cd $LXC/t1/rootfs; cp $(command -v setcap) bin; cp bin/busybox root/grep; setcap cap_net_raw=ep root/grep
    chmod 755 root"
start t1; l t1 /bin/id -u > id; [ $(cat id) = 0 ]; stop t1
cp $LXC/t1/config original
"#;

/// Runs a script as a plain user who has the container t1.
#[track_caller]
fn with_container(script: &str) -> String {
    let output = as_user(Ids::Ranges, "", &format!("{CREATE}\n{script}")).ok();
    output.out()
}

fn is_possible() -> bool {
    can(plain_user::NEEDS) && can(NEEDS)
}

#[test]
fn a_container_of_a_plain_user_is_adopted_snapshotted_restored_and_released() {
    if !is_possible() {
        return;
    }
    let out = with_container(
        r#"
        able() { lxc-attach -n t1 -u 1000 -g 1000 -- $1 CapEff /proc/self/status | awk '{ print $2 + 0 }'; }
        cowl adopt t1 2> /dev/null; start t1
        l t1 sh -c 'cd /root; id -u; echo x > f; chown 1000:1001 f; chmod 6755 f; mkdir s; chmod 1777 s; ln f g
            stat -c "%n %u %g %a" f s; mkdir w; cp grep w; setcap cap_net_raw=ep w/grep'
        able /root/grep; able /root/w/grep
        l t1 sh -c 'head -1 /proc/self/mountinfo' | grep -o 'fuse.cowlfs t1'
        cowl status | grep -o 'mounted in lxc'
        cowl snapshot t1 -m 'while it runs'; l t1 sh -c 'rm -r /root/s /bin/ls; echo more > /etc/more'
        cowl diff t1@snap0 t1
        for command in 'umount t1' 'restore t1 snap0' 'mount t1' 'exec t1 -- /bin/ls' 'undo t1' 'destroy t1 --yes' 'release t1 --yes'; do
            cowl $command 2> error && exit 1; grep -c 'hint: stop it: lxc-stop\|hint: run the command in it: lxc-attach' error
        done
        cowl list t1 --format '{name}'; cowl upgrade t1 > /dev/null; l t1 cat /etc/more
        ln -s "$(command -v cowl)" lxc-snapshot; ./lxc-snapshot -n t1; ./lxc-snapshot -n t1 -L | awk '{ print $1 }'
        stop t1; cowl restore t1 snap0 2> /dev/null; start t1; l t1 ls /root; able /root/w/grep
        l t1 touch /root/late; cowl restore t1 snap0 --stop --start 2> /dev/null; state t1; l t1 ls /root | grep -c late || true
        cowl clone t1 t2; stat -c '%u %a' $LXC/t2; start t2; l t2 sh -c 'hostname; stat -c "%u %g %a" /root/f; touch /root/two'
        l t1 ls /root | grep -c two || true
        cowl destroy t2 --yes --stop 2> /dev/null; ls $LXC; cowl undelete t2 2> /dev/null; start t2; l t2 ls /root/two; stop t2
        lxc-destroy -n t2; ls $LXC
        stop t1; cowl exec t1 -- /bin/sh -c 'id -u; stat -c "%u %g" /root/f'
        cowl export t1 --with-snapshots all.tar 2> /dev/null; cowl import all.tar t3 --lxc 2> /dev/null; start t3; l t3 hostname; stop t3
        cowl release t3 --yes 2> /dev/null; cowl release t1 --yes 2> /dev/null; cmp original $LXC/t1/config
        stat -c '%u %g %a' $LXC/t1 | sed s/$U/U/; inside stat -c '%u %g %a' $LXC/t1/rootfs/root/f
        start t1; able /root/w/grep; stop t1; cowl status | wc -l"#,
    );
    let refused = "1\n".repeat(7);
    let capable = "2000";
    let expected = format!(
        "0\nf 1000 1001 6755\ns 0 0 1777\n{capable}\n{capable}\nfuse.cowlfs t1\nmounted in lxc\nsnap0\n\
         D /bin/ls\nA /etc/more\nD /root/s\n{refused}snap0\nmore\nsnap0\nsnap1\nf\ng\ngrep\ns\nw\n{capable}\nRUNNING\n0\n\
         300000 770\nt2\n1000 1001 6755\n0\nt1\n/root/two\nt1\n0\n1000 1001\nt3\n300000 U 770\n1000 1001 6755\n\
         {capable}\n1"
    );
    assert_eq!(out, expected);
}

#[test]
fn a_container_of_a_plain_user_survives_killed_daemons_and_failed_starts() {
    if !is_possible() {
        return;
    }
    let out = with_container(
        r#"
        pid() { cowl status t1 --json 2> /dev/null | grep '"pid"' | tr -dc 0-9; }
        fails() { lxc-start -n t1 -l DEBUG -o failed 2> /dev/null && exit 1; grep -c "$1" failed; rm failed; state t1
            cowl status 2> /dev/null | grep -o 'not mounted'; }
        cowl adopt t1 2> /dev/null; start t1
        for round in 1 2 3; do
            D=$(pid); l t1 sh -c "echo $round > /etc/round"; kill -9 $D; l t1 cat /etc/round
            [ $(pid) != $D ]; cowl snapshot t1
        done
        cowl flatten t1 2> /dev/null; l t1 cat /etc/round; cowl prune t1 --keep-last 1 > /dev/null 2>&1
        cowl flatten t1 2> /dev/null; l t1 sh -c 'cat /etc/round; echo x > /etc/x'; stop t1
        COWL_KEEPER=off lxc-start -n t1; D=$(pid); kill -9 $D; l t1 cat /etc/round 2> /dev/null && exit 1
        # On a busy machine, the daemon exists for a while after the signal.
        while ps -o stat= -p $D | grep -q '^[^Z]'; do sleep 0.05; done
        cowl snapshot t1 2> note; grep -o 'restart its LXC container' note; stop t1; start t1; l t1 cat /etc/x; stop t1
        cp $LXC/t1/config ours; sed -i 's,pre-mount = .*,pre-mount = /bin/false,' $LXC/t1/config
        fails 'Failed to run.*pre-mount'; cp ours $LXC/t1/config; start t1; stop t1
        sed -i 's/u 0 300000 65536/u 0 299999 65537/' $LXC/t1/config
        fails 'ids that your namespace does not have'; cp ours $LXC/t1/config
        chmod o-x $STORE; fails 'cannot search'; chmod o+x $STORE
        cowl -q mount t1 > /dev/null 2>&1; lxc-start -n t1 -l DEBUG -o failed 2> /dev/null && exit 1
        grep -c 'in the namespace of your user' failed; cowl umount t1
        start t1; l t1 cat /etc/x; stop t1; cowl check > /dev/null 2>&1; ls $STORE/mapped"#,
    );
    let fails = |count: u32| format!("{count}\nSTOPPED\nnot mounted\n");
    let expected = format!(
        "1\nsnap0\n2\nsnap1\n3\nsnap2\n3\n3\nsnap3\nrestart its LXC container\nx\n{}{}{}1\nx",
        fails(1),
        fails(1),
        fails(1)
    );
    assert_eq!(out, expected);
}

/// The peers of a daemon that waits for the mount of a container.
const PEER: &str = r#"
import array, os, socket, sys
kind, path = sys.argv[1:]
s = socket.socket(socket.AF_UNIX)
try:
    # An address has at most 107 bytes.
    os.chdir(os.path.dirname(path))
    s.connect(os.path.basename(path))
except OSError as e:
    print(e.strerror)
    sys.exit()
def send(data, *files):
    fds = array.array("i", [os.open(f, os.O_RDWR) for f in files])
    s.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
reply = b""
try:
    if kind == "null": send(b"d" + bytes(8), "/dev/null")
    if kind == "two": send(b"d" + bytes(8), "/dev/fuse", "/dev/fuse")
    if kind == "many": send(b"d" + bytes(8), *["/dev/null"] * 200)
    if kind == "unmounted": send(b"d" + bytes(8), "/dev/fuse")
    if kind == "short": send(b"d" + bytes(7), "/dev/fuse")
    if kind == "text": s.sendall(b"d" * 100000)
    if kind == "cancel": s.sendall(b"c")
    s.shutdown(socket.SHUT_WR)
    s.settimeout(20)
    reply = s.recv(100)
except ConnectionError:
    pass
print(kind, reply)
"#;

/// The test calls the hooks itself, so that peers can connect between them.
#[test]
fn the_daemon_of_a_container_of_a_plain_user_accepts_only_a_mount_of_its_root() {
    if !is_possible() {
        return;
    }
    let script = r#"
        cowl adopt t1 2> /dev/null; ID=$(ls $STORE/containers); export LXC_NAME=t1 LXC_CONFIG_FILE=$LXC/t1/config
        hook() { cowl --store $STORE hook $1 $ID; }
        peer() { lxc-usernsexec -m u:0:$1:1 -m g:0:$2:1 -- python3 peer $3 $STORE/mapped/$ID/socket; }
        hook pre-start
        stat -c '%a' $STORE/mapped/$ID $STORE/mapped/$ID/socket | tr '\n' ' '
        peer 300001 300001 text; peer 300001 300000 text; peer 300000 300001 text
        for kind in silent null two many short text cancel; do peer 300000 300000 $kind; done
        cowl --wait 0 snapshot t1 2> error && exit 1; grep -c 'hook pre-start.* is still at work' error
        # The mount of its root, which ends with its namespaces.
        mkfifo go; exec 3<> go
        lxc-usernsexec -m u:0:300000:65536 -m g:0:300000:65536 -- unshare -m sh -c "
            cowl --store $STORE hook pre-mount $ID; cd $STORE/mapped/$ID/rootfs; stat -c '%u %g %a' root
            touch new; stat -c '%u %g' new; echo served; read line" < go > mounted 2>&1 3>&- & M=$!
        until grep -q served mounted; do sleep 0.05; done; cat mounted
        cowl status 2> /dev/null | grep -o 'mounted in lxc'; ls $STORE/mapped/$ID; peer 300000 300000 text
        ls $STORE/mapped/$ID/rootfs | wc -l; cowl umount t1 2>&1 | grep -o 'is mounted in its LXC container'; cowl snapshot t1
        echo >&3; wait $M
        hook post-stop; cowl status 2> /dev/null | grep -o 'not mounted'; ls $STORE/mapped
        # A device that is not mounted ends the daemon, and so does the user.
        hook pre-start; peer 300000 300000 unmounted; cowl snapshot t1
        hook post-stop; hook pre-start; hook post-stop; cowl snapshot t1; cowl status 2> /dev/null | grep -o 'not mounted'"#;
    let out = with_container(&format!("cat > peer <<'PEER'\n{PEER}\nPEER\n{script}"));
    let denied = "Permission denied\n".repeat(3);
    let kinds = ["silent", "null", "two", "many", "short", "text", "cancel"];
    let refused: String = kinds.map(|kind| format!("{kind} b''\n")).concat();
    let expected = format!(
        "710 600 {denied}{refused}1\n0 0 755\n0 0\nserved\nmounted in lxc\nrootfs\nNo such file or directory\n0\n\
         is mounted in its LXC container\nsnap0\nnot mounted\nunmounted b''\nsnap1\nsnap2\nnot mounted"
    );
    assert_eq!(out, expected);
}
