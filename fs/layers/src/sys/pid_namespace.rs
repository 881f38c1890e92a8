//! A pid namespace for one command: its processes neither see nor signal others, and end with the command.
//!
//! Three processes take part. The outer one remains in the namespace of its caller, and waits. The first process in the
//! new namespace is its init: it starts the command, forwards signals, and reaps orphans. When it ends, the kernel kills
//! all other processes of the namespace.
#![allow(unsafe_code)]

use std::io;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open, set_parent_process_death_signal};

use super::child::{BlockedSignals, Child, Ended, Forked, exit_at_once, fork_daemon};

/// The signals that are forwarded to the command.
const FORWARDED: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGHUP,
];
/// The exit code if the end of the command is unknown.
const UNKNOWN: i32 = 125;

/// The init of a new pid namespace: this process.
#[derive(Debug)]
pub struct Init(());

/// Creates a pid namespace, and continues as its init.
///
/// The original process does not return: it forwards signals, and ends with the code of the init. If it is killed, the
/// kernel kills the init. The process must have a single thread, and be privileged in its user namespace.
pub fn enter() -> io::Result<Init> {
    let mut handled = SigSet::empty();
    for signal in FORWARDED {
        handled.add(signal);
    }
    handled.thread_block()?;
    // A caller may have set it to ignored. Then no exit code could be read.
    // SAFETY: the default action runs no code of this process.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    end_with_parent()?;
    let outer = pidfd_open(getpid(), PidfdFlags::empty())?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    match fork_daemon()? {
        Forked::Parent(init) => exit_at_once(wait_for(&init)?),
        Forked::Child => {
            set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // The parent may have been killed before that.
            let mut polled = [PollFd::new(&outer, PollFlags::IN)];
            if poll(&mut polled, Some(&Timespec::default()))? > 0 {
                exit_at_once(UNKNOWN);
            }
            Ok(Init(()))
        }
    }
}

/// Makes the kernel kill this process when its parent ends.
fn end_with_parent() -> io::Result<()> {
    let parent = rustix::process::getppid();
    set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    match rustix::process::getppid() == parent {
        true => Ok(()),
        false => Err(io::Error::other("the parent of this process has ended")),
    }
}

/// Waits for the init, forwards signals to it, and returns its exit code.
fn wait_for(init: &Child) -> io::Result<i32> {
    let signals = BlockedSignals::receive()?;
    loop {
        let mut polled = [
            PollFd::new(init, PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
        ];
        match poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let [ended, signal] = polled.map(|one| !one.revents().is_empty());
        if ended {
            return Ok(match init.wait()? {
                Ended::Exited(code) => code,
                Ended::Killed(signal) => 128 + signal,
            });
        }
        if signal
            && let Some(signal) = signals.next()?
            && FORWARDED
                .iter()
                .any(|forwarded| *forwarded as i32 == signal)
        {
            init.signal(signal);
        }
    }
}

impl Init {
    /// Starts the command: returns in a new process, which is to execute it.
    ///
    /// This process does not return: it ends when the command ends, with its exit code, or with 128 plus the number of
    /// the signal that ended it.
    pub fn start_command(self) -> io::Result<()> {
        let mut handled = SigSet::empty();
        for signal in FORWARDED {
            handled.add(signal);
        }
        handled.add(Signal::SIGCHLD);
        handled.thread_block()?;
        // SAFETY: this process was forked from one with a single thread, and has started none, so the child inherits no
        // lock or other state of a thread that does not exist in it.
        match unsafe { fork() }? {
            ForkResult::Child => Ok(()),
            ForkResult::Parent { child } => exit_at_once(serve(child, &handled)),
        }
    }
}

/// Forwards signals to the command and reaps all processes, until the command ends.
fn serve(command: Pid, handled: &SigSet) -> i32 {
    loop {
        match handled.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(code) = reap(command) {
                    return code;
                }
            }
            Ok(signal) if FORWARDED.contains(&signal) => {
                if let Err(error) = kill(command, signal) {
                    log::warn!("cannot forward {signal}: {error}");
                }
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                log::error!("cannot wait for signals: {error}");
                return UNKNOWN;
            }
        }
    }
}

/// Reaps all processes that have ended; returns the exit code of the command if it is among them.
fn reap(command: Pid) -> Option<i32> {
    let mut code = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, status)) if pid == command => code = Some(status),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => {
                code = Some(128 + signal as i32);
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return code,
            Ok(_) | Err(Errno::EINTR) => {}
            // nix has no value for a realtime signal, which has ended the command or an orphan.
            Err(error) if kill(command, None) == Err(Errno::ESRCH) => {
                log::debug!("the signal that ended the command is unknown: {error}");
                return code.or(Some(UNKNOWN));
            }
            Err(_) => {}
        }
    }
}
