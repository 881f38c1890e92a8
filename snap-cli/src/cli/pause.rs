//! The options `--stop` and `--start`, which stop an LXC container during a change of its layers.

use crate::error::{Error, Result};
use crate::host::rootless::RunsOutside;
use crate::lxc::binding;
use crate::store::Store;
use crate::store::name::ContainerName;

/// Options that stop and start the LXC container.
#[derive(Debug, clap::Args)]
pub(super) struct Pause {
    /// Stop the LXC container first if it runs
    #[arg(long)]
    stop: bool,
    /// Start it again afterwards if it ran
    #[arg(long, requires = "stop")]
    start: bool,
}

impl Pause {
    /// Returns the programs that the options run outside of the namespace of a plain user.
    pub(super) fn runs_outside(&self) -> RunsOutside {
        match self.stop {
            true => RunsOutside::LxcTools,
            false => RunsOutside::Nothing,
        }
    }

    /// Runs `act` with the container stopped, if `--stop` is given. With `--start`, a container that ran is started
    /// again, even if `act` fails.
    pub(super) fn around<T>(
        &self,
        store: &Store,
        name: &ContainerName,
        act: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let stopped = match self.stop {
            true => binding::stop(store, name)?,
            false => None,
        };
        let done = act();
        let started = match stopped {
            Some(container) if self.start => container.start(),
            _ => Ok(()),
        };
        match (done, started) {
            (Ok(done), Ok(())) => Ok(done),
            (Err(error), Ok(())) => Err(error),
            (Ok(_), Err(error)) => {
                let what = format!("cannot start {name} again; the change itself succeeded");
                Err(Error::failed(what).because(error))
            }
            (Err(error), Err(second)) => {
                log::warn!("cannot start {name} again: {second}");
                Err(error)
            }
        }
    }
}
