//! Requirements of tests. A test that cannot run reports that on standard error and in the file that `COWL_SKIP_LOG`
//! names. `cargo xtask test` counts these lines and fails if there are more than the machine explains, so that no test
//! is skipped silently.

use std::io::Write;

/// A requirement of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Effective user 0 with the privilege to mount.
    Root,
    /// A usable `/dev/fuse`.
    Fuse,
    /// The kernel's overlayfs.
    KernelOverlay,
    /// `mmdebstrap` and a Debian mirror, or a cached root filesystem.
    Debian,
    /// A Debian root filesystem with systemd as its init, as for `Debian`.
    DebianWithSystemd,
    /// A root filesystem of this release of Debian, as for `Debian`.
    DebianRelease(&'static str),
    /// The pids controller of cgroup v1, not managed by systemd.
    PidsController,
    /// Control groups that can be frozen, and the permission to create one.
    Freezer,
    /// A program in PATH.
    Program(&'static str),
    /// A directory of an installed package.
    Directory(&'static str),
    /// A file system type that the kernel supports.
    Filesystem(&'static str),
}

impl Need {
    /// Returns the reason if the machine does not meet the requirement.
    #[must_use]
    pub fn missing(self) -> Option<String> {
        match self {
            Need::Root => (!rustix::process::geteuid().is_root()).then(|| "not root".to_owned()),
            Need::Fuse => std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/fuse")
                .err()
                .map(|error| format!("cannot open /dev/fuse: {error}")),
            Need::KernelOverlay => lacks_filesystem("overlay"),
            Need::Filesystem(name) => lacks_filesystem(name),
            Need::Debian => crate::rootfs::debian_tar()
                .err()
                .map(|error| format!("cannot obtain a Debian root filesystem: {error}")),
            Need::DebianWithSystemd => crate::rootfs::systemd_tar()
                .err()
                .map(|error| format!("cannot obtain a Debian with systemd: {error}")),
            Need::DebianRelease(suite) => crate::rootfs::release_tar(suite)
                .err()
                .map(|error| format!("cannot obtain Debian {suite}: {error}")),
            Need::PidsController => lacks_pids_controller(),
            Need::Freezer => crate::lxc_stub::freezer()
                .is_none()
                .then(|| "no control groups that can be frozen".to_owned()),
            Need::Directory(path) => (!std::path::Path::new(path).is_dir())
                .then(|| format!("no directory {path}; `cargo xtask setup` installs it")),
            Need::Program(name) => crate::programs::in_path(name)
                .is_none()
                .then(|| format!("no program {name}; `cargo xtask setup` installs it")),
        }
    }
}

/// Returns the reason if a test cannot create a group of the pids controller.
fn lacks_pids_controller() -> Option<String> {
    if std::fs::metadata("/run/systemd/system").is_ok() {
        return Some("systemd manages the control groups".to_owned());
    }
    let table = std::fs::metadata("/sys/fs/cgroup/pids/cgroup.procs");
    table
        .err()
        .map(|error| format!("no pids controller at /sys/fs/cgroup/pids: {error}"))
}

/// Returns the reason if the kernel cannot mount file systems of this type. Tries to load its module.
fn lacks_filesystem(name: &str) -> Option<String> {
    let supported = || {
        std::fs::read_to_string("/proc/filesystems").map(|text| {
            text.lines()
                .any(|line| line.split_whitespace().next_back() == Some(name))
        })
    };
    match supported() {
        Ok(true) => return None,
        Err(error) => return Some(format!("cannot read /proc/filesystems: {error}")),
        Ok(false) => {}
    }
    if crate::programs::in_path("modprobe").is_some() {
        let output = crate::command::run("modprobe", [name]);
        if output.code == 0 && supported().unwrap_or(false) {
            return None;
        }
    }
    Some(format!("the kernel has no {name}"))
}

/// Returns whether all of `needs` are met; otherwise reports the calling test as skipped.
///
/// Also gives the test a umask of its own ([`own_umask`]).
#[must_use]
pub fn can(needs: &[Need]) -> bool {
    own_umask();
    match needs.iter().find_map(|need| need.missing()) {
        None => true,
        Some(reason) => {
            skipped(&reason);
            false
        }
    }
}

/// Like [`can`], for a test that mounts: root and `/dev/fuse`, and `more`.
#[must_use]
pub fn can_mount(more: &[Need]) -> bool {
    can(&[&[Need::Root, Need::Fuse], more].concat())
}

/// Gives the calling thread, and the threads and processes that it starts, a umask and a working directory of its own.
/// The umask is 022, whatever the caller's is and whatever another test sets.
///
/// # Panics
/// If the kernel refuses, which it does for no user.
pub fn own_umask() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).expect("a umask of the thread's own");
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
}

/// Returns the name of the test that runs on this thread, with its modules.
#[must_use]
pub fn test_name() -> String {
    let thread = std::thread::current();
    // With --test-threads=1 the test runs on the main thread, which does not have the name of the test.
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => "a test".to_owned(),
    }
}

/// Reports the calling test as skipped. If skips are not counted (plain `cargo test`), the test fails instead, because
/// it would pass without having run.
///
/// # Panics
/// Without `COWL_SKIP_LOG`, unless `COWL_SKIP` is set.
pub fn skipped(reason: &str) {
    let line = format!("SKIP {}: {}", test_name(), reason.replace('\n', " "));
    eprintln!("{line}");
    let counted = std::env::var_os("COWL_SKIP_LOG").is_some();
    assert!(
        counted || std::env::var_os("COWL_SKIP").is_some(),
        "{reason}: run `cargo xtask test` as root, which sets the machine up, or set COWL_SKIP=1 to skip such tests"
    );
    if let Some(log) = std::env::var_os("COWL_SKIP_LOG") {
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap_or_else(|error| panic!("cannot open {}: {error}", log.display()));
        writeln!(file, "{line}").expect("writing the skip log");
    }
}
