//! apt-get in a Debian root filesystem.

use std::path::Path;
use std::process::Command;

use cowl_tests::command::run_command;
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::rootfs;
use cowl_tests::tree::{self, Compare, Tree};

use crate::field::Field;

/// Runs a shell line in a root filesystem. It must print nothing on standard error.
#[track_caller]
fn inside(root: &Path, line: &str) -> String {
    let mut command = Command::new("chroot");
    command
        .arg(root)
        .args(["sh", "-euc", line])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8");
    run_command(command, b"").ok().out()
}

/// Returns a tree without logs, caches, and the times of directories.
fn without_records(root: &Path) -> Tree {
    let mut tree = tree::read(root).unwrap();
    let records = [
        &b"var/log/"[..],
        b"var/cache/",
        b"var/lib/dpkg/",
        b"var/lib/apt/",
        b"etc/ld.so.cache",
    ];
    tree.retain(|path, _| !records.iter().any(|record| path.starts_with(record)));
    for entry in tree.values_mut() {
        if entry.kind == rustix::fs::FileType::Directory {
            entry.mtime = (0, 0);
        }
    }
    tree
}

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
    inside(&plain, install);
    let mut first = true;
    while first || attack.continues() {
        if !first {
            inside(attack.path(), &purge);
        }
        first = false;
        assert_eq!(inside(attack.path(), install), "55");
    }
    tree::assert_same(
        "installed",
        &without_records(attack.path()),
        &without_records(&plain),
        Compare::HISTORY,
    );
    inside(&plain, &purge);
    assert_eq!(inside(attack.path(), &purge), "");
    tree::assert_same(
        "purged",
        &without_records(attack.path()),
        &without_records(&plain),
        Compare::HISTORY,
    );
    attack.end();
}
