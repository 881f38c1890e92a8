#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clap::Parser;
use cowl_tests::command::{Output, run_command, sh, sh_in};
use cowl_tests::conditions::{Need, can, skipped};
use cowl_tests::rootfs;
use cowl_tests::scratch::Scratch;

use super::*;

#[path = "dist_systemd_tests.rs"]
mod systemd;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    options: DistOptions,
}

fn parse(words: &[&str]) -> DistOptions {
    let words = [&["dist"], words].concat();
    Arguments::parse_from(words).options
}

/// Returns the directory of both versions of the package, and of the symbols of the first. Builds them once.
fn packages() -> Option<&'static Path> {
    static PACKAGES: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    let built = PACKAGES.get_or_init(|| {
        deb::tool().map_err(|failure| failure.0)?;
        let dir = target().unwrap().join("dist/tests");
        if dir.is_dir() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        let options = DistOptions {
            programs: cowl_tests::programs::cowl().parent().map(Path::to_owned),
            output: Some(dir.clone()),
            ..parse(&["--format", "deb", "--fast", "--deb-version", "0.1.0-1"])
        };
        super::run(&options).unwrap();
        let next = "dpkg-deb -R cowl_0.1.0-1_*.deb next; \
            sed -i 's/^Version: .*/Version: 0.2.0-1/' next/DEBIAN/control; \
            dpkg-deb -Znone --root-owner-group -b next .; rm -r next";
        sh_in(&dir, next).ok();
        Ok(dir)
    });
    match built {
        Ok(dir) => Some(dir),
        Err(reason) => {
            skipped(reason);
            None
        }
    }
}

#[test]
fn lintian_accepts_the_packages() {
    if !can(&[Need::Program("lintian"), Need::Program("dpkg-shlibdeps")]) {
        return;
    }
    let Some(dir) = packages() else { return };
    let lines = sh_in(
        dir,
        "lintian --allow-root --fail-on error,warning --tag-display-limit 0 cowl_0.1.0-1_*.deb cowl-dbgsym_*.deb",
    )
    .ok();
    assert_eq!(lines.out(), "");
    let fields = sh_in(dir, "dpkg-deb -f cowl_0.1.0-1_*.deb Depends").ok();
    assert!(fields.out().starts_with("libc6 (>= "), "{}", fields.out());
}

/// A root filesystem in a directory, with the system's processes and devices.
struct Machine(Scratch);

impl Machine {
    /// Unpacks `tar`, and copies the files of `packed` to /packages.
    fn new(tar: &Path, packed: &Path) -> Machine {
        let root = Scratch::for_test();
        rootfs::unpack(tar, &root).unwrap();
        let line = format!(
            "mkdir -p packages proc dev; cp '{}'/cowl* packages/; mount --bind /proc proc; mount --bind /dev dev",
            packed.display()
        );
        sh_in(&root, &line).ok();
        Machine(root)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new("chroot");
        command
            .arg(&*self.0)
            .args(["sh", "-euc", line])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    #[track_caller]
    fn run(&self, line: &str) -> Output {
        run_command(self.command(line), b"").ok()
    }

    /// Returns the option of dpkg that a package needs here. Programs that were linked with a newer C library ask for it,
    /// but start with an older one.
    fn force(&self) -> &'static str {
        let version = "getconf GNU_LIBC_VERSION | cut -d' ' -f2";
        let (built, here) = (sh(version).ok().out(), self.run(version).out());
        let newer = format!(
            "dpkg --compare-versions {} gt {}",
            built.trim(),
            here.trim()
        );
        if sh(&newer).code == 0 {
            "--force-depends"
        } else {
            ""
        }
    }

