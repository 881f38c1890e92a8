//! The package on a machine with systemd: what the scripts of dpkg do with the units.

use cowl_tests::conditions::{Need, can};
use cowl_tests::lxc::{Lxc, NEEDS};

use super::packages;

/// Installs the package. Nothing is enabled, and systemd accepts all units.
const INSTALLED: &str = r"
    dpkg -i /packages/cowl_0.1.0-1_*.deb
    systemctl list-unit-files --no-legend --state=enabled,enabled-runtime 'cowl-*' >&3 || :
    systemd-analyze verify --man=no /usr/lib/systemd/system/cowl-*.timer /usr/lib/systemd/system/cowl-*.socket \
        /usr/lib/systemd/system/cowl-prune.service /usr/lib/systemd/system/cowl-snapshotter.service >&3 2>&1
    cp /usr/lib/systemd/system/cowl-mount@.service /run/cowl-mount@web.service
    cp /usr/lib/systemd/system/cowl-snapshot@.service /run/cowl-snapshot@web.service
    systemd-analyze verify --man=no /run/cowl-mount@web.service /run/cowl-snapshot@web.service >&3 2>&1";

/// Enables units, and upgrades the package. Only the snapshotter is restarted. A unit that was stopped remains so.
const UPGRADED: &str = r"
    mkdir /srv/web; echo one > /srv/web/file; cowl create web --from /srv/web
    systemctl enable --now cowl-snapshotter.socket cowl-snapshot-daily@web.timer cowl-mount@web.service
    systemctl start cowl-snapshotter.service
    systemctl enable cowl-prune.timer
    pid() { systemctl show -P MainPID cowl-snapshotter.service; }
    daemon() { cowl status web --json | sed -n 's/.*\x22pid\x22: *\([0-9]*\).*/\1/p'; }
    snapshotter=$(pid); daemon=$(daemon); test $snapshotter -gt 0; test $daemon -gt 0
    dpkg -i /packages/cowl_0.2.0-1_*.deb
    test $(pid) -gt 0; test $(pid) != $snapshotter; test $(daemon) = $daemon
    systemctl is-active cowl-prune.timer >&3 || :
    cat /var/lib/cowl/mnt/*/file >&3";

/// Removes the package. The mount remains, and no unit fails.
const REMOVED: &str = r"
    dpkg -r cowl
    systemctl is-active cowl-snapshotter.socket cowl-snapshotter.service cowl-snapshot-daily@web.timer \
        cowl-mount@web.service >&3 || :
    cat /var/lib/cowl/mnt/*/file >&3
    systemctl --failed --no-legend >&3";

/// Installs the package again, which starts what the removal stopped.
const REINSTALLED: &str = r"
    dpkg -i /packages/cowl_0.2.0-1_*.deb
    systemctl is-active cowl-snapshotter.socket cowl-snapshotter.service cowl-snapshot-daily@web.timer \
        cowl-prune.timer >&3 || :
    systemctl stop cowl-mount@web.service; grep -c cowl/mnt /proc/mounts >&3 || :
    systemctl start cowl-mount@web.service; cat /var/lib/cowl/mnt/*/file >&3
    systemctl start cowl-snapshot@web.service; cowl list web --format '{name}' >&3";

/// Purges the package. Only the container, its mount and the administrator's files remain.
const PURGED: &str = r"
    touch /var/lib/systemd/timers/stamp-cowl-backup.timer
    dpkg --purge cowl
    cat /var/lib/cowl/mnt/*/file >&3; umount /var/lib/cowl/mnt/*; ls /var/lib/cowl/containers | wc -l >&3
    systemctl --failed --no-legend >&3
    find / -xdev ! -path '/packages/*' ! -path '/var/lib/cowl*' -name '*cowl*' -print >&3
    ls /run | grep snapshotter >&3 || :";

#[test]
fn units_are_stopped_and_started_with_the_package() {
    let needs = [NEEDS, &[Need::DebianWithSystemd, Need::Program("dpkg-deb")]];
    if !can(&needs.concat()) {
        return;
    }
    let Some(packed) = packages() else { return };
    let lxc = Lxc::for_test();
    lxc.create_with_systemd("host");
    let copies = lxc.dir("host").join("rootfs/packages");
    std::fs::create_dir(&copies).unwrap();
    for file in std::fs::read_dir(packed).unwrap() {
        let file = file.unwrap();
        if file.path().extension().is_some_and(|end| end == "deb") {
            std::fs::copy(file.path(), copies.join(file.file_name())).unwrap();
        }
    }
    lxc.start_systemd("host");
    // The results are written to descriptor 3. Standard output has the messages of dpkg.
    let run = |script: &str| {
        let setting = "set -eu; exec < /dev/null 3>&1 >&2; export DEBIAN_FRONTEND=noninteractive";
        lxc.run("host", &format!("{setting}; {script}"))
    };
    assert_eq!(run(INSTALLED), "");
    assert_eq!(run(UPGRADED), "inactive\none");
    assert_eq!(run(REMOVED), "inactive\ninactive\ninactive\nactive\none");
    let snapshots = run(REINSTALLED);
    assert!(
        snapshots.starts_with("active\ninactive\nactive\ninactive\n0\none\n"),
        "{snapshots}"
    );
    let own = "/var/lib/systemd/timers/stamp-cowl-backup.timer";
    assert_eq!(run(PURGED), format!("one\n1\n{own}"));
    lxc.kill("host");
}
