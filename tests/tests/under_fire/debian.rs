//! apt-get in a Debian root filesystem.

use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::rootfs;
use cowl_tests::samples::{in_chroot, without_records};
use cowl_tests::tree::{self, Compare};

use crate::field::Field;

#[test]
fn apt_installs_and_purges_a_large_package() {
    if !can_mount(&[Need::Debian, Need::Program("chroot")]) {
        return;
    }
    let field = Field::new(|lower| {
        rootfs::unpack(&rootfs::debian_tar().unwrap(), lower).unwrap();
    });
    let attack = field.attack();
    let install = "apt-get -qq -y --no-install-recommends install /root/large/*.deb >/dev/null
        dpkg --verify; dpkg --audit; echo WORD | cpp-12 -P -DWORD=55";
    let purge = format!(
        "apt-get -qq -y purge {} >/dev/null; dpkg --verify; dpkg --audit",
        rootfs::LARGE.join(" ")
    );
    let plain = field.plain();
    in_chroot(&plain, install);
    let mut first = true;
    while first || attack.continues() {
        if !first {
            in_chroot(attack.path(), &purge);
        }
        first = false;
        assert_eq!(in_chroot(attack.path(), install).out(), "55");
    }
    tree::assert_same(
        "installed",
        &without_records(attack.path()),
        &without_records(&plain),
        Compare::HISTORY,
    );
    in_chroot(&plain, &purge);
    assert_eq!(in_chroot(attack.path(), &purge).out(), "");
    tree::assert_same(
        "purged",
        &without_records(attack.path()),
        &without_records(&plain),
        Compare::HISTORY,
    );
    attack.end();
}
