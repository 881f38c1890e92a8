//! systemd as the host: mount units, and containers of systemd-nspawn that machinectl controls (docs/hosts.md).
//!
//! The host is a container itself, with a store of its own.

use cowl_tests::conditions::{Need, can};
use cowl_tests::lxc::{Lxc, NEEDS};
use cowl_tests::{programs, rootfs};

/// Creates and starts a container with systemd, in which cowl is installed.
fn start_host(lxc: &Lxc, name: &str) {
    lxc.create_with_systemd(name);
    let root = lxc.dir(name).join("rootfs");
    for (from, to) in [
        (rootfs::systemd_tar().unwrap(), "root/debian.tar"),
        (rootfs::busybox_tar().unwrap(), "root/busybox.tar"),
        (programs::cowl(), "usr/bin/cowl"),
        (programs::cowlfs(), "usr/bin/cowlfs"),
    ] {
        std::fs::copy(from, root.join(to)).unwrap();
    }
    std::os::unix::fs::symlink("/usr/bin/cowl", root.join("usr/sbin/mount.cowl")).unwrap();
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../snap-cli/dist/systemd/cowl-mount@.service"
    );
    let unit = std::fs::read_to_string(unit)
        .unwrap()
        .replace("@statedir@", "/var/lib/cowl")
        .replace("@bindir@", "/usr/bin");
    std::fs::write(root.join("etc/systemd/system/cowl-mount@.service"), unit).unwrap();
    lxc.start_systemd(name);
}

/// A mount unit, an entry of fstab, and the unit of cowl.
const UNITS: &str = r"
    mkdir -p /srv/web /srv/two
    printf '[Mount]\nWhat=web\nWhere=/srv/web\nType=cowl\n' > /etc/systemd/system/srv-web.mount
    echo 'web@snap0 /srv/two cowl nofail,x-systemd.requires-mounts-for=/var/lib/cowl 0 0' >> /etc/fstab
    cowl -q create web --from /root/busybox.tar; cowl -q snapshot web
    systemctl daemon-reload
    systemctl start srv-web.mount; echo one > /srv/web/etc/state; cowl -q snapshot web; echo two > /srv/web/etc/state
    cowl -q restore web snap1; cat /srv/web/etc/state; systemctl is-active srv-web.mount
    systemctl start srv-two.mount; ls /srv/two/etc/state 2>&1 | grep -c 'No such'; systemctl stop srv-two.mount
    systemctl stop srv-web.mount; ls /srv/web | wc -l
    systemctl start cowl-mount@web; cat /var/lib/cowl/mnt/*/etc/state
    systemctl stop cowl-mount@web; grep -c cowl/mnt /proc/mounts || :; systemctl --failed --no-legend";

/// A container of systemd-nspawn, as docs/hosts.md describes it.
const MACHINE: &str = r#"
    cowl -q create deb --from /root/debian.tar; mkdir -p /var/lib/machines/deb /etc/systemd/nspawn
    printf '[Mount]\nWhat=deb\nWhere=/var/lib/machines/deb\nType=cowl\n' > /etc/systemd/system/var-lib-machines-deb.mount
    mkdir -p /etc/systemd/system/systemd-nspawn@deb.service.d
    printf '[Unit]\nRequiresMountsFor=/var/lib/machines/deb\n' > /etc/systemd/system/systemd-nspawn@deb.service.d/cowl.conf
    printf '[Exec]\nPrivateUsers=no\n[Network]\nVirtualEthernet=no\n' > /etc/systemd/nspawn/deb.nspawn
    systemctl daemon-reload
    ends() { for n in $(seq 100); do machinectl -q show deb > /dev/null 2>&1 || return 0; sleep 0.1; done; }
    inside() {
        for n in $(seq 100); do machinectl -q shell deb /bin/true > /dev/null 2>&1 && break; sleep 0.1; done
        machinectl -q shell deb /bin/sh -c "$1" | tr -d '\r' | sed '/^$/d'
    }
    machinectl start deb; inside 'echo one > /etc/state; stat -c %a /usr/bin/su'; cowl -q snapshot deb
    inside 'echo two > /etc/state'
    cowl restore deb snap0 2> /dev/null || echo refused
    machinectl terminate deb; ends; cowl -q restore deb snap0
    machinectl start deb; inside 'cat /etc/state'
    machinectl terminate deb; ends; systemctl stop var-lib-machines-deb.mount; cowl -q check > /dev/null"#;

#[test]
fn units_and_machines_of_systemd_work() {
    let needs = [NEEDS, &[Need::DebianWithSystemd]].concat();
    if !can(&needs) {
        return;
    }
    let lxc = Lxc::for_test();
    start_host(&lxc, "host");
    let run = |script: &str| lxc.run("host", &format!("set -eu; exec < /dev/null; {script}"));
    assert_eq!(run(UNITS), "snap0\nsnap1\none\nactive\n1\n0\none\n0");
    assert_eq!(run(MACHINE), "4755\nsnap0\nrefused\none");
    lxc.kill("host");
}
