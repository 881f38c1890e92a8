//! A daemon that this process forked and watches, and the signals meanwhile.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{ForkResult, fork};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};

/// The result of [`fork_daemon`].
#[derive(Debug)]
pub enum Forked {
    /// This is the new process.
    Child,
    /// This is the original process.
    Parent(Child),
}

/// A child process.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    handle: OwnedFd,
}

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(i32),
    /// It was killed by this signal.
    Killed(i32),
}

/// The time in which a thread that was joined leaves the process.
const LEAVING: Duration = Duration::from_secs(5);

/// Forks. The process must have a single thread; otherwise this fails with EDEADLK.
pub fn fork_daemon() -> io::Result<Forked> {
    // The kernel removes a thread shortly after it could be joined, and later if the process is traced.
    let deadline = Instant::now() + LEAVING;
    while std::fs::read_dir("/proc/self/task")?.count() != 1 {
        if Instant::now() > deadline {
            return Err(io::Error::from(rustix::io::Errno::DEADLK));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: the process has one thread, as was just checked, so the child inherits no lock or other state of a thread
    // that does not exist in it.
    match unsafe { fork() }.map_err(io::Error::from)? {
        ForkResult::Child => Ok(Forked::Child),
        ForkResult::Parent { child } => {
            let pid = Pid::from_raw(child.as_raw()).ok_or(io::ErrorKind::InvalidData)?;
            let handle = pidfd_open(pid, PidfdFlags::empty())?;
            Ok(Forked::Parent(Child { pid, handle }))
        }
    }
}

impl Child {
    /// Sends a signal, if the process still exists.
    pub fn signal(&self, signal: i32) {
        let Some(signal) = rustix::process::Signal::from_named_raw(signal) else {
            return;
        };
        if let Err(error) = pidfd_send_signal(&self.handle, signal) {
            log::debug!("cannot send a signal to the daemon: {error}");
        }
    }

    /// Waits for the end of the process.
    pub fn wait(&self) -> io::Result<Ended> {
        loop {
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) | Ok(None) => {}
                Err(error) => return Err(error.into()),
                Ok(Some((_, status))) => {
                    if let Some(signal) = status.terminating_signal() {
                        return Ok(Ended::Killed(signal));
                    }
                    if let Some(code) = status.exit_status() {
                        return Ok(Ended::Exited(code));
                    }
                }
            }
        }
    }
}

impl AsFd for Child {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// Receives blocked signals as data.
#[derive(Debug)]
pub struct BlockedSignals(SignalFd);

impl BlockedSignals {
    /// Receives those signals that this thread blocks.
    pub fn receive() -> io::Result<Self> {
        let mut blocked = SigSet::thread_get_mask()?;
        // The end of the child is reported by its descriptor.
        blocked.remove(Signal::SIGCHLD);
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&blocked, flags)?))
    }

    /// Returns the next signal, if there is one.
    pub fn next(&self) -> io::Result<Option<i32>> {
        let signal = self.0.read_signal()?;
        Ok(signal.and_then(|signal| i32::try_from(signal.ssi_signo).ok()))
    }
}

impl AsFd for BlockedSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Ends the process once the other end of a connection is closed, with the code 0. Until then it holds nothing open but
/// the connection and its standard streams, and a signal that stops programs ends it.
pub fn outlive(connection: OwnedFd) -> ! {
    let mut handled = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        handled.add(signal);
    }
    if let Err(error) = handled.thread_unblock() {
        log::warn!("signals have no effect on this process: {error}");
    }
    let number = connection.as_raw_fd();
    // SAFETY: the function does not return, and uses no other descriptor than this one from here on. The other threads,
    // of which there are none in a keeper, are the only code that could use a closed one.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, number - 1, 0);
        libc::syscall(libc::SYS_close_range, number + 1, libc::c_uint::MAX, 0);
    }
    loop {
        // Every event but the end of the connection is ignored: nothing is read.
        let mut polled = [PollFd::new(&connection, PollFlags::empty())];
        let found = poll(&mut polled, None);
        let [connection] = polled.map(|one| one.revents());
        if found.is_ok() && connection.intersects(PollFlags::HUP | PollFlags::ERR) {
            exit_at_once(0);
        }
    }
}

/// Ends the process without running destructors, which would release what others continue to use.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: the function has no requirements.
    unsafe { libc::_exit(code) }
}
