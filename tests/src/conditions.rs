//! What a test needs of the machine. A test that can't run says so on standard error and in the
//! file that `COWL_SKIP_LOG` names; `cargo xtask test` counts the lines and fails when there are
//! more than the machine excuses, so that nothing is ever skipped in silence.

use std::io::Write;

/// Something a test can't do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Effective user 0 with the power to mount.
    Root,
    /// A usable `/dev/fuse`.
    Fuse,
    /// The kernel's own overlayfs.
    KernelOverlay,
    /// `mmdebstrap` and a Debian mirror, or a root filesystem made earlier.
    Debian,
    /// A program of the system.
    Program(&'static str),
    /// A filesystem that the kernel knows.
    Filesystem(&'static str),
}

impl Need {
    /// Why this machine can't, if it can't.
    fn missing(self) -> Option<String> {
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
                .map(|error| format!("no Debian root filesystem: {error}")),
            Need::Program(name) => crate::programs::in_path(name)
                .is_none()
                .then(|| format!("no program {name}; `cargo xtask setup` installs it")),
        }
    }
}

/// Why the kernel can't mount a filesystem of this type. Its module is loaded when there is one.
fn lacks_filesystem(name: &str) -> Option<String> {
    let known = || {
        std::fs::read_to_string("/proc/filesystems").map(|text| {
            text.lines()
                .any(|line| line.split_whitespace().next_back() == Some(name))
        })
    };
    match known() {
        Ok(true) => return None,
        Err(error) => return Some(format!("cannot read /proc/filesystems: {error}")),
        Ok(false) => {}
    }
    if crate::programs::in_path("modprobe").is_some() {
        let said = crate::command::run("modprobe", [name]);
        if said.code == 0 && known().unwrap_or(false) {
            return None;
        }
    }
    Some(format!("the kernel has no {name}"))
}

/// True when all of `needs` are met; else notes that the calling test was skipped, and why. The test gets a umask of
/// its own.
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

/// The name of the test that runs on this thread, with the modules that it is in.
#[must_use]
pub fn test_name() -> String {
    let thread = std::thread::current();
    // With one thread for all tests it is the main thread, which bears another name.
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => "a test".to_owned(),
    }
}

/// Notes that the calling test was skipped. Where nothing counts the skips (plain `cargo test`), the test fails
/// instead: it would pass without having run.
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
