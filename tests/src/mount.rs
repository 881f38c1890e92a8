//! Mounts for tests, which are removed when the test ends, also after a panic.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};

use crate::killer::{daemon_of, kill_both};

/// Timeout for a mount to appear and for a daemon to exit.
///
/// Longer than syncfs(2) takes beside tests that write at full speed: a daemon that ends syncs its layer first.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Mount point.
    pub mount_point: PathBuf,
    /// Type of the file system, e.g. `fuse.cowlfs`.
    pub kind: String,
    /// Source of the mount, as the file system reports it.
    pub source: String,
    /// Options of this mount and of the file system, separated by commas.
    pub options: String,
}

/// Returns all mounts, oldest first.
#[must_use]
pub fn all() -> Vec<Mounted> {
    let text = std::fs::read("/proc/self/mountinfo").expect("/proc/self/mountinfo");
    text.split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect()
}

fn parse(line: &[u8]) -> Option<Mounted> {
    // Spaces in paths are escaped, so the first " - " is the separator.
    let separator = line.windows(3).position(|three| three == b" - ")?;
    let first: Vec<&[u8]> = line[..separator].split(|byte| *byte == b' ').collect();
    let second: Vec<&[u8]> = line[separator + 3..].split(|byte| *byte == b' ').collect();
    let options = [first.get(5)?, second.get(2).unwrap_or(&&b""[..])]
        .map(|text| text.escape_ascii().to_string())
        .join(",");
    Some(Mounted {
        mount_point: PathBuf::from(OsString::from_vec(unescape(first.get(4)?))),
        kind: second.first()?.escape_ascii().to_string(),
        source: second.get(1)?.escape_ascii().to_string(),
        options,
    })
}

