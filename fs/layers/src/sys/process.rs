//! The daemon's process (fork to the background, limits, memory), and /proc/PID/status of other processes.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::unistd::{ForkResult, fork};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::{CapabilitySet, capabilities};
use rustix::time::{ClockId, clock_gettime};

use crate::error::{Errno, Result};

/// The child's end of the pipe on which it reports to its parent whether the mount succeeded.
#[derive(Debug)]
pub struct ReadyPipe {
    pipe: File,
    /// Replaces the terminal. It is opened before the mount, so that its absence prevents the mount.
    null: OwnedFd,
}

/// The result of a fork to the background.
#[derive(Debug)]
pub enum Background {
    /// This is the original process. The text is empty if the child is ready, otherwise its error message.
    Parent(String),
    /// This is the daemon.
    Child(ReadyPipe),
}

/// Forks. In the parent, waits until the child reports that it is ready, or an error.
///
/// To be called before the process has a second thread.
pub fn to_background() -> io::Result<Background> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let null = rustix::fs::openat(CWD, "/dev/null", flags, Mode::empty())
        .map_err(|error| io::Error::new(error.kind(), format!("cannot open /dev/null: {error}")))?;
    let (reader, writer): (OwnedFd, OwnedFd) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    // SAFETY: the process has one thread (main calls this first), so the child inherits no lock or other state of a
    // thread that does not exist in it.
    match unsafe { fork() }.map_err(io::Error::from)? {
        ForkResult::Parent { .. } => {
            drop(writer);
            let mut text = Vec::new();
            File::from(reader).read_to_end(&mut text)?;
            Ok(Background::Parent(match text.split_first() {
                // A daemon that was killed directly after the report is succeeded by one that reports again.
                Some((b'+', rest)) if rest.iter().all(|byte| *byte == b'+') => String::new(),
                Some((b'-', error)) => {
                    String::from_utf8(error.to_vec()).map_err(io::Error::other)?
                }
                _ => "the daemon ended before it was ready".into(),
            }))
        }
        ForkResult::Child => {
            drop(reader);
            rustix::process::setsid()?;
            let pipe = File::from(writer);
            Ok(Background::Child(ReadyPipe { pipe, null }))
        }
    }
}

impl ReadyPipe {
    /// Reports to the parent that the file system is mounted, and releases the terminal and the working directory.
    pub fn ready(mut self) -> io::Result<()> {
        self.detach()?;
        self.pipe.write_all(b"+")
    }

    /// Releases the terminal, the working directory and the pipe, on which another process reports.
    pub fn release(self) -> io::Result<()> {
        self.detach()
    }

    fn detach(&self) -> io::Result<()> {
        rustix::process::chdir("/")?;
        rustix::stdio::dup2_stdin(&self.null)?;
        rustix::stdio::dup2_stdout(&self.null)?;
        rustix::stdio::dup2_stderr(&self.null)?;
        Ok(())
    }

    /// Reports to the parent that the mount failed.
    pub fn failed(mut self, error: &str) -> io::Result<()> {
        self.pipe.write_all(b"-")?;
        self.pipe.write_all(error.as_bytes())
    }
}

/// Ends the process at once: without destructors, exit handlers, or buffered output.
pub fn end_now() -> ! {
    // SAFETY: _exit(2) does not return, and runs no code of this process.
    unsafe { libc::_exit(0) }
}

/// Whether /proc is mounted, for the pid namespace of this process.
pub fn has_proc() -> bool {
    rustix::fs::stat("/proc/self/fd").is_ok()
}

/// Whether a read of the descriptor would not block. It may still fail.
pub fn is_readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())) != Ok(0)
}

/// Returns the child of a process that runs the same program with the same arguments; the process itself if there is none.
///
/// For a keeper that is its daemon.
pub fn same_program_below(pid: u32) -> u32 {
    let line = |pid: u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let own = line(pid);
    let mut children = children
        .split_whitespace()
        .filter_map(|child| child.parse().ok());
    let same = children.find(|child| !own.is_empty() && line(*child) == own);
    same.unwrap_or(pid)
}

/// Returns the seconds since the machine started, without those that it was suspended; the same in all processes.
pub fn uptime_seconds() -> u32 {
    u32::try_from(clock_gettime(ClockId::Monotonic).tv_sec).unwrap_or(u32::MAX)
}

/// Returns the time of the monotonic clock, which is the same in all processes.
pub fn monotonic_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

/// Returns the CPU time that this process has used.
pub fn cpu_time() -> Duration {
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(spent).unwrap_or_default()
}

/// Returns freed memory to the kernel (malloc_trim(3)).
///
/// Otherwise glibc's allocator retains it, and the memory that a walk over a large tree used stays allocated for the
/// lifetime of the mount.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number, and accesses only the allocator's free lists, under its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether a process is stopped, by SIGSTOP for example.
pub fn is_stopped(pid: u32) -> bool {
    inspect(pid).is_some_and(|process| matches!(process.state, 'T' | 't'))
}

