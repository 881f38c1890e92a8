//! `cowl hook`: what LXC calls by the lines that `cowl adopt` puts into a config

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use super::{Context, Verb};
use crate::error::{Error, Result};
use crate::lifecycle::hook::{Caller, destroy, post_stop, pre_start};
use crate::recover::complete_all;
use crate::store::Store;
use crate::store::manifest::ContainerId;
use cowl_layers::shown::{Allowed, plain};

/// Mount, unmount or destroy the files of an LXC container (for LXC's use: its config calls it)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// When
    kind: Kind,
    /// The container's id
    id: String,
    /// What LXC adds: the container's name, "lxc", and the hook's name
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    more: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    PreStart,
    PostStop,
    Destroy,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let id = ContainerId::parse(&self.id)
            .ok_or_else(|| Error::usage(format!("{:?} is no container's id", self.id)))?;
        let store = Store::open(&context.root, context.session.clone())?;
        if let Err(error) = complete_all(&store) {
            log::warn!("{error}");
        }
        let done = self.act(&store, id, context.config.depth_limit);
        if let Err(error) = &done {
            self.tell(&store, id, error);
        }
        match (self.kind, done) {
            // The container has stopped, whatever becomes of its mount.
            (Kind::PostStop, Err(error)) => {
                log::warn!("{error}");
                Ok(0)
            }
            (_, done) => done.map(|()| 0),
        }
    }

    /// What starts, stops and is destroyed is mounted and unmounted.
    fn frees(&self) -> bool {
        true
    }
}

impl Args {
    fn act(&self, store: &Store, id: ContainerId, limit: usize) -> Result<()> {
        let caller = self.caller()?;
        match self.kind {
            Kind::PreStart => pre_start(store, id, &caller, limit),
            Kind::PostStop => post_stop(store, id, &caller),
            Kind::Destroy => destroy(store, id, &caller),
        }
    }

    fn caller(&self) -> Result<Caller> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let missing =
            || Error::usage("this is for LXC to call: LXC_NAME or LXC_CONFIG_FILE is not set");
        let name = variable("LXC_NAME").or_else(|| self.more.first().cloned());
        let name = name
            .and_then(|name| name.into_string().ok())
            .ok_or_else(missing)?;
        let config = variable("LXC_CONFIG_FILE")
            .map(PathBuf::from)
            .ok_or_else(missing)?;
        Ok(Caller { name, config })
    }

    /// LXC shows what a hook says only to those who ask it for a log: it goes into the mount's log as well.
    fn tell(&self, store: &Store, id: ContainerId, error: &Error) {
        let hint = error.hint.as_deref().unwrap_or_default();
        let what = format!("{:?}: {error}; {hint}", self.kind);
        let what = plain(&what, Allowed::default());
        let line = format!("{} {what}\n", crate::store::now());
        let written = store.run().create(id).and_then(|dir| {
            let path = dir.join("log");
            let log = std::fs::File::options()
                .create(true)
                .append(true)
                .open(&path);
            log.and_then(|mut log| log.write_all(line.as_bytes()))
                .map_err(|error| Error::at("write", &path, error))
        });
        if let Err(error) = written {
            log::debug!("{error}");
        }
    }
}
