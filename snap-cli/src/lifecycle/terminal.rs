//! A terminal of its own for a command that must not have that of the caller, and the relay between both.
//!
//! A program that has a descriptor of the caller's terminal can read what the caller types later, also after the command
//! has ended: it only has to outlive the command.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::process::Stdio;

use cowl_layers::sys::child::BlockedSignals;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{
    OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

/// The longest piece that is relayed at once.
const PIECE: usize = 4096;

/// A terminal for a command.
#[derive(Debug)]
pub(super) struct Terminal {
    /// The side of this process.
    own: OwnedFd,
    /// The side of the command, until it was started.
    theirs: Option<OwnedFd>,
    /// Whether the standard input, output and error of this process are terminals.
    is_terminal: [bool; 3],
    /// The mode of the caller's terminal, if the input is read from it.
    mode: Option<Termios>,
}

fn streams() -> [BorrowedFd<'static>; 3] {
    [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ]
}

/// Returns a standard stream of this process that is a terminal.
pub(super) fn standard_terminal() -> Option<BorrowedFd<'static>> {
    streams().into_iter().find(|stream| isatty(stream))
}

impl Terminal {
    /// Opens a terminal for a command whose user and group are `owner`. `None` if no standard stream of this process is a
    /// terminal.
    pub(super) fn open(owner: (u32, u32)) -> io::Result<Option<Self>> {
        let is_terminal = streams().map(isatty);
        let Some(caller) = standard_terminal() else {
            return Ok(None);
        };
        let own = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&own)?;
        unlockpt(&own)?;
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let path = ptsname(&own, Vec::new())?;
        let theirs = rustix::fs::openat(CWD, path.as_c_str(), flags, Mode::empty())?;
        fchown(&theirs, Some(owner.0), Some(owner.1))?;
        let mode = tcgetattr(caller)?;
        tcsetattr(&theirs, OptionalActions::Now, &mode)?;
        rustix::io::ioctl_fionbio(&own, true)?;
        let terminal = Self {
            own,
            theirs: Some(theirs),
            is_terminal,
            mode: None,
        };
        terminal.resize()?;
        Ok(Some(terminal))
    }

    /// Returns the standard streams of the command: this terminal in place of the caller's.
    pub(super) fn stdio(&self) -> io::Result<[Stdio; 3]> {
        let mut all = [Stdio::inherit(), Stdio::inherit(), Stdio::inherit()];
        for (stream, is_terminal) in all.iter_mut().zip(self.is_terminal) {
            if let (true, Some(theirs)) = (is_terminal, &self.theirs) {
                *stream = theirs.try_clone()?.into();
            }
        }
        Ok(all)
    }

    /// Gives the terminal the size of the caller's.
    fn resize(&self) -> io::Result<()> {
        if let Some(caller) = standard_terminal() {
            tcsetwinsize(&self.own, tcgetwinsize(caller)?)?;
        }
        Ok(())
    }

    /// Relays between the caller's terminal and this one, until `ended` is readable: the command was started and has
    /// ended. `forward` sends a signal to it.
    pub(super) fn relay(
        mut self,
        ended: BorrowedFd<'_>,
        signals: &BlockedSignals,
        forward: impl Fn(i32),
    ) -> io::Result<()> {
        self.theirs = None;
        let [reads, ..] = self.is_terminal;
        if reads {
            let mode = tcgetattr(rustix::stdio::stdin())?;
            let mut raw = mode.clone();
            raw.make_raw();
            // Restored when this value is dropped.
            self.mode = Some(mode);
            tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        }
        let mut typed = Vec::new();
        let mut is_open = reads;
        loop {
            let wanted = match typed.is_empty() {
                true => PollFlags::IN,
                false => PollFlags::IN | PollFlags::OUT,
            };
            let mut polled = vec![
                PollFd::from_borrowed_fd(ended, PollFlags::IN),
                PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
                PollFd::new(&self.own, wanted),
            ];
            // A terminal that has hung up is always ready.
            if is_open && typed.is_empty() {
                polled.push(PollFd::from_borrowed_fd(
                    rustix::stdio::stdin(),
                    PollFlags::IN,
                ));
            }
            match poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let found = |index: usize| {
                polled
                    .get(index)
                    .map_or(PollFlags::empty(), PollFd::revents)
            };
            let [end, signal, own, input] = [0, 1, 2, 3].map(found);
            if signal.contains(PollFlags::IN) {
                self.handle_signals(signals, &forward)?;
            }
            if own.contains(PollFlags::IN) {
                self.show()?;
            }
            if own.contains(PollFlags::OUT) {
                self.pass(&mut typed)?;
            }
            if !input.is_empty() {
                is_open = read_into(&mut typed)?;
            }
            if end.contains(PollFlags::IN) {
                // What the command has written last.
                while self.show()? {}
                return Ok(());
            }
            if own.contains(PollFlags::HUP) && !own.contains(PollFlags::IN) {
                // No program has the terminal open at the moment.
                let pause = Timespec {
                    tv_sec: 0,
                    tv_nsec: 20_000_000,
                };
                let mut polled = [PollFd::from_borrowed_fd(ended, PollFlags::IN)];
                poll(&mut polled, Some(&pause)).or_else(|error| match error {
                    Errno::INTR => Ok(0),
                    error => Err(error),
                })?;
            }
        }
    }

    fn handle_signals(&self, signals: &BlockedSignals, forward: &impl Fn(i32)) -> io::Result<()> {
        while let Some(signal) = signals.next()? {
            match signal == nix::sys::signal::Signal::SIGWINCH as i32 {
                true => self.resize()?,
                false => forward(signal),
            }
        }
        Ok(())
    }

    /// Writes a piece of what the command has written to the caller's terminal. Returns whether there was any.
    fn show(&self) -> io::Result<bool> {
        let mut piece = [0; PIECE];
        let count = match rustix::io::read(&self.own, &mut piece) {
            Ok(count) => count,
            // EIO: no program has the terminal open.
            Err(Errno::AGAIN | Errno::IO | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let [_, out, _] = self.is_terminal;
        let target = match out {
            true => rustix::stdio::stdout(),
            false => standard_terminal().unwrap_or(rustix::stdio::stderr()),
        };
        let mut rest = piece.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            match rustix::io::write(target, rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut polled = [PollFd::from_borrowed_fd(target, PollFlags::OUT)];
                    poll(&mut polled, None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(count > 0)
    }

    /// Passes what was typed to the command, as much as its terminal accepts.
    fn pass(&self, typed: &mut Vec<u8>) -> io::Result<()> {
        match rustix::io::write(&self.own, typed) {
            Ok(written) => {
                typed.drain(..written);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Reads what was typed. Returns whether there can be more.
fn read_into(typed: &mut Vec<u8>) -> io::Result<bool> {
    let mut piece = [0; PIECE];
    match rustix::io::read(rustix::stdio::stdin(), &mut piece) {
        // The caller's terminal has ended.
        Ok(0) | Err(Errno::IO) => Ok(false),
        Ok(count) => {
            typed.extend(piece.iter().take(count));
            Ok(true)
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(mode) = &self.mode
            && let Err(error) = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, mode)
        {
            log::warn!("cannot restore the mode of the terminal: {error}");
        }
    }
}
