//! A Debian root filesystem, which mmdebstrap creates once and which is cached as a tar in Cargo's target directory.
//! Its `/root/debs` and `/root/large` contain packages for `dpkg -i`, so that tests need no network.

use std::fs::{File, OpenOptions};
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The Debian release.
pub const SUITE: &str = "bookworm";
/// Packages in `/root/debs`, which are not installed. `tzdata` contains many links.
pub const DEBS: [&str; 6] = [
    "less",
    "hello",
    "file",
    "libmagic1",
    "libmagic-mgc",
    "tzdata",
];
/// Packages in `/root/large`, with thousands of files and with large programs.
pub const LARGE: [&str; 7] = [
    "cpp-12",
    "libisl23",
    "libmpc3",
    "libmpfr6",
    "linux-libc-dev",
    "manpages",
    "manpages-dev",
];
/// The mirror, if apt's configuration has none.
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
/// Version of the content of the tars; part of the file names in the cache.
const EDITION: u32 = 2;

/// Source of a root filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Debian, created by mmdebstrap or debootstrap.
    Debian,
    /// A static busybox with its links, if Debian is not available.
    Busybox,
}

/// Returns the tar of a Debian root filesystem, and creates it if it is not cached.
pub fn debian_tar() -> Result<PathBuf> {
    let tar = cache_dir()?.join(format!(
        "debian-{SUITE}-{}-{EDITION}.tar",
        std::env::consts::ARCH
    ));
    make_once(&tar, |unfinished| {
        mmdebstrap(unfinished).or_else(|first| {
            debootstrap(unfinished).map_err(|second| {
                Error::other(format!("mmdebstrap: {first}; debootstrap: {second}"))
            })
        })
    })?;
    Ok(tar)
}

/// Returns the tar of a Debian root filesystem whose init is systemd, with systemd-nspawn, and creates it if it is not cached.
pub fn systemd_tar() -> Result<PathBuf> {
    let tar = cache_dir()?.join(format!(
        "systemd-container-{SUITE}-{}-{EDITION}.tar",
        std::env::consts::ARCH
    ));
    make_once(&tar, |unfinished| {
        let packages = "--include=systemd-sysv,dbus,systemd-container";
        from_mirror(unfinished, SUITE, &[packages.to_owned()])
    })?;
    Ok(tar)
}

/// Returns the tar of a root filesystem of another release of Debian, and creates it if it is not cached.
pub fn release_tar(suite: &str) -> Result<PathBuf> {
    let tar = cache_dir()?.join(format!(
        "release-{suite}-{}-{EDITION}.tar",
        std::env::consts::ARCH
    ));
    make_once(&tar, |unfinished| from_mirror(unfinished, suite, &[]))?;
    Ok(tar)
}

/// Returns the tar of a root filesystem that mmdebstrap creates with these options, and creates it if it is not cached.
/// Its apt knows the sources of packages, too.
///
/// `name` is that of the tar. A caller that changes the options must change it.
pub fn custom_tar(name: &str, options: &[String]) -> Result<PathBuf> {
    let tar = cache_dir()?.join(format!("{name}-{SUITE}-{}.tar", std::env::consts::ARCH));
    let mirror = configured_mirror().unwrap_or_else(|| DEFAULT_MIRROR.to_owned());
    make_once(&tar, |unfinished| {
        let mut command = Command::new("mmdebstrap");
        command.arg("--variant=minbase").args(options);
        command.arg(SUITE).arg(unfinished);
        command.args(["deb", "deb-src"].map(|kind| format!("{kind} {mirror} {SUITE} main")));
        quietly(command)
    })?;
    Ok(tar)
}

/// Returns the tar of a root filesystem that contains only busybox, and creates it if it is not cached.
pub fn busybox_tar() -> Result<PathBuf> {
    let tar = cache_dir()?.join(format!("busybox-{EDITION}.tar"));
    make_once(&tar, busybox)?;
    Ok(tar)
}

