//! Prepares a Debian machine: packages, `/dev/fuse`, the kernel's overlayfs, rustfmt and clippy. Returns quickly if
//! everything is installed.

use std::path::Path;

use crate::run::{Result, Run, failure, note, title};

/// The package of the registry, whose service is not used.
const REGISTRY: &str = "docker-registry";

/// Debian packages that the demo and its build need.
const DEMO: &[&str] = &[
    "acl",
    "attr",
    "busybox-static",
    "debian-archive-keyring",
    "debootstrap",
    "fuse3",
    "gcc",
    "kmod",
    "libc6-dev",
    "libcap2-bin",
    "mmdebstrap",
    "mount",
    "procps",
    "tar",
    "util-linux",
    "xz-utils",
    "zstd",
];

/// Debian packages that the tests need in addition.
const TESTS: &[&str] = &[
    "7zip",
    "binutils",
    "borgbackup",
    "btrfs-progs",
    "bubblewrap",
    "buildah",
    "containerd",
    "crun",
    "cpio",
    "curl",
    REGISTRY,
    "docker.io",
    "dpkg-dev",
    "e2fsprogs",
    "erofs-utils",
    "fish",
    "fuse-overlayfs",
    "git",
    "iproute2",
    "golang-github-containerd-containerd-dev",
    "golang-go",
    "libarchive-tools",
    "lintian",
    "lxc",
    "lxc-templates",
    "make",
    "openssl",
    "openssh-client",
    "openssh-server",
    "patch",
    "pax",
    "podman",
    "postgresql",
    "python3",
    "restic",
    "rsync",
    "runc",
    "skopeo",
    "sqlite3",
    "squashfs-tools",
    "strace",
    "systemd",
    "systemd-container",
    "uidmap",
    "umoci",
    "xfsprogs",
    "zsh",
];

/// Installs the missing dependencies of the build, the demo and the tests.
pub(crate) fn run() -> Result<()> {
    title("setup");
    packages(&[DEMO, TESTS].concat())?;
    fuse()?;
    overlay()?;
    components()?;
    note("all dependencies are installed");
    Ok(())
}

/// Installs the missing dependencies of the demo, which starts none of the daemons that the tests need.
pub(crate) fn run_for_demo() -> Result<()> {
    title("setup");
    packages(DEMO)?;
    fuse()?;
    note("all dependencies are installed");
    Ok(())
}

fn packages(wanted: &[&'static str]) -> Result<()> {
    let missing = missing(wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if cowl_tests::programs::in_path("apt-get").is_none() {
        return failure(format!(
            "this machine has no apt-get; install the counterparts of these Debian packages: {list}"
        ));
    }
    if !rustix::process::geteuid().is_root() {
        return failure(format!(
            "packages are missing, and only root can install them; run:\n  \
             sudo apt-get update && sudo apt-get install -y --no-install-recommends {list}"
        ));
    }
    let apt = || Run::new("apt-get").env("DEBIAN_FRONTEND", "noninteractive");
    // An unreachable source must not prevent the use of the others.
    if let Err(problem) = apt().args(["update", "-qq"]).run() {
        note(&format!(
            "continuing with the cached package lists: {problem}"
        ));
    }
    apt()
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(&missing)
        .run()?;
    // The tests start registries of their own, and the service would listen on a fixed port.
    if missing.contains(&REGISTRY) && Path::new("/run/systemd/system").is_dir() {
        return Run::new("systemctl")
            .args(["disable", "--now", REGISTRY])
            .run();
    }
    Ok(())
}

/// Returns the packages that are not installed; without dpkg, all of them.
fn missing(wanted: &[&'static str]) -> Result<Vec<&'static str>> {
    if cowl_tests::programs::in_path("dpkg-query").is_none() {
        return Ok(wanted.to_vec());
    }
    // dpkg-query fails if it does not know one of the packages, but still reports the others.
    let (_, text) = Run::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\\n"])
        .args(wanted)
        .unseen()
        .code_and_text()?;
    let installed = |name: &str| {
        text.lines().any(|line| {
            line.strip_prefix(name)
                .and_then(|rest| rest.strip_prefix(' '))
                == Some("installed")
        })
    };
    Ok(wanted
        .iter()
        .copied()
        .filter(|name| !installed(name))
        .collect())
}
fn fuse() -> Result<()> {
    let device = Path::new("/dev/fuse");
    let open = || {
        std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(device)
    };
    let Err(first) = open() else { return Ok(()) };
    if !rustix::process::geteuid().is_root() {
        return failure(format!(
            "cannot open /dev/fuse ({first}); as root: modprobe fuse, and chmod 0666 /dev/fuse"
        ));
    }
    // In a container, one of the two may be refused while the other is sufficient.
    for attempt in [Run::new("modprobe").arg("fuse"), node()] {
        if open().is_ok() {
            break;
        }
        if let Err(problem) = attempt.run() {
            note(&problem.to_string());
        }
    }
    match open() {
        Ok(_) => Ok(()),
        Err(error) => failure(format!(
            "cannot open /dev/fuse: {error}; in a container, start it with --device /dev/fuse"
        )),
    }
}

fn node() -> Run {
    Run::new("mknod").args(["-m", "0666", "/dev/fuse", "c", "10", "229"])
}

fn overlay() -> Result<()> {
    let known = |text: &str| text.lines().any(|line| line.ends_with("\toverlay"));
    if known(&std::fs::read_to_string("/proc/filesystems")?) {
        return Ok(());
    }
    if let Err(problem) = Run::new("modprobe").arg("overlay").run() {
        note(&format!(
            "cannot load the kernel's overlayfs, its tests will be skipped: {problem}"
        ));
    }
    Ok(())
}

/// Installs rustfmt and clippy, which a minimal toolchain lacks.
fn components() -> Result<()> {
    for (program, component) in [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")] {
        if cowl_tests::programs::in_path(program).is_none() {
            Run::new("rustup")
                .args(["component", "add", component])
                .run()?;
        }
    }
    Ok(())
}
