//! The command `cowl hook`, which LXC calls: `cowl adopt` adds it to the container's config.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use super::{CliCommand, Context, Namespace};
use crate::container::in_lxc;
use crate::error::{Error, Result};
use crate::lifecycle::hook::{Caller, destroy, post_stop, pre_mount, pre_start};
use crate::recover::complete_all;
use crate::store::Store;
use crate::store::manifest::ContainerId;
use cowl_layers::shown::{Allowed, plain};

/// Mount, unmount or destroy the files of an LXC container (internal: called by LXC)
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The event
    event: HookEvent,
    /// The container's id
    id: String,
    /// The arguments that LXC adds: the container's name, "lxc", and the hook's name
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    more: Vec<OsString>,
}

/// An event of LXC for which it calls cowl.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum HookEvent {
    PreStart,
    PreMount,
    PostStop,
    Destroy,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let id = ContainerId::parse(&self.id)
            .ok_or_else(|| Error::usage(format!("invalid container id: {:?}", self.id)))?;
        if self.event == HookEvent::PreMount {
            // In the namespaces of the container, this process has no access to the store.
            return pre_mount(&context.root, id, &self.caller()?).map(|()| 0);
        }
        let store = Store::open(&context.root, context.session.clone())?;
        if let Err(error) = complete_all(&store) {
            log::warn!("{error}");
        }
        if self.event == HookEvent::PostStop {
            in_lxc::cancel(&store, id);
        }
        let done = self.act(&store, id, context.config.depth_limit);
        if let Err(error) = &done {
            self.append_to_log(&store, id, error);
        }
        match (self.event, done) {
            // The container has stopped in any case, so its stop must not fail.
            (HookEvent::PostStop, Err(error)) => {
                log::warn!("{error}");
                Ok(0)
            }
            (_, done) => done.map(|()| 0),
        }
    }

    /// Containers have to start, stop and be destroyed on a full disk.
    fn frees_space(&self) -> bool {
        true
    }

    fn reads_config(&self) -> bool {
        self.event != HookEvent::PreMount
    }

    fn namespace(&self) -> Namespace {
        match self.event {
            HookEvent::PreMount => Namespace::Unused,
            HookEvent::PreStart | HookEvent::PostStop | HookEvent::Destroy => Namespace::Required,
        }
    }
}

impl Args {
    fn act(&self, store: &Store, id: ContainerId, limit: usize) -> Result<()> {
        let caller = self.caller()?;
        match self.event {
            HookEvent::PreStart => pre_start(store, id, &caller, limit),
            HookEvent::PreMount => pre_mount(store.root(), id, &caller),
            HookEvent::PostStop => post_stop(store, id, &caller),
            HookEvent::Destroy => destroy(store, id, &caller),
        }
    }

    fn caller(&self) -> Result<Caller> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let missing =
            || Error::usage("only LXC calls this command: LXC_NAME or LXC_CONFIG_FILE is not set");
        let name = variable("LXC_NAME").or_else(|| self.more.first().cloned());
        let name = name
            .and_then(|name| name.into_string().ok())
            .ok_or_else(missing)?;
        let config = variable("LXC_CONFIG_FILE")
            .map(PathBuf::from)
            .ok_or_else(missing)?;
        Ok(Caller { name, config })
    }

    /// Appends an error to the log of the container's mount.
    ///
    /// LXC shows the output of a hook only with its own logging enabled.
    fn append_to_log(&self, store: &Store, id: ContainerId, error: &Error) {
        let hint = error.hint.as_deref().unwrap_or_default();
        let message = format!("{:?}: {error}; {hint}", self.event);
        let message = plain(&message, Allowed::default());
        let line = format!("{} {message}\n", crate::store::now());
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
