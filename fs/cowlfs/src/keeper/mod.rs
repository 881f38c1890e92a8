//! The keeper: a process that holds what a mount consists of (the device, the layers with their locks, the ledger, the
//! control socket), and starts a new daemon if the daemon is killed (docs/decisions/0035).
//!
//! It is the process that was started. It forks the daemon after the mount was attached, while it still has a single
//! thread, and waits for its end. A successor is forked in the same way, so it needs neither the program file nor the
//! options again.

mod custody;
mod failures;
mod message;
mod replacement;
mod watch;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cowl_layers::layer::InheritedLayer;
use cowl_layers::sys::child::{self, Child, Ended, Forked};
use cowl_layers::sys::crash::CrashRecord;
use cowl_overlay::{Estate, LedgerError};
pub(crate) use custody::Custody;
pub use failures::GiveUp;
pub(crate) use replacement::{PROCEED, permit, report_serves};

use crate::choices::Supervision;
use failures::{End, Failures};
use libc::SIGKILL;
use message::{Incoming, Message};
use replacement::Replacement;
use watch::{Watched, pause_and_watch, watch};

/// A moment in the life of a keeper, at which [`start`] calls back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// A daemon serves: what only the start needs can be released.
    Serving,
    /// The mount ends, and this process exits.
    GivenUp(GiveUp),
}

/// The process that returns from [`start`], which is never the keeper.
#[derive(Debug)]
pub(crate) enum Turn {
    /// The first daemon.
    First(Arc<Custody>),
    /// A successor of a daemon that was killed.
    Successor(Arc<Custody>, Box<Legacy>),
}

/// The legacy that the keeper holds for a successor.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    /// The ledger of the last daemon.
    pub(crate) ledger: Option<OwnedFd>,
    /// The layers by their ids.
    pub(crate) layers: HashMap<u64, InheritedLayer>,
    /// The descriptors in custody.
    pub(crate) descriptors: HashMap<u64, Arc<OwnedFd>>,
    /// Whether any daemon has reported that it serves the mount.
    pub(crate) was_serving: bool,
}

impl Legacy {
    fn take(
        &mut self,
        message: Message,
        mut descriptors: Vec<OwnedFd>,
    ) -> cowl_layers::error::Result<()> {
        match message {
            Message::Ledger => self.ledger = descriptors.pop(),
            Message::Serving | Message::Replaced => {}
            Message::Deposit(number) => {
                if let Some(descriptor) = descriptors.pop() {
                    self.descriptors.insert(number, Arc::new(descriptor));
                }
            }
            Message::Release(number) => {
                self.descriptors.remove(&number);
            }
            Message::Layer(traits) => {
                let mut descriptors = descriptors.into_iter();
                if let Some(root) = descriptors.next() {
                    let layer = InheritedLayer::new(&traits, root, descriptors.next())?;
                    // An upper layer that was frozen is sent again as a lower one; it must not be unlocked.
                    if let Some(before) = self.layers.insert(layer.layer.id(), layer) {
                        std::mem::forget(before);
                    }
                }
            }
            Message::Layers(ids) => self.layers.retain(|id, _| ids.contains(id)),
            Message::Ended => {
                // The daemon has released the locks.
                self.layers.clear();
                self.descriptors.clear();
            }
        }
        Ok(())
    }

    /// Whether the last daemon answered a request; `None` if it had not recorded its state yet, so that its successor
    /// continues from an earlier one, or is the first one again.
    fn has_answered(&self, is_recorded: bool) -> Option<Result<bool, LedgerError>> {
        let ledger = self.ledger.as_ref().filter(|_| is_recorded);
        ledger.map(has_answered)
    }

    /// Returns a copy of the layers for a successor.
    fn copy(&self) -> cowl_layers::error::Result<Self> {
        let mut layers = HashMap::new();
        for (id, layer) in &self.layers {
            layers.insert(*id, layer.try_clone()?);
        }
        let ledger = match &self.ledger {
            Some(ledger) => Some(cowl_layers::sys::dir::duplicate(std::os::fd::AsFd::as_fd(
                ledger,
            ))?),
            None => None,
        };
        Ok(Self {
            ledger,
            layers,
            descriptors: self.descriptors.clone(),
            was_serving: self.was_serving,
        })
    }
}

