//! `cowl destroy`

use std::ffi::OsString;

use jiff::Span;

use super::{Context, Verb, confirm, output, text};
use crate::container::{dead, destroy};
use crate::error::Result;
use crate::host::hooks::Event;
use crate::lxc::binding;
use crate::recover;
use crate::store::Store;
use crate::store::name::ContainerName;
use crate::store::span;

/// Remove a container with all its snapshots
///
/// Asks first. It can be brought back for 7 days (`cowl undelete`); its space is free after that.
/// Containers cloned from it stay whole. Refused while somebody uses it, and while it has protected
/// snapshots.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    name: OsString,
    /// Remove it for good, and free its space at once
    #[arg(long, conflicts_with = "keep")]
    now: bool,
    /// How long it can be brought back: 12h, 30d [default: 7d, or trash_days of the
    /// configuration file]
    #[arg(long, value_name = "SPAN")]
    keep: Option<OsString>,
    /// Its protected snapshots go as well
    #[arg(long)]
    protected: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Stop the LXC container first, if it runs
    #[arg(long)]
    stop: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Verb for Args {
    fn frees(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let keep = match &self.keep {
            Some(word) => span::parse(&text::plain(word)?)?,
            None => Span::new().days(context.config.trash_days),
        };
        let store = context.store_of(&name)?;
        let (_, record) = store.find(&name)?;
        let snapshots = match record.body.snapshots.len() {
            0 => String::new(),
            1 => " and its snapshot".to_owned(),
            n => format!(" and its {n} snapshots"),
        };
        let for_good = if self.now { " for good" } else { "" };
        if self.dry_run {
            output::note(&format!("would remove {name}{snapshots}{for_good}"));
            return Ok(0);
        }
        if !self.yes {
            // Not locked meanwhile: nobody is to wait for an answer at a terminal.
            confirm(&format!("Remove {name}{snapshots}{for_good}?"))?;
        }
        context.hooked(Event::Destroy, &store, &name, None, |_| {
            self.destroy(&store, &name, &keep)
        })?;
        Ok(0)
    }
}

impl Args {
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
        output::note(&format!(
            "{name} is in the trash until {}: `cowl undelete {name}` brings it back",
            output::local_second(span::until(keep))
        ));
        Ok(())
    }
}
