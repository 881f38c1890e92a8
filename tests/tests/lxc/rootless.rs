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
        for command in 'umount t1' 'restore t1 snap0' 'mount t1' 'exec t1 -- /bin/ls' 'destroy t1 --yes' 'release t1 --yes'; do
            cowl $command 2> error && exit 1; grep -c 'hint: stop it: lxc-stop' error
        done
        cowl upgrade t1 > /dev/null; l t1 cat /etc/more
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
    let refused = "1\n".repeat(6);
    let capable = "2000";
    let expected = format!(
        "0\nf 1000 1001 6755\ns 0 0 1777\n{capable}\n{capable}\nfuse.cowlfs t1\nmounted in lxc\nsnap0\n\
         D /bin/ls\nA /etc/more\nD /root/s\n{refused}more\nf\ng\ngrep\ns\nw\n{capable}\nRUNNING\n0\n\
         300000 770\nt2\n1000 1001 6755\n0\nt1\n/root/two\nt1\n0\n1000 1001\nt3\n300000 U 770\n1000 1001 6755\n\
         {capable}\n1"
    );
    assert_eq!(out, expected);
}
