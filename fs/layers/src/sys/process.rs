//! The daemon's own process: going to the background, limits.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::unistd::{ForkResult, fork};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, capabilities};
use rustix::time::{ClockId, clock_gettime};

use crate::error::{Errno, Result};

/// The child's end of the pipe on which it tells its parent how the start went.
#[derive(Debug)]
pub struct ReadyPipe(File);

/// Which side of the fork this is.
#[derive(Debug)]
pub enum Background {
    /// The process that was started; the text is empty when the child got ready, else why not.
    Parent(String),
    /// The daemon to be.
    Child(ReadyPipe),
}

/// Forks. The parent waits until the child says that it is ready, or why it can't be.
/// To be called before the process has a second thread.
pub fn to_background() -> io::Result<Background> {
    let (reader, writer): (OwnedFd, OwnedFd) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the process has one thread (main calls this first), so the child has no lock or other
    // state that belonged to a thread which does not exist in it.
    match unsafe { fork() }.map_err(io::Error::from)? {
        ForkResult::Parent { .. } => {
            drop(writer);
            let mut text = Vec::new();
            File::from(reader).read_to_end(&mut text)?;
            Ok(Background::Parent(match text.split_first() {
                Some((b'+', [])) => String::new(),
                Some((b'-', why)) => String::from_utf8(why.to_vec()).map_err(io::Error::other)?,
                _ => "the daemon ended before it was ready".into(),
            }))
        }
        ForkResult::Child => {
            drop(reader);
            rustix::process::setsid()?;
            Ok(Background::Child(ReadyPipe(File::from(writer))))
        }
    }
}

impl ReadyPipe {
    /// Tells the parent that the mount is there, and lets go of the terminal and the folder.
    pub fn ready(mut self) -> io::Result<()> {
        rustix::process::chdir("/")?;
        let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDWR, Mode::empty())?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        self.0.write_all(b"+")
    }

    /// Tells the parent why there will be no mount.
    pub fn failed(mut self, why: &str) -> io::Result<()> {
        self.0.write_all(b"-")?;
        self.0.write_all(why.as_bytes())
    }
}

/// Raises the soft limit of open files to the hard one and returns it.
pub fn raise_open_files() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(_) => limit.current.unwrap_or(u64::MAX),
    }
}

/// Whether a read of this descriptor would come back at once, if only with an error.
pub fn is_readable(fd: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut asked, Some(&Timespec::default())) != Ok(0)
}

/// For how long this process has had CPUs so far.
pub fn cpu_time() -> Duration {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(spent).unwrap_or_default()
}

/// Gives memory that was freed back to the machine: the C library's allocator keeps it otherwise, and a
/// walk over a large tree would cost its memory for as long as the mount lives.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number and touches nothing but the allocator's own free lists, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The memory that this process takes for itself, in bytes: what it shares with other processes, such as
/// the program's text, is left out.
pub fn own_memory() -> Result<u64> {
    let status = status(std::process::id())?.unwrap_or_default();
    Ok(parse_own_memory(&status).unwrap_or(0))
}

fn parse_own_memory(status: &[u8]) -> Option<u64> {
    let kilobytes = parse_line(status, b"RssAnon:")?.strip_suffix("kB")?;
    Some(kilobytes.trim().parse::<u64>().ok()? << 10)
}

/// The supplementary groups of a thread; none of one that is gone or can't be seen from here. They can't
/// change under a request, because the thread that made it waits for the answer.
pub fn groups(pid: u32) -> Result<Vec<u32>> {
    Ok(status(pid)?.map_or_else(Vec::new, |status| parse_groups(&status)))
}

/// Whether a thread in our own user namespace has a capability; `None` of one that is elsewhere, gone or
/// out of sight.
pub fn has_capability(pid: u32, which: CapabilitySet) -> Result<Option<bool>> {
    let Some(status) = status(pid)? else {
        return Ok(None);
    };
    let space = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user"));
    match (space("self"), space(&pid.to_string())) {
        (Ok(ours), Ok(theirs)) if ours == theirs => {}
        // Where its namespace can't be read it is not ours to ask.
        _ => return Ok(None),
    }
    let held = parse_line(&status, b"CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
    Ok(held.map(|bits| CapabilitySet::from_bits_retain(bits).contains(which)))
}

/// The signal by which a daemon is asked to check whether its mount is still in use.
pub const CHECK: nix::sys::signal::Signal = nix::sys::signal::Signal::SIGUSR2;

/// Sends [`CHECK`] to a process, if it is one that waits for it: others would be killed by it.
pub fn ask_to_check(pid: u32) -> Result<bool> {
    let blocked = status(pid)?.and_then(|status| {
        let mask = u64::from_str_radix(parse_line(&status, b"SigBlk:")?, 16).ok()?;
        Some(mask & (1 << (CHECK as u32 - 1)) != 0)
    });
    let Some(raw) = i32::try_from(pid).ok().filter(|pid| *pid > 0) else {
        return Ok(false);
    };
    if blocked == Some(true) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(raw), CHECK)?;
    }
    Ok(blocked == Some(true))
}