/// Decodes mountinfo's octal escapes, such as `\040`.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|three| three.iter().all(u8::is_ascii_digit));
        if let (b'\\', Some(three)) = (byte, octal) {
            let value = three
                .iter()
                .fold(0u32, |sum, digit| sum * 8 + u32::from(digit - b'0'));
            out.push(u8::try_from(value).unwrap_or(b'?'));
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

/// Returns the topmost mount exactly at `mount_point`.
#[must_use]
pub fn at(mount_point: &Path) -> Option<Mounted> {
    all()
        .into_iter()
        .rfind(|mounted| mounted.mount_point == mount_point)
}

/// Returns the mount points at or below `path`, oldest first.
#[must_use]
pub fn below(path: &Path) -> Vec<PathBuf> {
    all()
        .into_iter()
        .map(|mounted| mounted.mount_point)
        .filter(|mount_point| mount_point.starts_with(path))
        .collect()
}

/// Unmounts, as `umount` does.
pub fn plain_unmount(mount_point: &Path) -> std::io::Result<()> {
    Ok(unmount(mount_point, UnmountFlags::NOFOLLOW)?)
}

/// Unmounts a file system that is not in use. Retries for a while: a child that has forked but not yet exec'd holds
/// copies of this process's descriptors.
#[track_caller]
pub fn unmount_free(mount_point: &Path) {
    let start = Instant::now();
    loop {
        match plain_unmount(mount_point) {
            Ok(()) => return,
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
            Err(error) => panic!("cannot unmount {}: {error}", mount_point.display()),
        }
        assert!(
            start.elapsed() < TIMEOUT,
            "{} is in use after {TIMEOUT:?}, by: {}",
            mount_point.display(),
            users(mount_point).join("; ")
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns the processes and mounts that use `mount_point`, as text.
fn users(mount_point: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let dir = process.path();
        let descriptors = std::fs::read_dir(dir.join("fd")).into_iter().flatten();
        let mut links: Vec<_> = descriptors.flatten().map(|fd| fd.path()).collect();
        links.extend(["cwd", "root", "exe"].map(|link| dir.join(link)));
        let used: Vec<_> = links
            .iter()
            .filter_map(|link| std::fs::read_link(link).ok())
            .filter(|target| target.starts_with(mount_point))
            .map(|target| target.display().to_string())
            .collect();
        if !used.is_empty() {
            let command = std::fs::read_to_string(dir.join("cmdline")).unwrap_or_default();
            let command = command.replace('\0', " ");
            found.push(format!(
                "{} ({command}): {}",
                dir.display(),
                used.join(", ")
            ));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = format!("{}/", mount_point.display());
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&path))
            .map(str::to_owned),
    );
    found
}

/// Unmounts; if the mount is busy, detaches it lazily (`umount -l`).
pub fn detach(mount_point: &Path) -> std::io::Result<()> {
    match unmount(mount_point, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(_) => Ok(unmount(
            mount_point,
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        )?),
    }
}

/// Polls `done` until it returns true.
#[track_caller]
pub fn wait_until(condition: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < TIMEOUT,
            "timed out after {TIMEOUT:?} waiting for {condition}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The layers of one overlay: lowers, topmost first, and the upper with its work directory.
#[derive(Debug, Clone)]
pub struct Stack {
    /// Read-only layers, topmost first.
    pub lowers: Vec<PathBuf>,
    /// `upperdir` and `workdir`.
    pub upper: Option<(PathBuf, PathBuf)>,
}

impl Stack {
    /// Returns the mount options for these layers, with `extra` appended.
    #[must_use]
    pub fn options(&self, extra: &str) -> OsString {
        let mut text = OsString::from("lowerdir=");
        for (index, lower) in self.lowers.iter().enumerate() {
            if index > 0 {
                text.push(":");
            }
            text.push(lower);
        }
        if let Some((upper, work)) = &self.upper {
            text.push(",upperdir=");
            text.push(upper);
            text.push(",workdir=");
            text.push(work);
        }
        if !extra.is_empty() {
            text.push(",");
            text.push(extra);
        }
        text
    }

    /// Returns a read-only stack of the same layers: the upper becomes the topmost lower.
    #[must_use]
    pub fn read_only(&self) -> Stack {
        let upper = self.upper.iter().map(|(upper, _)| upper.clone());
        Stack {
            lowers: upper.chain(self.lowers.iter().cloned()).collect(),
            upper: None,
        }
    }

    /// Creates a read-only stack of `layers`, topmost first. The kernel requires at least two.
    #[must_use]
    pub fn of(layers: &[&Path]) -> Stack {
        Stack {
            lowers: layers.iter().map(|path| path.to_path_buf()).collect(),
            upper: None,
        }
    }
}

/// A mounted overlay. Drop unmounts it, lazily as a last resort.
#[derive(Debug)]
pub struct Overlay {
    mount_point: PathBuf,
    daemon: Option<Child>,
}

impl Overlay {
    /// Mounts `stack` with the program under test, in the foreground, so that its exit is noticed.
    #[track_caller]
    #[must_use]
    pub fn cowlfs(stack: &Stack, mount_point: &Path, extra: &str) -> Overlay {
        Overlay::cowlfs_at(&crate::programs::cowlfs(), stack, mount_point, extra)
    }

    /// Mounts `stack` with the program at `program`, in the foreground.
    #[track_caller]
    #[must_use]
    pub fn cowlfs_at(program: &Path, stack: &Stack, mount_point: &Path, extra: &str) -> Overlay {
        Overlay::started(Command::new(program).arg("-f"), stack, mount_point, extra)
    }

    /// Like [`Overlay::cowlfs`], with variables in the environment.
    #[track_caller]
    #[must_use]
    pub fn cowlfs_with(
        stack: &Stack,
        mount_point: &Path,
        extra: &str,
        variables: &[(&str, &str)],
    ) -> Overlay {
        let mut program = Command::new(crate::programs::cowlfs());
        program.arg("-f").envs(variables.iter().copied());
        Overlay::started(&mut program, stack, mount_point, extra)
    }

    /// Mounts `stack` with the program under test, which logs the kernel's requests to the file `log`.
    #[track_caller]
    #[must_use]
    pub fn cowlfs_logging(stack: &Stack, mount_point: &Path, extra: &str, log: &Path) -> Overlay {
        let log = std::fs::File::create(log).expect("the log");
        let mut program = Command::new(crate::programs::cowlfs());
        Overlay::started(program.arg("-d").stderr(log), stack, mount_point, extra)
    }

    #[track_caller]
    fn started(program: &mut Command, stack: &Stack, mount_point: &Path, extra: &str) -> Overlay {
        let mut daemon = program
            .arg("-o")
            .arg(stack.options(extra))
            .arg(mount_point)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program:?}: {error}"));
        wait_until("the mount", || {
            if let Some(status) = daemon.try_wait().expect("waiting for the daemon") {
                panic!("{program:?} ended instead of mounting: {status}");
            }
            at(mount_point).is_some_and(|mounted| mounted.kind.starts_with("fuse"))
        });
        Overlay {
            mount_point: mount_point.to_owned(),
            daemon: Some(daemon),
        }
    }

    /// Mounts `stack` with the kernel's overlayfs, whose on-disk format cowlfs shares.
    #[track_caller]
    #[must_use]
    pub fn kernel(stack: &Stack, mount_point: &Path) -> Overlay {
        Overlay::kernel_with(stack, mount_point, "index=off,xino=off")
    }

    /// Mounts `stack` with the kernel's overlayfs and additional options.
    #[track_caller]
    #[must_use]
    pub fn kernel_with(stack: &Stack, mount_point: &Path, extra: &str) -> Overlay {
        let options = stack.options(&format!("redirect_dir=on,metacopy=on,{extra}"));
        let args = [
            OsStr::new("-t"),
            "overlay".as_ref(),
            "overlay".as_ref(),
            "-o".as_ref(),
        ];
        // Retry on EBUSY: a process that starts in a new mount namespace, such as a daemon, holds copies of all mounts
        // for a moment, so the kernel considers an upper that was just unmounted as still in use.
        let mount = || {
            let arguments: [&OsStr; 2] = [options.as_ref(), mount_point.as_ref()];
            crate::command::run("mount", args.into_iter().chain(arguments))
        };
        let mut mounted = mount();
        wait_until("the upper to be free", || {
            // mount(8) describes EBUSY in one of two ways, depending on what else is mounted.
            let texts = ["busy", "already mounted"];
            let busy = texts.iter().any(|text| mounted.err().contains(text));
            if busy {
                mounted = mount();
            }
            !busy
        });
        mounted.ok();
        Overlay {
            mount_point: mount_point.to_owned(),
            daemon: None,
        }
    }

    /// Returns the mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Returns the process id of the daemon.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        let program = self.program()?;
        if daemon_of(program).is_none() {
            // The mount is visible before its daemon is forked, and an answer comes from the daemon. An error is
            // that of a dead mount.
            let _answer = std::fs::metadata(&self.mount_point);
        }
        Some(daemon_of(program).unwrap_or(program))
    }

    /// Returns the process id of the started program: the keeper, or the daemon if there is none.
    #[must_use]
    pub fn program(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// Unmounts normally and waits for the daemon, which must exit with success.
    #[track_caller]
    pub fn unmount(self) {
        unmount_free(&self.mount_point);
        self.ended();
    }

    /// Waits for the daemon, which must exit with success.
    #[track_caller]
    pub fn ended(mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let mut status = None;
            let start = Instant::now();
            while status.is_none() {
                status = daemon.try_wait().expect("waiting for the daemon");
                assert!(
                    start.elapsed() < TIMEOUT,
                    "the daemon did not end within {TIMEOUT:?}: {}",
                    crate::process::describe_waits(daemon.id())
                );
                std::thread::sleep(Duration::from_millis(2));
            }
            assert!(
                status.is_some_and(|status| status.success()),
                "the daemon failed: {status:?}"
            );
        }
    }

    /// Kills the daemon and its keeper with SIGKILL, and detaches the dead mount.
    #[track_caller]
    pub fn kill(mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            kill_both(daemon.id());
            daemon.wait().expect("waiting for the daemon");
        }
        detach(&self.mount_point).expect("unmounting a dead mount");
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if at(&self.mount_point).is_some()
            && let Err(error) = detach(&self.mount_point)
        {
            eprintln!("cannot unmount {}: {error}", self.mount_point.display());
        }
        if let Some(mut daemon) = self.daemon.take() {
            let start = Instant::now();
            while matches!(daemon.try_wait(), Ok(None)) {
                if start.elapsed() > Duration::from_secs(5) {
                    eprintln!(
                        "the daemon of {} did not end; killed",
                        self.mount_point.display()
                    );
                    if let Err(error) = daemon.kill().and_then(|()| daemon.wait().map(drop)) {
                        eprintln!("cannot kill it: {error}");
                    }
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Returns the bytes of a path.
#[must_use]
pub fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_parsed() {
        let line = b"36 35 98:0 /mnt1 /mnt/a\\040b-c rw,noatime master:1 - fuse.cowlfs cowl rw,x=1";
        let mounted = parse(line).unwrap();
        assert_eq!(mounted.mount_point, Path::new("/mnt/a b-c"));
        assert_eq!(mounted.kind, "fuse.cowlfs");
        assert_eq!(mounted.source, "cowl");
        assert_eq!(mounted.options, "rw,noatime,rw,x=1");
        assert_eq!(parse(b""), None);
    }
}
