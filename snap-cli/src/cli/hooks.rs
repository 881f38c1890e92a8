//! Where verbs meet the scripts of the machine's owner. `Context::hooked` is called with no lock held, so
//! that a script may call cowl itself.

use std::path::PathBuf;

use super::Context;
use crate::container::state::{Mounted, probe};
use crate::error::Result;
use crate::host::hooks::{self, Event, HookEnv};
use crate::store::Store;
use crate::store::name::ContainerName;

impl Context {
    /// Does `work` with the hooks of `event` before and after it. Take locks inside `work`; what it learns
    /// (the name of the new snapshot) it may tell the hooks after it.
    pub(super) fn hooked<T>(
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
        // The home store, and the same configuration: a cowl that a hook calls finds what this one found.
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

/// Where the container is mounted; empty where it is not.
fn mountpoint(store: &Store, name: &ContainerName) -> Result<PathBuf> {
    match probe(store, store.find_id(name)?)? {
        Mounted::Alive(state) => Ok(state.mountpoint),
        Mounted::No | Mounted::Dead(_) => Ok(PathBuf::new()),
    }
}