/// Gives this process the name of its program, which it lacks if it was started through a link in /proc.
pub fn take_name_of_program() {
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default();
    // The kernel cuts a name that is too long. An argument contains no zero byte.
    let named = std::ffi::CString::new(name.as_encoded_bytes())
        .is_ok_and(|name| rustix::thread::set_name(&name).is_ok());
    if !named {
        log::debug!("the process has no name");
    }
}

/// Returns the anonymous memory of this process in bytes (RssAnon), which excludes shared pages such as program text.
pub fn own_memory() -> Result<u64> {
    let status = status(std::process::id())?.unwrap_or_default();
    Ok(parse_own_memory(&status).unwrap_or(0))
}

fn parse_own_memory(status: &[u8]) -> Option<u64> {
    let kilobytes = parse_line(status, b"RssAnon:")?.strip_suffix("kB")?;
    Some(kilobytes.trim().parse::<u64>().ok()? << 10)
}

/// Returns the supplementary groups of a thread; empty if it has ended or is in an invisible pid namespace.
///
/// The groups of a request's caller cannot change during the request, because the thread waits for the reply.
pub fn groups(pid: u32) -> Result<Vec<u32>> {
    Ok(status(pid)?.map_or_else(Vec::new, |status| parse_groups(&status)))
}

/// Whether a thread in the daemon's user namespace has a capability.
///
/// Returns `None` if it is in another user namespace, has ended, or is in an invisible pid namespace.
pub fn has_capability(pid: u32, which: CapabilitySet) -> Result<Option<bool>> {
    let Some(status) = status(pid)? else {
        return Ok(None);
    };
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user"));
    match (namespace("self"), namespace(&pid.to_string())) {
        (Ok(own), Ok(other)) if own == other => {}
        // In another user namespace the capability does not apply. An unreadable link is treated in the same way.
        _ => return Ok(None),
    }
    let held = parse_line(&status, b"CapEff:").and_then(|text| u64::from_str_radix(text, 16).ok());
    Ok(held.map(|bits| CapabilitySet::from_bits_retain(bits).contains(which)))
}

/// The signal that requests a daemon to check whether its mount is still in use.
pub const CHECK: nix::sys::signal::Signal = nix::sys::signal::Signal::SIGUSR2;

/// Sends [`CHECK`] to a process that has blocked the signal, and reports whether it was sent.
///
/// Daemons block it and read it synchronously. It would kill a process that does not handle it.
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

/// The state of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessState {
    /// The state code of proc_pid_status(5), such as 'T' for stopped.
    pub state: char,
    /// Whether it is dead or has SIGKILL pending. It executes no more code, even if the kernel has not reaped it yet.
    pub killed: bool,
}

/// Inspects a process; `None` if it has ended or is in an invisible pid namespace.
pub fn inspect(pid: u32) -> Option<ProcessState> {
    parse_state(&status(pid).ok()??)
}

/// Whether no process has this id; `false` if that is unknown.
pub fn is_gone(pid: u32) -> bool {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(Errno::SRCH))
}

/// Whether a process has a thread whose name begins like this.
pub fn has_thread(pid: u32, name: &str) -> bool {
    let mut threads = super::users::threads(pid).into_iter();
    threads.any(|thread| {
        let comm = std::fs::read(format!("/proc/{pid}/task/{thread}/comm"));
        // The thread has ended.
        comm.is_ok_and(|comm| comm.starts_with(name.as_bytes()))
    })
}

fn parse_state(status: &[u8]) -> Option<ProcessState> {
    let state = parse_line(status, b"State:")?.chars().next()?;
    let pending = |label: &[u8]| {
        let set = parse_line(status, label).and_then(|set| u64::from_str_radix(set, 16).ok());
        set.is_some_and(|set| set & (1 << (libc::SIGKILL - 1)) != 0)
    };
    let killed = matches!(state, 'Z' | 'X') || pending(b"SigPnd:") || pending(b"ShdPnd:");
    Some(ProcessState { state, killed })
}

/// Reads /proc/PID/status of a thread; `None` if it has ended or is in an invisible pid namespace.
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

/// Returns the rest of the line that begins with `label`.
///
/// A process cannot inject lines through its command name: the kernel escapes newlines in it.
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
    fn killed_process_is_detected() {
        let seen = |state: &str, pending: &str| {
            let status = format!("Name:\tx\nState:\t{state}\nSigPnd:\t{pending}\nShdPnd:\t0\n");
            parse_state(status.as_bytes()).unwrap()
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
    fn threads_are_found_by_name() {
        let pid = std::process::id();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let named = std::thread::Builder::new().name("odd-name-1".to_owned());
        let thread = named.spawn(move || ended.recv().is_err()).unwrap();
        while !has_thread(pid, "odd-name") {
            std::thread::yield_now();
        }
        drop(end);
        assert!(thread.join().unwrap());
        assert!(!has_thread(u32::MAX, "odd-name"));
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
