//! The command `cowl destroy`.

use std::ffi::OsString;

use jiff::Span;

use super::destroy_containerd::{self, Confirmation};
use super::{CliCommand, Context, RunMode, confirm, output, text};
use crate::container::{dead, destroy};
use crate::error::{Error, Result};
use crate::host::hooks::Event;
use crate::host::rootless::RunsOutside;
use crate::lxc::binding;
use crate::recover;
use crate::snapshot::remove::Protected;
use crate::store::Store;
use crate::store::name::ContainerName;
use crate::store::span;

/// Remove a container with all its snapshots
///
/// Asks for confirmation. The container can be recovered for 7 days (`cowl undelete`); then its space
/// is freed. Clones of it are not affected. Refused while a process uses it, and while it has
/// protected snapshots.
///
/// With --containerd, removes what belongs to containerd, permanently: the containers NAME, or with --all all
/// containers, images and other snapshots. This is for a containerd that was uninstalled, and is refused while any
/// containerd or cowl-snapshotter runs.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container; several with --containerd
    #[arg(value_name = "NAME", required_unless_present = "all")]
    names: Vec<OsString>,
    /// Remove containers of containerd, which does not run any more
    #[arg(long, conflicts_with_all = ["keep", "stop"])]
    containerd: bool,
    /// Remove all containers, images and other snapshots of containerd
    #[arg(long, requires = "containerd", conflicts_with = "names")]
    all: bool,
    /// Remove it permanently, and free its space immediately
    #[arg(long, conflicts_with_all = ["keep", "containerd"])]
    now: bool,
    /// Keep it in the trash for this time: 12h, 30d [default: 7d, or trash_days of the configuration
    /// file]
    #[arg(long, value_name = "SPAN")]
    keep: Option<OsString>,
    /// Remove it even if it has protected snapshots
    #[arg(long)]
    protected: bool,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
    /// Stop the LXC container first if it runs
    #[arg(long)]
    stop: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

impl CliCommand for Args {
    fn runs_outside(&self) -> RunsOutside {
        match self.stop {
            true => RunsOutside::LxcTools,
            false => RunsOutside::Nothing,
        }
    }

    fn frees_space(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        if self.containerd {
            self.destroy_of_containerd(context)?;
            return Ok(0);
        }
        let [name] = self.names.as_slice() else {
            return Err(Error::usage("only one container can be removed at a time")
                .hint("run the command for each container"));
        };
        let name = context.container_exactly(name)?;
        let keep = match &self.keep {
            Some(word) => span::parse(&text::parse(word)?)?,
            None => Span::new().days(context.config.trash_days),
        };
        let store = context.store_for(&name)?;
        let (_, record) = store.find(&name)?;
        let snapshots = match record.body.snapshots.len() {
            0 => String::new(),
            1 => " and its snapshot".to_owned(),
            n => format!(" and its {n} snapshots"),
        };
        let permanently = if self.now { " permanently" } else { "" };
        if self.dry_run {
            output::print_note(&format!("would remove {name}{snapshots}{permanently}"));
            return Ok(0);
        }
        if !self.yes {
            // The container is not locked here: other commands must not wait for an answer at a terminal.
            confirm(&format!("Remove {name}{snapshots}{permanently}?"))?;
        }
        context.run_with_hooks(Event::Destroy, &store, &name, None, |_| {
            self.destroy(&store, &name, &keep)
        })?;
        Ok(0)
    }
}

impl Args {
    fn destroy_of_containerd(&self, context: &Context) -> Result<()> {
        let names = self
            .names
            .iter()
            .map(|name| context.container_exactly(name));
        let names: Vec<_> = names.collect::<Result<_>>()?;
        let confirmation = match self.yes {
            true => Confirmation::Given,
            false => Confirmation::Ask,
        };
        let protected = match self.protected {
            true => Protected::Remove,
            false => Protected::Refuse,
        };
        let mode = RunMode::from_option(self.dry_run);
        let names = (!self.all).then_some(names.as_slice());
        destroy_containerd::destroy(context, names, (mode, confirmation, protected))
    }

    fn destroy(&self, store: &Store, name: &ContainerName, keep: &Span) -> Result<()> {
        if self.stop {
            binding::stop(store, name)?;
        }
        let (container, _) = recover::open_to_unmount(store, name)?;
        if !self.protected {
            destroy::refuse_protected(&container)?;
        }
        dead::refuse_stranded(&container)?;
        if self.now {
            destroy::destroy_now(container)?;
            return Ok(());
        }
        destroy::destroy_with_retention(container, keep)?;
        output::print_note(&format!(
            "{name} is in the trash until {}; to recover it: cowl undelete {name}",
            output::format_local_second(span::until(keep))
        ));
        Ok(())
    }
}