/// Forks the daemon and, in the original process, becomes its keeper. Returns only in a daemon.
///
/// `notify` runs in the keeper. The process must have a single thread.
pub(crate) fn start(
    supervision: Supervision,
    crashes: CrashRecord,
    mut notify: impl FnMut(Notice),
) -> io::Result<Turn> {
    let own = std::process::id();
    let (keeper, daemon) = message::pair()?;
    let mut running = match child::fork_daemon()? {
        Forked::Child => {
            drop(keeper);
            return Ok(Turn::First(Custody::new(daemon, own)));
        }
        Forked::Parent(child) => child,
    };
    drop(daemon);
    let mut socket = keeper;
    let mut legacy = Legacy::default();
    let mut failures = Failures::new(crashes);
    let mut incoming = Incoming::new();
    loop {
        let (life, ended) = watch_daemon((&socket, &running), &mut legacy, &mut incoming, || {
            notify(Notice::Serving);
        })?;
        let mut give_up = |reason: GiveUp| -> ! {
            log::error!("the mount ends: {reason}");
            notify(Notice::GivenUp(reason));
            child::exit_at_once(1)
        };
        let Life {
            is_serving,
            has_ended,
            is_recorded,
            replacement,
        } = life;
        let signal = match (replacement, ended) {
            (Ok(Some(other)), _) if other.is_serving() => other.end(supervision),
            // The daemon has stopped for a process that has ended since.
            (Ok(Some(_)) | Err(Abandoned), _) => SIGKILL,
            // A successor that cannot continue has reported the reason in the log.
            (Ok(None), Ended::Exited(code)) if code != 0 && legacy.was_serving && !is_serving => {
                give_up(GiveUp::Unusable)
            }
            (Ok(None), Ended::Exited(code)) => child::exit_at_once(code),
            (Ok(None), Ended::Killed(_)) if has_ended => child::exit_at_once(0),
            (Ok(None), Ended::Killed(signal)) => signal,
        };
        legacy.was_serving |= is_serving;
        let end = End {
            has_answered: legacy.has_answered(is_recorded),
            is_serving,
            signal,
        };
        let pause = failures.note(end).unwrap_or_else(|reason| give_up(reason));
        log::warn!("the daemon was killed by {signal}: starting another one");
        std::thread::sleep(pause);
        let (keeper, daemon) = message::pair()?;
        match child::fork_daemon()? {
            Forked::Child => {
                drop(keeper);
                drop(socket);
                if legacy.ledger.is_none() {
                    std::mem::forget(legacy);
                    return Ok(Turn::First(Custody::new(daemon, own)));
                }
                let copy = legacy.copy();
                // Dropping them would release the locks.
                std::mem::forget(legacy);
                let copy = copy.map_err(io::Error::other)?;
                return Ok(Turn::Successor(Custody::new(daemon, own), Box::new(copy)));
            }
            Forked::Parent(next) => running = next,
        }
        drop(daemon);
        socket = keeper;
    }
}

/// Receives the reports of a daemon until its end. `kept` runs when it serves.
fn watch_daemon(
    (socket, daemon): (&OwnedFd, &Child),
    legacy: &mut Legacy,
    incoming: &mut Incoming,
    mut kept: impl FnMut(),
) -> io::Result<(Life, Ended)> {
    let mut life = Life::default();
    let mut receive = || -> io::Result<()> {
        while let Some((message, descriptors)) = incoming.receive(socket)? {
            let is_report = message == Message::Serving;
            life.note(legacy, message, descriptors);
            if is_report {
                kept();
            }
        }
        Ok(())
    };
    let mut wait: fn(&OwnedFd, &Child) -> io::Result<Watched> = watch;
    let ended = loop {
        match wait(socket, daemon)? {
            Watched::Message => {
                wait = pause_and_watch;
                receive()?;
            }
            Watched::Signal(signal) => daemon.signal(signal),
            Watched::Ended(ended) => break ended,
        }
    };
    // Also the report of a daemon that was killed directly after it: its successor, which is forked afterwards, must not
    // hold what `kept` releases.
    if let Err(error) = receive() {
        log::debug!("the connection to the daemon has ended: {error}");
    }
    Ok((life, ended))
}

/// The reports of one daemon to its keeper.
struct Life {
    is_serving: bool,
    /// Whether the mount has ended.
    has_ended: bool,
    /// Whether it has handed its ledger over.
    is_recorded: bool,
    /// The process that takes over from it.
    replacement: Result<Option<Replacement>, Abandoned>,
}

/// The process for which a daemon has stopped had ended before it was permitted to take over.
struct Abandoned;

impl Default for Life {
    fn default() -> Self {
        Self {
            is_serving: false,
            has_ended: false,
            is_recorded: false,
            replacement: Ok(None),
        }
    }
}

impl Life {
    fn note(&mut self, legacy: &mut Legacy, message: Message, mut descriptors: Vec<OwnedFd>) {
        self.is_serving |= message == Message::Serving;
        self.has_ended |= message == Message::Ended;
        self.is_recorded |= message == Message::Ledger;
        if message == Message::Replaced {
            let begun = descriptors.pop().map(Replacement::begin);
            self.replacement = match begun {
                Some(Ok(replacement)) => Ok(Some(replacement)),
                Some(Err(error)) => {
                    log::warn!("the process that takes over has ended: {error}");
                    Err(Abandoned)
                }
                None => Err(Abandoned),
            };
            return;
        }
        if let Err(error) = legacy.take(message, descriptors) {
            log::error!("the keeper cannot hold a layer: {error}");
        }
    }
}

/// Whether the writer of a ledger answered a request.
fn has_answered(ledger: &OwnedFd) -> Result<bool, LedgerError> {
    let copy = ledger.try_clone().map_err(|error| {
        let errno = cowl_layers::error::Errno::from_io_error(&error);
        LedgerError::Io(errno.unwrap_or(cowl_layers::error::Errno::IO).into())
    })?;
    Estate::has_answered(copy)
}