    /// Waits until a program in a container has written more lines.
    #[track_caller]
    fn wait_for_lines(&self, log: &Path) {
        let count = || std::fs::read(log).unwrap().len();
        let (before, start) = (count(), Instant::now());
        while count() < before + 4 {
            assert!(start.elapsed() < Duration::from_secs(30), "no lines");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Installs, upgrades, removes and purges the package while a program uses a container.
fn live(machine: &Machine) {
    let root = &machine.0;
    machine.run("echo 'APT::Sandbox::User \"root\";' > /etc/apt/apt.conf.d/99test");
    let force = machine.force();
    machine.run(&format!(
        "dpkg {force} -i /packages/cowl_0.1.0-1_*.deb /packages/cowl-dbgsym_*.deb"
    ));
    let version = machine.run("cowl --version").out();
    assert!(version.starts_with("cowl "), "{version}");
    for path in [
        "usr/share/man/man1/cowl.1.gz",
        "usr/share/man/man8/mount.cowl.8.gz",
        "usr/lib/debug/usr/bin/cowlfs.debug",
        "etc/cowl/hooks.d/pre-snapshot.d",
    ] {
        assert!(root.join(path).metadata().is_ok(), "no {path}");
    }
    machine.run("mkdir -p /srv/web; echo one > /srv/web/file; cowl create web --from /srv/web");
    // The root directory of this chroot is not a mount point.
    machine.run(
        "if cowl exec web -- true 2>/srv/error; then exit 1; fi; grep 'mount --bind DIR DIR' /srv/error",
    );
    let mount_point = machine.run("cowl mount web").out().trim().to_owned();
    let mut program = machine
        .command(&format!(
            "cd {mount_point}; exec 3>>log; while [ ! -e stop ]; do cat file >&3; sleep 0.05; done"
        ))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mounted = root.join(mount_point.trim_start_matches('/'));
    let log = mounted.join("log");
    while log.metadata().is_err() {
        std::thread::sleep(Duration::from_millis(20));
    }

    // The upgrade retains changed settings, and offers the upgrade of the daemons.
    machine.run("echo 'wait = 3' > /etc/cowl/config.toml");
    let upgrade = machine
        .run(&format!("dpkg {force} -i /packages/cowl_0.2.0-1_*.deb"))
        .out();
    assert!(upgrade.contains("cowl upgrade --all"), "{upgrade}");
    machine.run("grep -qx 'wait = 3' /etc/cowl/config.toml; cowl upgrade --all");
    machine.wait_for_lines(&log);

    let status = machine.run("cowl status web --json").json();
    let daemon = status["pid"].as_u64().expect("the daemon's pid");
    let removal = machine
        .run("dpkg -r cowl-dbgsym cowl; ! command -v cowl cowlfs")
        .out();
    assert!(removal.contains("remain mounted"), "{removal}");
    machine.wait_for_lines(&log);
    // The keeper starts another daemon, although the file of the program is no longer there.
    cowl_tests::process::signal(u32::try_from(daemon).unwrap(), "-KILL");
    machine.wait_for_lines(&log);

    // As `systemctl enable` in both releases.
    let wants = "/etc/systemd/system/timers.target.wants";
    machine.run(&format!(
        "mkdir -p {wants}; ln -s /lib/systemd/system/cowl-prune.timer {wants}; \
         ln -s /usr/lib/systemd/system/cowl-snapshot-daily@.timer {wants}/cowl-snapshot-daily@web.timer"
    ));
    // apt works although the script of its hook is removed, and purges the settings but not the containers.
    let purge = machine
        .run("apt-get purge -y cowl; test ! -e /etc/apt/apt.conf.d/80cowl; test ! -e /etc/cowl")
        .out();
    assert!(
        purge.contains("/var/lib/cowl is not empty and is retained"),
        "{purge}"
    );
    machine.run(&format!("! ls {wants} | grep cowl"));
    machine.wait_for_lines(&log);
    std::fs::write(mounted.join("stop"), "").unwrap();
    assert!(program.wait().unwrap().success());
    machine.run(&format!("umount {mount_point}"));

    // Another installation finds the containers.
    machine.run(&format!(
        "dpkg {force} -i /packages/cowl_0.2.0-1_*.deb; cowl snapshot web; cowl cat web:stop"
    ));
    // A store without containers is removed, but neither its directory on another disk nor a store with an empty one.
    machine.run(
        "cowl destroy web --yes; dpkg --purge cowl; ls /var/lib/cowl/deleted/*/container.json",
    );
    machine.run(&format!(
        "dpkg {force} -i /packages/cowl_0.2.0-1_*.deb; cowl gc --empty-trash; \
         dpkg --purge cowl; test ! -e /var/lib/cowl; mkdir /srv/disk; ln -s /srv/disk /var/lib/cowl; \
         dpkg {force} -i /packages/cowl_0.2.0-1_*.deb; cowl create two --from /srv/web; dpkg --purge cowl; \
         dpkg {force} -i /packages/cowl_0.2.0-1_*.deb; cowl cat two:file; cowl destroy two --now --yes"
    ));
    let purge = machine
        .run("dpkg --purge cowl; test -z \"$(ls -A /var/lib/cowl)\"")
        .out();
    assert!(purge.contains("a link and is retained"), "{purge}");
    purge_retains(machine, force);
}

/// /var/lib/cowl is a link to a directory. A purge deletes nothing in it except the files of an empty store.
fn purge_retains(machine: &Machine, force: &str) {
    let again = |line: &str| {
        machine.run(&format!(
            "dpkg {force} -i /packages/cowl_0.2.0-1_*.deb; {line}"
        ))
    };
    let make = "cowl create two --from /srv/web; cowl destroy two --now --yes";
    let files = "find /srv/disk/ | sort > /srv/before; dpkg --purge cowl; \
        find /srv/disk/ | sort | diff /srv/before -";
    let made = format!("cd /srv/disk; mkdir cache layers locks; echo 1 > cache/mine; {files}");
    again(&made);
    // The manifest of another program.
    again(&format!(
        "echo '{{}}' > /srv/disk/store.json; rm /srv/disk/cache/mine; {files}"
    ));
    machine.run("rm -r /srv/disk/*");
    // Names that cowl does not make, of files and of directories, and a type that it does not make.
    for (add, name) in [
        ("mkdir", "own"),
        ("touch", "cache/mine.json"),
        ("touch", "locks/mine"),
        ("mkdir", "reserve/1.dir"),
        ("ln -s /etc", "cache/link"),
        ("touch", "trash/mine"),
        ("touch", "file"),
    ] {
        let add = format!("mkdir -p /srv/disk/cache; {add} /srv/disk/{name}; {files}");
        again(&format!("{make}; {add}; rm -r /srv/disk/{name}"));
    }
    // The layers on another disk.
    again(&format!(
        "{make}; mount -t tmpfs none /srv/disk/layers; {files}; umount /srv/disk/layers"
    ));
    again(&format!("{make}; dpkg --purge cowl"));
    machine.run("test -z \"$(ls -A /srv/disk)\"");
}

#[test]
fn a_container_survives_upgrade_removal_and_purge_on_bookworm() {
    if !can(&[
        Need::Root,
        Need::Fuse,
        Need::Debian,
        Need::Program("dpkg-deb"),
    ]) {
        return;
    }
    let Some(packages) = packages() else { return };
    live(&Machine::new(&rootfs::debian_tar().unwrap(), packages));
}

#[test]
fn a_container_survives_upgrade_removal_and_purge_on_trixie() {
    if !can(&[
        Need::Root,
        Need::Fuse,
        Need::DebianRelease("trixie"),
        Need::Program("dpkg-deb"),
    ]) {
        return;
    }
    let Some(packages) = packages() else { return };
    live(&Machine::new(
        &rootfs::release_tar("trixie").unwrap(),
        packages,
    ));
}

#[test]
fn an_archive_has_a_checksum_and_no_settings() {
    let dir = Scratch::for_test();
    let options = DistOptions {
        programs: cowl_tests::programs::cowl().parent().map(Path::to_owned),
        output: Some(dir.to_path_buf()),
        ..parse(&["--format", "tar", "--fast"])
    };
    super::run(&options).unwrap();
    let list = sh_in(
        &dir,
        "sha256sum -c SHA256SUMS >/dev/null; tar -tf cowl-*.tar.xz",
    )
    .ok()
    .out();
    assert!(list.contains("usr/local/bin/cowlfs\n"), "{list}");
    assert!(list.contains("etc/cowl/config.toml.example\n"), "{list}");
    assert!(!list.contains("etc/cowl/config.toml\n"), "{list}");
}

/// Programs for musl run in a root filesystem without a C library. Building them takes minutes, so this test runs with
/// `COWL_STATIC=1` only.
#[test]
fn static_programs_need_no_c_library() {
    // The programs of the tests are not static, which is detected.
    let programs = cowl_tests::programs::cowl();
    let error = check_static(programs.parent().unwrap()).unwrap_err().0;
    assert!(error.ends_with("cowl is not static"), "{error}");
    if std::env::var_os("COWL_STATIC").is_none() || !can(&[Need::Root, Need::Fuse]) {
        return;
    }
    let output = target().unwrap().join("dist/static-tests");
    let options = DistOptions {
        output: Some(output.clone()),
        ..parse(&["--format", "static", "--fast", "--prefix", "/usr"])
    };
    super::run(&options).unwrap();
    let machine = Machine::new(&rootfs::busybox_tar().unwrap(), &output);
    let line = "tar -xJf /packages/cowl-*-static.tar.xz -C /; \
        mkdir -p /srv/web; echo one > /srv/web/file; cowl create web --from /srv/web; \
        dir=$(cowl mount web); cowl snapshot web; echo two > $dir/file; \
        cowl cat web@snap0:file; cat $dir/file; cowl umount web; cowl check web; \
        cowlfs --version; cowl-snapshotter --version";
    let output = machine.run(line);
    let version = env!("CARGO_PKG_VERSION");
    let expected = format!("snap0\none\ntwo\ncowlfs {version}\ncowl-snapshotter {version}");
    assert_eq!(output.out(), expected, "{}", output.report());
}
