//! The administrator's hooks around commands.
//!
//! Callers of [`Context::run_with_hooks`] must not hold a lock, because a hook may call cowl.

use std::path::PathBuf;

use super::Context;
use crate::container::state::{Mounted, probe};
use crate::error::Result;
use crate::host::hooks::{self, Event, HookEnv};
use crate::store::Store;
use crate::store::name::ContainerName;

impl Context {
    /// Runs `work` between the hooks before and after `event`.
    ///
    /// `work` takes its locks itself. It may add variables for the hooks after the event, such as the name of a new
    /// snapshot.
    pub(super) fn run_with_hooks<T>(
        &self,
        event: Event,
        store: &Store,
        name: &ContainerName,
        snapshot: Option<&str>,
        work: impl FnOnce(&mut HookEnv) -> Result<T>,
    ) -> Result<T> {
        let mut env = HookEnv::default();
        env.set("COWL_CONTAINER", name.as_str());
        env.set("COWL_SNAPSHOT", snapshot.unwrap_or_default());
        // A cowl that a hook calls uses the same home store and configuration.
        env.set("COWL_STORE", &self.root);
        if let Some(file) = self.config.file() {
            env.set("COWL_CONFIG", file);
        }
        env.set("COWL_COMMAND", &self.session.command);
        env.set("COWL_MOUNTPOINT", mountpoint(store, name)?);
        let settings = hooks::Hooks {
            dir: self.config.hooks.dir.clone(),
            timeout: self.config.hooks.timeout,
        };
        hooks::run_around(&settings, event, &mut env, work)
    }
}

/// Returns the container's mount point, or an empty path if it is not mounted.
fn mountpoint(store: &Store, name: &ContainerName) -> Result<PathBuf> {
    match probe(store, store.find_id(name)?)? {
        Mounted::Alive(state) => Ok(state.mountpoint),
        Mounted::No | Mounted::Dead(_) => Ok(PathBuf::new()),
    }
}
