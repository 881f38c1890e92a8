//! `--stop` and `--start`: an LXC container's life round a change of what it stands on

use crate::error::{Error, Result};
use crate::lxc::binding;
use crate::store::Store;
use crate::store::name::ContainerName;

/// What is done with the LXC container.
#[derive(Debug, clap::Args)]
pub(super) struct Pause {
    /// Stop the LXC container first, if it runs
    #[arg(long)]
    stop: bool,
    /// Start it again afterwards, if it ran
    #[arg(long, requires = "stop")]
    start: bool,
}

impl Pause {
    /// Does it with the container stopped, if that was asked for. Started again is what ran, whatever became
    /// of the change.
    pub(super) fn round<T>(
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
                let what = format!("the change is done, but {name} could not be started again");
                Err(Error::failed(what).because(error))
            }
            (Err(error), Err(second)) => {
                log::warn!("{name} could not be started again: {second}");
                Err(error)
            }
        }
    }
}