/// What can be seen of a process from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its state, as proc(5) names it: 'T' of one that was stopped.
    pub state: char,
    /// It was killed: it does nothing any more, also where the kernel still works on its end.
    pub killed: bool,
}

/// Inspects a process; `None` of one that is gone or can't be seen from here.
pub fn inspect(pid: u32) -> Option<Seen> {
    parse_seen(&status(pid).ok()??)
}

/// Whether there is no process of this id; `false` where that is not known.
pub fn is_gone(pid: u32) -> bool {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(Errno::SRCH))
}

fn parse_seen(status: &[u8]) -> Option<Seen> {
    let state = parse_line(status, b"State:")?.chars().next()?;
    let pending = |label: &[u8]| {
        let set = parse_line(status, label).and_then(|set| u64::from_str_radix(set, 16).ok());
        set.is_some_and(|set| set & (1 << (libc::SIGKILL - 1)) != 0)
    };
    let killed = matches!(state, 'Z' | 'X') || pending(b"SigPnd:") || pending(b"ShdPnd:");
    Some(Seen { state, killed })
}

/// What proc(5)'s status tells of a thread; `None` of one that is gone or can't be seen from here.
fn status(pid: u32) -> Result<Option<Vec<u8>>> {
    if pid == 0 {
        return Ok(None);
    }
    match std::fs::read(format!("/proc/{pid}/status")) {
        Ok(status) => Ok(Some(status)),
        Err(error) => match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
            Errno::NOENT | Errno::SRCH => Ok(None),
            errno => Err(errno.into()),
        },
    }
}

/// What stands behind `label` at the beginning of a line. The name of the program stands above the rest,
/// with line ends escaped, so nobody can put in a line of his own.
fn parse_line<'a>(status: &'a [u8], label: &[u8]) -> Option<&'a str> {
    let mut lines = status.split(|&byte| byte == b'\n');
    let rest = lines.find_map(|line| line.strip_prefix(label))?;
    Some(std::str::from_utf8(rest).ok()?.trim())
}

fn parse_groups(status: &[u8]) -> Vec<u32> {
    let words = parse_line(status, b"Groups:")
        .unwrap_or_default()
        .split_whitespace();
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Whether this process has CAP_SYS_ADMIN in the initial user namespace.
pub fn is_initial_admin() -> bool {
    let admin =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    let initial = std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]));
    admin && initial
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_read() {
        let status =
            b"Name:\tGroups:\\n\nUid:\t1\t1\t1\t1\nGroups:\t4 24 4294967294 \nNStgid:\t1\n";
        assert_eq!(parse_groups(status), [4, 24, 4_294_967_294]);
        assert!(parse_groups(b"Groups:\t \n").is_empty());
        assert!(parse_groups(b"Uid:\t1\n").is_empty());
        assert!(groups(u32::MAX).unwrap().is_empty());
    }

    #[test]
    fn memory_is_read() {
        let status = b"VmRSS:\t    2000 kB\nRssAnon:\t    1536 kB\nRssFile:\t 464 kB\n";
        assert_eq!(parse_own_memory(status), Some(1536 << 10));
        assert_eq!(parse_own_memory(b"RssAnon:\tx kB\n"), None);
        let before = own_memory().unwrap();
        let taken = vec![1_u8; 64 << 20];
        assert!(own_memory().unwrap() >= before + (32 << 20));
        drop(taken);
    }

    #[test]
    fn a_killed_process_is_told_apart() {
        let seen = |state: &str, pending: &str| {
            let status = format!("Name:\tx\nState:\t{state}\nSigPnd:\t{pending}\nShdPnd:\t0\n");
            parse_seen(status.as_bytes()).unwrap()
        };
        for (state, pending, killed) in [
            ("S (sleeping)", "0000000000000000", false),
            ("T (stopped)", "0000000000040000", false),
            ("D (disk sleep)", "0000000000000100", true),
            ("Z (zombie)", "0000000000000000", true),
        ] {
            let found = seen(state, pending);
            assert_eq!(found.killed, killed, "{state}");
            assert!(state.starts_with(found.state));
        }
        assert_eq!(inspect(u32::MAX), None);
    }

    #[test]
    fn capabilities_are_read() {
        let own = capabilities(None).unwrap().effective;
        let pid = std::process::id();
        for which in [CapabilitySet::FSETID, CapabilitySet::SYS_ADMIN] {
            assert_eq!(
                has_capability(pid, which).unwrap(),
                Some(own.contains(which))
            );
        }
        assert_eq!(
            has_capability(u32::MAX, CapabilitySet::FSETID).unwrap(),
            None
        );
        let status = b"Name:\tx\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n";
        assert_eq!(parse_line(status, b"CapEff:"), Some("000001ffffffffff"));
    }
}
