//! The beginning of a daemon's service: the first one's, or that of a successor of one that was killed.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::choices::Keeper;
use crate::config::{Config, LiveLayers};
use crate::fuse::{self, Attached, Negotiated, Predecessor, RecoveredValues, SessionSettings};
use crate::keeper::{self, Custody, GiveUp, Legacy, Notice, Turn};
use cowl_layers::error::Errno;
use cowl_layers::layer::{Layer, Upper, moves};
use cowl_layers::points::{self, point};
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::sys::users::Device;
use cowl_overlay::{Estate, Inheritance, Ledger, Overlay};

/// The number of retries of the completion of a move of files, and the pause before each.
const MOVE_ATTEMPTS: u32 = 5;
const MOVE_PAUSE: std::time::Duration = std::time::Duration::from_millis(400);

/// A moment in the life of a mount, at which [`crate::serve()`] calls back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The file system with this device number is mounted, and this process serves it.
    Mounted(Device),
    /// This process serves it, in the place of one that has handed it over.
    TakenOver(Device),
    /// This process continues to serve it, in the place of one that was killed.
    Continued(Device),
    /// Another process serves it, and this one only waits for its end: it must release what it holds open.
    Kept,
    /// The process that serves it was killed, and no other one can continue. This process exits afterwards.
    GivenUp(GiveUp),
}

/// A mount that was set up, and that no process serves yet.
pub(crate) struct Start {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) attached: Attached,
    /// A descriptor of the device for the keeper.
    pub(crate) kept_device: OwnedFd,
    pub(crate) settings: SessionSettings,
    /// The connection to a predecessor, which has stopped and handed the mount over.
    pub(crate) predecessor: Option<Arc<UnixStream>>,
}

/// A mount that this process is about to serve.
pub(crate) struct Serving {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) attached: Attached,
    pub(crate) custody: Option<Arc<Custody>>,
    pub(crate) begun: Begun,
}

/// The beginning of the service of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The first process of a mount.
    Mounted,
    /// It took over from a process that has handed the mount over.
    TakenOver,
    /// It continues in the place of one that was killed.
    Continued,
}

fn failed(error: impl std::fmt::Display) -> SetupError {
    SetupError::new(
        SetupKind::Host,
        format!("cannot continue to serve the mount: {error}"),
        "",
    )
}

impl Start {
    /// Starts the keeper, if there is to be one. Returns in the process that serves, perhaps several times, each time in
    /// a new process.
    pub(crate) fn begin(
        self,
        config: &Config,
        on: &mut impl FnMut(Event),
    ) -> Result<Serving, SetupError> {
        let negotiated = match self.attached.negotiated() {
            Some(negotiated) if is_wanted(config, &self.overlay, negotiated) => negotiated,
            _ => return self.serve(None),
        };
        let crashes = self.settings.requests.crashes();
        let notify = |notice| {
            on(match notice {
                Notice::Serving => Event::Kept,
                Notice::GivenUp(reason) => Event::GivenUp(reason),
            });
        };
        let turn = keeper::start(config.supervision, crashes, notify).map_err(failed)?;
        if let Err(error) = crashes.watch() {
            log::warn!("a request that ends the process is not recognized: {error}");
        }
        match turn {
            Turn::First(custody) => {
                record(&self.overlay, &self.attached, &custody).map_err(failed)?;
                points::arm();
                self.serve(Some(custody))
            }
            Turn::Successor(custody, legacy) => {
                points::arm();
                // They belong to the first daemon: dropping them would release its locks.
                std::mem::forget((self.overlay.clone(), self.attached));
                let begun = match (legacy.was_serving, &self.predecessor) {
                    (true, _) => Begun::Continued,
                    (false, Some(_)) => Begun::TakenOver,
                    (false, None) => Begun::Mounted,
                };
                let (overlay, values, ledger) =
                    recover(*legacy, config, &self.overlay, &custody).map_err(failed)?;
                let overlay = Arc::new(overlay);
                let attached = fuse::resume(
                    self.kept_device,
                    overlay.clone(),
                    Predecessor::Killed(negotiated, &values, &ledger),
                    &config.mount,
                    &self.settings,
                )
                .map_err(failed)?;
                point("before a recovered ledger");
                custody.hand_over(&ledger).map_err(failed)?;
                point("before requests are sent again");
                if let Some(connection) = &self.predecessor {
                    keeper::report_serves(connection);
                }
                attached.resend().map_err(failed)?;
                point("after requests are sent again");
                Ok(Serving {
                    overlay,
                    attached,
                    custody: Some(custody),
                    begun,
                })
            }
        }
    }

