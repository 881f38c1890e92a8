//! Mounts that a test makes and that are gone when it ends, whatever happens in between.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};

/// How long a mount may take to appear and a daemon to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// One line of `/proc/self/mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Where.
    pub place: PathBuf,
    /// The filesystem's type, e.g. `fuse.cowlfs`.
    pub kind: String,
    /// What is mounted, as the filesystem names it.
    pub source: String,
    /// Options of this mount and of the filesystem, joined by commas.
    pub options: String,
}

/// Everything that is mounted, oldest first.
#[must_use]
pub fn all() -> Vec<Mounted> {
    let text = std::fs::read("/proc/self/mountinfo").expect("/proc/self/mountinfo");
    text.split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect()
}

fn parse(line: &[u8]) -> Option<Mounted> {
    // Paths have no bare space, so the first " - " is the separator.
    let at = line.windows(3).position(|three| three == b" - ")?;
    let first: Vec<&[u8]> = line[..at].split(|byte| *byte == b' ').collect();
    let second: Vec<&[u8]> = line[at + 3..].split(|byte| *byte == b' ').collect();
    let options = [first.get(5)?, second.get(2).unwrap_or(&&b""[..])]
        .map(|text| text.escape_ascii().to_string())
        .join(",");
    Some(Mounted {
        place: PathBuf::from(OsString::from_vec(unescape(first.get(4)?))),
        kind: second.first()?.escape_ascii().to_string(),
        source: second.get(1)?.escape_ascii().to_string(),
        options,
    })
}

/// Undoes mountinfo's `\040`.
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

/// What is mounted exactly at `place`, the topmost.
#[must_use]
pub fn at(place: &Path) -> Option<Mounted> {
    all().into_iter().rfind(|mounted| mounted.place == place)
}

/// Mount points at or below `path`, oldest first.
#[must_use]
pub fn below(path: &Path) -> Vec<PathBuf> {
    all()
        .into_iter()
        .map(|mounted| mounted.place)
        .filter(|place| place.starts_with(path))
        .collect()
}

/// Unmounts as `umount` does.
pub fn plain_unmount(place: &Path) -> std::io::Result<()> {
    Ok(unmount(place, UnmountFlags::NOFOLLOW)?)
}

/// Unmounts a file system that is not in use. A child process has a copy of each descriptor of this process between
/// fork and exec, so this may take a moment.
#[track_caller]
pub fn unmount_free(place: &Path) {
    let start = Instant::now();
    loop {
        match plain_unmount(place) {
            Ok(()) => return,
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
            Err(error) => panic!("cannot unmount {}: {error}", place.display()),
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{} is in use after {PATIENCE:?}, by: {}",
            place.display(),
            users(place).join("; ")
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The processes that have something below `place` open, as text.
fn users(place: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let dir = process.path();
        let descriptors = std::fs::read_dir(dir.join("fd")).into_iter().flatten();
        let mut links: Vec<_> = descriptors.flatten().map(|fd| fd.path()).collect();
        links.extend(["cwd", "root", "exe"].map(|link| dir.join(link)));
        let used: Vec<_> = links
            .iter()
            .filter_map(|link| std::fs::read_link(link).ok())
            .filter(|target| target.starts_with(place))
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
    let path = format!("{}/", place.display());
    found.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&path))
            .map(str::to_owned),
    );
    found
}

/// Unmounts; when something is still open there, takes it out of sight (`umount -l`).
pub fn detach(place: &Path) -> std::io::Result<()> {
    match unmount(place, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(_) => Ok(unmount(
            place,
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        )?),
    }
}

/// Waits until `done` says so.
#[track_caller]
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < PATIENCE,
            "waited {PATIENCE:?} in vain: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The folders of one overlay: lowers topmost first, and the pair of writable ones.
#[derive(Debug, Clone)]
pub struct Stack {
    /// Read-only layers, topmost first.
    pub lowers: Vec<PathBuf>,
    /// `upperdir` and `workdir`.
    pub upper: Option<(PathBuf, PathBuf)>,
}

impl Stack {
    /// The `-o` text for it, `extra` appended.
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

    /// The same layers to be read only: the upper becomes the topmost lower.
    #[must_use]
    pub fn read_only(&self) -> Stack {
        let upper = self.upper.iter().map(|(upper, _)| upper.clone());
        Stack {
            lowers: upper.chain(self.lowers.iter().cloned()).collect(),
            upper: None,
        }
    }

    /// A merge of `layers` (topmost first) that only reads. The kernel wants at least two.
    #[must_use]
    pub fn of(layers: &[&Path]) -> Stack {
        Stack {
            lowers: layers.iter().map(|path| path.to_path_buf()).collect(),
            upper: None,
        }
    }
}

/// A mounted overlay; dropping it unmounts it, lazily as a last resort.
#[derive(Debug)]
pub struct Overlay {
    place: PathBuf,
    daemon: Option<Child>,
}

