//! The beginning of a daemon's service: the first one's, or that of a successor of one that was killed.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::choices::Keeper;
use crate::config::{Config, LiveLayers};
use crate::fuse::{self, Attached, InitOutcome, RecoveredValues, SessionSettings, Successor};
use crate::keeper::{self, Custody, Legacy, Turn};
use cowl_layers::error::Errno;
use cowl_layers::setup::{SetupError, SetupKind};
use cowl_layers::sys;
use cowl_layers::sys::users::Device;
use cowl_overlay::{Estate, Inheritance, Ledger, Overlay};

/// A moment in the life of a mount, at which [`crate::serve()`] calls back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The file system with this device number is mounted, and this process serves it.
    Mounted(Device),
    /// This process continues to serve it, in the place of one that was killed.
    Continued(Device),
    /// Another process serves it, and this one only waits for its end: it must release what it holds open.
    Kept,
}

/// A mount that was set up, and that no process serves yet.
pub(crate) struct Start {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) attached: Attached,
    /// A descriptor of the device for the keeper.
    pub(crate) kept_device: OwnedFd,
    pub(crate) offered: Option<InitOutcome>,
    pub(crate) settings: SessionSettings,
}

/// A mount that this process is about to serve.
pub(crate) struct Serving {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) attached: Attached,
    pub(crate) custody: Option<Arc<Custody>>,
    /// Whether another process served it before.
    pub(crate) is_continued: bool,
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
        let offered = match self.offered {
            Some(offered) if is_wanted(config, &self.overlay) => offered,
            _ => {
                return Ok(Serving {
                    overlay: self.overlay,
                    attached: self.attached,
                    custody: None,
                    is_continued: false,
                });
            }
        };
        match keeper::start(|| on(Event::Kept)).map_err(failed)? {
            Turn::First(custody) => {
                drop(self.kept_device);
                record(&self.overlay, &custody).map_err(failed)?;
                Ok(Serving {
                    overlay: self.overlay,
                    attached: self.attached,
                    custody: Some(custody),
                    is_continued: false,
                })
            }
            Turn::Successor(custody, legacy) => {
                // They belong to the first daemon: dropping them would release its locks.
                std::mem::forget((self.overlay.clone(), self.attached));
                let (overlay, values, ledger) =
                    recover(*legacy, &self.overlay, &custody).map_err(failed)?;
                let overlay = Arc::new(overlay);
                let successor = Successor {
                    device: self.kept_device,
                    offered,
                    values: &values,
                    ledger: &ledger,
                };
                let attached =
                    fuse::resume(successor, overlay.clone(), &config.mount, &self.settings)
                        .map_err(failed)?;
                custody.hand_over(&ledger).map_err(failed)?;
                attached.resend().map_err(failed)?;
                Ok(Serving {
                    overlay,
                    attached,
                    custody: Some(custody),
                    is_continued: true,
                })
            }
        }
    }
}

/// Whether the mount gets a keeper.
fn is_wanted(config: &Config, overlay: &Overlay) -> bool {
    if config.keeper == Keeper::Off {
        return false;
    }
    if config.live_layers == LiveLayers::Allowed || overlay.options().live_layers {
        log::info!("no keeper: another process may change the layers");
        return false;
    }
    if !sys::mount::can_resend() {
        log::info!("no keeper: the kernel cannot send requests again (Linux 6.9)");
        return false;
    }
    true
}

/// Hands the layers and a new ledger to the keeper.
fn record(overlay: &Overlay, custody: &Arc<Custody>) -> Result<(), cowl_layers::Error> {
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
    custody.hand_over(&ledger).map_err(io)?;
    Ok(())
}

/// Recovers the overlay of the predecessor.
fn recover(
    legacy: Legacy,
    first: &Overlay,
    custody: &Arc<Custody>,
) -> Result<(Overlay, RecoveredValues, Arc<Ledger>), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let Legacy {
        ledger,
        mut layers,
        descriptors,
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
    let ledger = Arc::new(Ledger::create(custody.clone()).map_err(|error| text(&error))?);
    let recovered = Overlay::recover(estate, with, &ledger).map_err(|error| text(&error))?;
    if recovered.lost > 0 {
        log::debug!("{} removed objects were forgotten", recovered.lost);
    }
    let values = RecoveredValues {
        handles: recovered.handles,
        backing: recovered.backing,
    };
    Ok((recovered.overlay, values, ledger))
}