    /// Returns the mount for this process, which is its first daemon or continues from one that has stopped.
    fn serve(self, custody: Option<Arc<Custody>>) -> Result<Serving, SetupError> {
        drop(self.kept_device);
        let begun = match &self.predecessor {
            None => Begun::Mounted,
            Some(connection) => {
                // From here on, this mount has no other process: before, the keeper of the predecessor starts another
                // one if this process fails.
                keeper::report_serves(connection);
                self.attached.assume();
                self.overlay.assume_locks();
                self.attached.resend().map_err(failed)?;
                Begun::TakenOver
            }
        };
        Ok(Serving {
            overlay: self.overlay,
            attached: self.attached,
            custody,
            begun,
        })
    }
}

/// Whether the mount gets a keeper.
fn is_wanted(config: &Config, overlay: &Overlay, negotiated: Negotiated) -> bool {
    if config.keeper == Keeper::Off {
        return false;
    }
    if config.live_layers == LiveLayers::Allowed || overlay.options().live_layers {
        log::info!("no keeper: another process may change the layers");
        return false;
    }
    if let Err(error) = Ledger::check() {
        log::warn!("no keeper: the state of the mount cannot be in shared memory: {error}");
        return false;
    }
    if !negotiated.can_resend() {
        log::info!("no keeper: the kernel cannot send requests again (Linux 6.9)");
        return false;
    }
    true
}

/// Hands the layers and a new ledger to the keeper.
fn record(
    overlay: &Overlay,
    attached: &Attached,
    custody: &Arc<Custody>,
) -> Result<(), cowl_layers::Error> {
    let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    let (upper, layers) = overlay.layers();
    for layer in &layers {
        custody.keep_layer(layer).map_err(io)?;
    }
    if let Some(upper) = &upper {
        custody.keep_upper(upper).map_err(io)?;
    }
    let ledger = Arc::new(Ledger::create(custody.clone())?);
    overlay.attach(&ledger);
    attached.note_all(&ledger);
    custody.hand_over(&ledger).map_err(io)?;
    Ok(())
}

/// Completes the moves of files of an interrupted push.
///
/// Retries after an error, such as a full disk, which may be temporary. Requests cannot be served before the moves are
/// complete.
fn complete_moves(upper: &Upper, below: Option<&Arc<Layer>>) -> cowl_layers::error::Result<()> {
    for _ in 0..MOVE_ATTEMPTS {
        match moves::complete(upper, below) {
            Ok(()) => return Ok(()),
            Err(error) => log::warn!("cannot complete the move of files: {error}; trying again"),
        }
        std::thread::sleep(MOVE_PAUSE);
    }
    moves::complete(upper, below)
}

/// Recovers the overlay of the predecessor.
fn recover(
    legacy: Legacy,
    config: &Config,
    first: &Overlay,
    custody: &Arc<Custody>,
) -> Result<(Overlay, RecoveredValues, Arc<Ledger>), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let Legacy {
        ledger,
        mut layers,
        descriptors,
        was_serving: _,
    } = legacy;
    let ledger = ledger.ok_or("there is no ledger")?;
    let estate = Estate::read(ledger).map_err(|error| text(&error))?;
    let ids = estate.layers().clone();
    let mut with = Inheritance {
        layers: Vec::new(),
        upper: None,
        descriptors,
        locks: Vec::new(),
        retained: Vec::new(),
        options: first.options().clone(),
    };
    for (index, id) in ids.layers.iter().enumerate() {
        let layer = layers.remove(id).ok_or("a layer was not handed over")?;
        if index == 0 && ids.has_upper {
            let upper = layer.into_upper().map_err(|error| text(&error))?;
            let upper = upper.ok_or("the work directory was not handed over")?;
            with.layers.push(upper.layer.clone());
            with.upper = Some(upper);
            continue;
        }
        with.layers.push(layer.layer.clone());
        if index < ids.stack + ids.data_only {
            with.locks.push(layer.lock);
        } else {
            with.retained.push((layer.layer, layer.lock));
        }
    }
    if let Some(upper) = with.upper.as_ref().filter(|_| config.snapshots) {
        // A push was interrupted.
        let below = with.layers.get(1).filter(|_| ids.stack > 1);
        complete_moves(upper, below).map_err(|error| text(&error))?;
    }
    for layer in layers.into_values() {
        // A replacement of layers was interrupted: objects can be in a layer that is not in the stack yet. A new upper
        // layer that was not pushed is not locked any more.
        with.retained.extend(layer.without_work());
    }
    let recovered =
        Overlay::recover(estate, with, custody.clone()).map_err(|error| text(&error))?;
    let ledger = recovered
        .overlay
        .ledger()
        .ok_or("there is no ledger")?
        .clone();
    if recovered.lost > 0 {
        log::debug!("{} removed objects were forgotten", recovered.lost);
    }
    let values = RecoveredValues {
        handles: recovered.handles,
        backing: recovered.backing,
    };
    Ok((recovered.overlay, values, ledger))
}
