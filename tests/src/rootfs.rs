//! A real Debian root filesystem, made once by mmdebstrap and kept as a tar in cargo's target
//! folder. Packages for a later `dpkg -i` lie in its `/root/debs` and `/root/large`, so that
//! nothing needs a network once it is made.

use std::fs::{File, OpenOptions};
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The Debian release.
pub const SUITE: &str = "bookworm";
/// Packages that are not installed and wait in `/root/debs`. `tzdata` is there for its many links.
pub const DEBS: [&str; 6] = [
    "less",
    "hello",
    "file",
    "libmagic1",
    "libmagic-mgc",
    "tzdata",
];
/// Packages of some thousand files and of large programs, waiting in `/root/large`.
pub const LARGE: [&str; 7] = [
    "cpp-12",
    "libisl23",
    "libmpc3",
    "libmpfr6",
    "linux-libc-dev",
    "manpages",
    "manpages-dev",
];
/// Changes when what the tar must hold does.
const EDITION: u32 = 2;

/// What a root filesystem was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Debian, by mmdebstrap or debootstrap.
    Debian,
    /// One static busybox and its links: when Debian can't be had.
    Busybox,
}

/// The tar of a Debian root filesystem, made now if it was not made before.
pub fn debian_tar() -> Result<PathBuf> {
    let tar = cache_folder()?.join(format!(
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

/// The tar of a root filesystem with nothing but busybox in it.
pub fn busybox_tar() -> Result<PathBuf> {
    let tar = cache_folder()?.join(format!("busybox-{EDITION}.tar"));
    make_once(&tar, busybox)?;
    Ok(tar)
}

/// Where made things are kept: `COWL_CACHE`, else a folder in cargo's target folder.
fn cache_folder() -> Result<PathBuf> {
    let folder = match std::env::var_os("COWL_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let program = std::env::current_exe()?;
            program
                .ancestors()
                .find(|folder| folder.join("CACHEDIR.TAG").is_file())
                .ok_or_else(|| Error::other("not in a cargo target folder; set COWL_CACHE"))?
                .join("rootfs")
        }
    };
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// Runs `make` for `tar` unless it is there; one at a time, other processes included.
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
    let fetch = |folder: &str, packages: &[&str]| {
        format!(
            "--customize-hook=mkdir -p \"$1/root/{folder}\" && cd \"$1/root/{folder}\" && \
             APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get -o APT::Sandbox::User=root download {}",
            packages.join(" ")
        )
    };
    let run = |mirror: Option<String>| {
        let mut command = Command::new("mmdebstrap");
        command.args([
            "--variant=minbase",
            &fetch("debs", &DEBS),
            &fetch("large", &LARGE),
            SUITE,
        ]);
        command.arg(tar).args(mirror);
        quietly(command)
    };
    match configured_mirror() {
        Some(mirror) => run(Some(mirror)).or_else(|_| run(None)),
        None => run(None),
    }
}

/// The mirror of `SUITE` that apt itself is told to use.
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
    let uri = text.lines().find_map(|line| {
        let mut words = line.split(' ');
        let wanted = words.next() == Some(SUITE) && words.next() == Some("main");
        words.next().filter(|_| wanted)
    })?;
    Some(format!("deb {uri} {SUITE} main"))
}

fn debootstrap(tar: &Path) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("debootstrap-")
        .tempdir_in("/var/tmp")?;
    let mut command = Command::new("debootstrap");
    command.args(["--variant=minbase", SUITE]).arg(dir.path());
    quietly(command)?;
    for (folder, packages) in [("root/debs", &DEBS[..]), ("root/large", &LARGE)] {
        let folder = dir.path().join(folder);
        std::fs::create_dir_all(&folder)?;
        let mut command = Command::new("apt-get");
        command
            .args(["-o", "APT::Sandbox::User=root", "download"])
            .args(packages)
            .current_dir(&folder);
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
    for folder in ["dev", "proc", "sys", "tmp", "root", "etc", "var/lib"] {
        std::fs::create_dir_all(dir.path().join(folder))?;
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

/// Runs a command; its words are shown only when it fails.
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
    let said = std::fs::read(log.path())?;
    let last: Vec<_> = said.rsplitn(6, |byte| *byte == b'\n').take(5).collect();
    let last = last
        .into_iter()
        .rev()
        .map(|line| line.escape_ascii().to_string());
    Err(Error::other(format!(
        "{program} failed ({status}): {}",
        last.collect::<Vec<_>>().join("; ")
    )))
}

/// Unpacks `tar` into `dir` with everything that it keeps.
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