/// Returns the directory of the cache: `COWL_CACHE`, or a directory in Cargo's target directory.
fn cache_dir() -> Result<PathBuf> {
    let dir = match std::env::var_os("COWL_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let program = std::env::current_exe()?;
            program
                .ancestors()
                .find(|directory| directory.join("CACHEDIR.TAG").is_file())
                .ok_or_else(|| Error::other("not in a cargo target directory; set COWL_CACHE"))?
                .join("rootfs")
        }
    };
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Runs `make` for `tar` unless it exists. A lock file excludes other threads and processes.
fn make_once(tar: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(tar.with_extension("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
    if tar.try_exists()? {
        return Ok(());
    }
    let unfinished = tar.with_extension("unfinished.tar");
    make(&unfinished)?;
    std::fs::rename(&unfinished, tar)
}

fn mmdebstrap(tar: &Path) -> Result<()> {
    let fetch = |directory: &str, packages: &[&str]| {
        format!(
            "--customize-hook=mkdir -p \"$1/root/{directory}\" && cd \"$1/root/{directory}\" && \
             APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get -o APT::Sandbox::User=root download {}",
            packages.join(" ")
        )
    };
    let fetched = [fetch("debs", &DEBS), fetch("large", &LARGE)];
    from_mirror(tar, SUITE, &fetched)
}

/// Runs mmdebstrap with the mirror of apt's configuration, or with its default.
fn from_mirror(tar: &Path, suite: &str, options: &[String]) -> Result<()> {
    let run = |mirror: Option<String>| {
        let mut command = Command::new("mmdebstrap");
        command.arg("--variant=minbase").args(options).arg(suite);
        command.arg(tar).args(mirror);
        quietly(command)
    };
    match configured_mirror() {
        Some(uri) => run(Some(format!("deb {uri} {suite} main"))).or_else(|_| run(None)),
        None => run(None),
    }
}

/// Returns the address of the mirror of `SUITE` in apt's configuration.
fn configured_mirror() -> Option<String> {
    let output = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(CODENAME) $(COMPONENT) $(REPO_URI)",
        ])
        .args(["Created-By: Packages", "Origin: Debian"])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().find_map(|line| {
        let mut words = line.split(' ');
        let wanted = words.next() == Some(SUITE) && words.next() == Some("main");
        words.next().filter(|_| wanted).map(str::to_owned)
    })
}

fn debootstrap(tar: &Path) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("debootstrap-")
        .tempdir_in("/var/tmp")?;
    let mut command = Command::new("debootstrap");
    command.args(["--variant=minbase", SUITE]).arg(dir.path());
    quietly(command)?;
    for (name, packages) in [("root/debs", &DEBS[..]), ("root/large", &LARGE)] {
        let directory = dir.path().join(name);
        std::fs::create_dir_all(&directory)?;
        let mut command = Command::new("apt-get");
        command
            .args(["-o", "APT::Sandbox::User=root", "download"])
            .args(packages)
            .current_dir(&directory);
        quietly(command)?;
    }
    pack(dir.path(), tar)
}

fn busybox(tar: &Path) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("busybox-")
        .tempdir_in("/var/tmp")?;
    let bin = dir.path().join("usr/bin");
    std::fs::create_dir_all(&bin)?;
    for name in ["dev", "proc", "sys", "tmp", "root", "etc", "var/lib"] {
        std::fs::create_dir_all(dir.path().join(name))?;
    }
    std::os::unix::fs::symlink("usr/bin", dir.path().join("bin"))?;
    std::fs::write(
        dir.path().join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\n",
    )?;
    std::fs::copy("/bin/busybox", bin.join("busybox"))?;
    let mut command = Command::new(bin.join("busybox"));
    command.arg("--install").arg(&bin);
    quietly(command)?;
    pack(dir.path(), tar)
}

fn pack(dir: &Path, tar: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args([
        "--numeric-owner",
        "--xattrs",
        "--acls",
        "--one-file-system",
        "-C",
    ]);
    command.arg(dir).arg("-cf").arg(tar).arg(".");
    quietly(command)
}

/// Runs a command, and prints its output only if it fails.
fn quietly(mut command: Command) -> Result<()> {
    let log = tempfile::NamedTempFile::new()?;
    let program = command.get_program().display().to_string();
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::from(log.as_file().try_clone()?))
        .stderr(Stdio::from(log.as_file().try_clone()?))
        .status()
        .map_err(|error| Error::other(format!("cannot start {program}: {error}")))?;
    if status.success() {
        return Ok(());
    }
    let output = std::fs::read(log.path())?;
    let last: Vec<_> = output.rsplitn(6, |byte| *byte == b'\n').take(5).collect();
    let last = last
        .into_iter()
        .rev()
        .map(|line| line.escape_ascii().to_string());
    Err(Error::other(format!(
        "{program} failed ({status}): {}",
        last.collect::<Vec<_>>().join("; ")
    )))
}

/// Unpacks `tar` into `dir` with all attributes.
pub fn unpack(tar: &Path, dir: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args([
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=*",
        "--acls",
        "-xpf",
    ]);
    command
        .arg(File::open(tar).map(|_| tar)?)
        .arg("-C")
        .arg(dir);
    quietly(command)
}

/// Returns the architecture of this machine in the terms of container images.
#[must_use]
pub fn image_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
