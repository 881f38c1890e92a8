#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeSet;
use std::ffi::OsStr;

use cowl_tests::command::{run, sh, sh_in};
use cowl_tests::conditions::{Need, can};

use super::*;

fn options(destdir: &Path) -> InstallOptions {
    let programs = cowl_tests::programs::cowl();
    InstallOptions {
        prefix: PathBuf::from("/usr/local"),
        destdir: destdir.to_owned(),
        lxc_snapshot: true,
        debug_symbols: true,
        programs: programs.parent().map(Path::to_owned),
    }
}

/// Returns the paths of all files, symlinks and empty directories below `directory`.
fn content(directory: &Path) -> BTreeSet<String> {
    let find = "find . ! -type d -o -type d -empty";
    sh_in(directory, find)
        .ok()
        .out()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Asserts that the installed program is smaller than the built one, and references its symbols.
fn assert_symbols_apart(cowl: &Path) {
    let size = |path: &Path| path.metadata().unwrap().len();
    assert!(size(cowl) * 2 < size(&cowl_tests::programs::cowl()));
    let link = run(
        "objcopy",
        [
            OsStr::new("--dump-section=.gnu_debuglink=/dev/stdout"),
            cowl.as_os_str(),
            OsStr::new("/dev/null"),
        ],
    );
    assert!(link.ok().out().starts_with("cowl.debug"));
}

#[test]
fn an_installation_works_and_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let system = dir.path().join("system");
    let options = options(&system);
    install(&options).unwrap();
    let installed = content(&system);
    for file in [
        "usr/local/bin/cowl",
        "usr/local/bin/cowlfs",
        "usr/local/bin/cowl-snapshotter",
        "usr/local/bin/lxc-snapshot",
        "usr/local/bin/.debug/cowl.debug",
        "usr/local/bin/.debug/cowlfs.debug",
        "usr/local/share/man/man1/cowl.1",
        "usr/local/share/man/man1/cowl-snapshot.1",
        "usr/local/share/man/man1/cowlfs.1",
        "usr/local/share/man/man1/cowl-snapshotter.1",
        "usr/local/share/bash-completion/completions/cowl",
        "usr/local/share/zsh/site-functions/_cowl",
        "usr/local/share/fish/vendor_completions.d/cowl.fish",
        "usr/local/lib/systemd/system/cowl-snapshot@.service",
        "usr/local/lib/systemd/system/cowl-snapshotter.service",
        "usr/local/lib/systemd/system/cowl-snapshotter.socket",
        "usr/local/lib/systemd/system/cowl-snapshot-daily@.timer",
        "usr/local/lib/cowl/apt-snapshot",
        "etc/apt/apt.conf.d/80cowl",
        "etc/cowl/config.toml",
        "etc/cowl/hooks.d/pre-snapshot.d",
        "etc/cowl/hooks.d/post-destroy.d",
    ] {
        assert!(
            installed.contains(&format!("./{file}")),
            "no {file} in {installed:?}"
        );
    }
    let cowl = system.join("usr/local/bin/cowl");
    assert_symbols_apart(&cowl);
    let config = system.join("etc/cowl/config.toml");
    run(
        &cowl,
        ["--config".as_ref(), config.as_os_str(), "config".as_ref()],
    )
    .ok();
    sh_in(
        &system,
        "bash -n usr/local/share/bash-completion/completions/cowl; \
                    sh -n usr/local/lib/cowl/apt-snapshot; \
                    ! grep -r '@[a-z]*dir@' etc usr/local/lib usr/local/share",
    )
    .ok();

    // Changed and added files survive a reinstallation and the removal.
    std::fs::write(&config, "wait = 3\n").unwrap();
    let hook = system.join("etc/cowl/hooks.d/pre-snapshot.d/mine");
    std::fs::write(&hook, "#!/bin/sh\n").unwrap();
    install(&options).unwrap();
    assert_eq!(std::fs::read_to_string(&config).unwrap(), "wait = 3\n");
    let target = UninstallOptions {
        prefix: options.prefix.clone(),
        destdir: system.clone(),
    };
    uninstall(&target).unwrap();
    let left: Vec<_> = content(&system)
        .into_iter()
        .filter(|path| {
            system
                .join(path)
                .symlink_metadata()
                .is_ok_and(|meta| !meta.is_dir())
        })
        .collect();
    assert_eq!(
        left,
        [
            "./etc/cowl/config.toml",
            "./etc/cowl/hooks.d/pre-snapshot.d/mine"
        ]
    );
    assert!(uninstall(&target).unwrap_err().0.contains("not installed"));
}

#[test]
fn a_program_of_lxc_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let other = dir.path().join("usr/local/bin/lxc-snapshot");
    std::fs::create_dir_all(other.parent().unwrap()).unwrap();
    std::fs::write(&other, "LXC's own").unwrap();
    let error = install(&options).unwrap_err().0;
    assert!(
        error.contains("lxc-snapshot exists and is not a symbolic link"),
        "{error}"
    );
    assert_eq!(std::fs::read_to_string(other).unwrap(), "LXC's own");
}

#[test]
fn systemd_accepts_the_units() {
    if !can(&[Need::Program("systemd-analyze")]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = InstallOptions {
        prefix: dir.path().join("prefix"),
        ..options(Path::new("/"))
    };
    let system = System::new(&options.prefix, Path::new("/")).unwrap();
    // systemd-analyze requires the programs at the paths in the units. Only the temporary directory is written.
    let bin = options.prefix.join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    symlink(cowl_tests::programs::cowl(), bin.join("cowl")).unwrap();
    let snapshotter = cowl_tests::programs::cowl_snapshotter();
    symlink(snapshotter, bin.join("cowl-snapshotter")).unwrap();
    let units = dir.path().join("units");
    for unit in files(&root().unwrap().join("snap-cli/dist/systemd")).unwrap() {
        let text = system.fill_template(&unit).unwrap();
        write_file(&units.join(name(&unit).unwrap()), text, 0o644).unwrap();
    }
    let line = format!(
        "cd '{}'; SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no \
         cowl-snapshot@web.service cowl-snapshot-hourly@web.timer cowl-snapshot-daily@web.timer \
         cowl-snapshot-weekly@web.timer cowl-mount@web.service cowl-prune.service cowl-prune.timer \
         cowl-snapshotter.service cowl-snapshotter.socket",
        units.display()
    );
    let output = sh(&line).ok();
    let ours: Vec<_> = output
        .err()
        .lines()
        .filter(|l| l.contains("cowl"))
        .map(str::to_owned)
        .collect();
    assert!(ours.is_empty(), "{ours:?}");
}