impl Overlay {
    /// Mounts `stack` with the program under test, in the foreground so that its end is seen.
    #[track_caller]
    #[must_use]
    pub fn cowlfs(stack: &Stack, place: &Path, extra: &str) -> Overlay {
        Overlay::cowlfs_at(&crate::programs::cowlfs(), stack, place, extra)
    }

    /// The same with the program at `program`.
    #[track_caller]
    #[must_use]
    pub fn cowlfs_at(program: &Path, stack: &Stack, place: &Path, extra: &str) -> Overlay {
        Overlay::started(Command::new(program).arg("-f"), stack, place, extra)
    }

    /// Mounts `stack` with the program under test, which writes to the file `log` what the kernel asks it.
    #[track_caller]
    #[must_use]
    pub fn cowlfs_logging(stack: &Stack, place: &Path, extra: &str, log: &Path) -> Overlay {
        let log = std::fs::File::create(log).expect("the log");
        let mut program = Command::new(crate::programs::cowlfs());
        Overlay::started(program.arg("-d").stderr(log), stack, place, extra)
    }

    #[track_caller]
    fn started(program: &mut Command, stack: &Stack, place: &Path, extra: &str) -> Overlay {
        let mut daemon = program
            .arg("-o")
            .arg(stack.options(extra))
            .arg(place)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {program:?}: {error}"));
        wait_until("the mount", || {
            if let Some(status) = daemon.try_wait().expect("waiting for the daemon") {
                panic!("{program:?} ended instead of mounting: {status}");
            }
            at(place).is_some_and(|mounted| mounted.kind.starts_with("fuse"))
        });
        Overlay {
            place: place.to_owned(),
            daemon: Some(daemon),
        }
    }

    /// Mounts `stack` with the kernel's overlayfs, whose marks ours must agree with.
    #[track_caller]
    #[must_use]
    pub fn kernel(stack: &Stack, place: &Path) -> Overlay {
        Overlay::kernel_with(stack, place, "index=off,xino=off")
    }

    /// The same with more options.
    #[track_caller]
    #[must_use]
    pub fn kernel_with(stack: &Stack, place: &Path, extra: &str) -> Overlay {
        let options = stack.options(&format!("redirect_dir=on,metacopy=on,{extra}"));
        let args = [
            OsStr::new("-t"),
            "overlay".as_ref(),
            "overlay".as_ref(),
            "-o".as_ref(),
        ];
        // A process that starts in a mount namespace of its own, as daemons do, holds copies of all mounts for a
        // moment: for the kernel, an upper that was unmounted just now is then still in use.
        let mount = || {
            let places: [&OsStr; 2] = [options.as_ref(), place.as_ref()];
            crate::command::run("mount", args.into_iter().chain(places))
        };
        let mut mounted = mount();
        wait_until("the upper to be free", || {
            let busy = mounted.err().contains("busy");
            if busy {
                mounted = mount();
            }
            !busy
        });
        mounted.ok();
        Overlay {
            place: place.to_owned(),
            daemon: None,
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place
    }

    /// The daemon's process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.daemon.as_ref().map(Child::id)
    }

    /// Unmounts as a user would, and waits for the daemon, which must end well.
    #[track_caller]
    pub fn unmount(self) {
        unmount_free(&self.place);
        self.ended();
    }

    /// Waits until the daemon has ended, which it must do well.
    #[track_caller]
    pub fn ended(mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let mut status = None;
            wait_until("the daemon's end", || {
                status = daemon.try_wait().expect("waiting for the daemon");
                status.is_some()
            });
            assert!(
                status.is_some_and(|status| status.success()),
                "the daemon failed: {status:?}"
            );
        }
    }

    /// Kills the daemon (SIGKILL) and takes the dead mount away.
    #[track_caller]
    pub fn kill(mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().expect("killing the daemon");
            daemon.wait().expect("waiting for the daemon");
        }
        detach(&self.place).expect("unmounting a dead mount");
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if at(&self.place).is_some()
            && let Err(error) = detach(&self.place)
        {
            eprintln!("cannot unmount {}: {error}", self.place.display());
        }
        if let Some(mut daemon) = self.daemon.take() {
            let start = Instant::now();
            while matches!(daemon.try_wait(), Ok(None)) {
                if start.elapsed() > Duration::from_secs(5) {
                    eprintln!("the daemon of {} did not end; killed", self.place.display());
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

/// Bytes of a path.
#[must_use]
pub fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read() {
        let line = b"36 35 98:0 /mnt1 /mnt/a\\040b-c rw,noatime master:1 - fuse.cowlfs cowl rw,x=1";
        let mounted = parse(line).unwrap();
        assert_eq!(mounted.place, Path::new("/mnt/a b-c"));
        assert_eq!(mounted.kind, "fuse.cowlfs");
        assert_eq!(mounted.source, "cowl");
        assert_eq!(mounted.options, "rw,noatime,rw,x=1");
        assert_eq!(parse(b""), None);
    }
}
