//! The command `cowl import-lxc-snapshots`.

use std::ffi::OsString;

use crate::cli::{CliCommand, Context, output};
use crate::error::{Error, Result};
use crate::lxc::binding;
use crate::lxc::locked::{LockedSnapshots, find_snapshot};
use crate::lxc::snapshots::LxcSnapshot;
use crate::recover;
use crate::snapshot::lxc_import::{import_snapshot, remove_imported};
use crate::store::name::ContainerName;
use cowl_layers::shown::Show as _;

/// Import the snapshots that LXC's own lxc-snapshot took of a container
///
/// Each becomes a snapshot of cowl, with its time and its comment, and with its name unless that is taken.
/// Its files are copied into the store; LXC's directory of the snapshot is removed once the copy is complete.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The container
    name: OsString,
    /// Import only these snapshots [default: all]
    #[arg(value_name = "SNAP")]
    snapshots: Vec<OsString>,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_for(&name)?;
        let mut container = recover::open(&store, &name)?;
        let Some(lxc) = container.manifest().lxc.clone() else {
            return Err(Error::failed(format!(
                "cannot import LXC snapshots of {name}: it is not an LXC container"
            ))
            .hint(format!("show its details: cowl show {name}")));
        };
        let locked = LockedSnapshots::open(binding::from_link(&lxc), store.session().patience)?;
        if !self.dry_run {
            remove_imported(&container, &locked)?;
        }
        for tree in self.chosen(&locked)? {
            let shown = output::shown(tree.name.as_encoded_bytes());
            if tree.taken.is_none() && self.snapshots.is_empty() {
                output::print_note(&format!("skipped {shown}: it is incomplete"));
                continue;
            }
            if self.dry_run {
                output::print_note(&format!("would import {}", tree.dir.shown()));
                continue;
            }
            let mut bar = output::Bar::new("importing");
            let imported =
                import_snapshot(&mut container, &locked, &tree, &mut |done| bar.update(done))?;
            drop(bar);
            for note in imported.notes {
                output::print_note(&note);
            }
            if imported.name.as_str() != shown {
                output::print_note(&format!(
                    "imported {shown} as {}: its name is taken",
                    imported.name
                ));
            }
            output::print_line(imported.name.as_str())?;
        }
        Ok(0)
    }
}

impl Args {
    /// Returns the snapshots that the command line names, or all.
    fn chosen(&self, locked: &LockedSnapshots) -> Result<Vec<LxcSnapshot>> {
        let all = locked.list()?;
        if self.snapshots.is_empty() {
            return Ok(all);
        }
        let named = self.snapshots.iter();
        named
            .map(|name| find_snapshot(locked.container(), &all, name).cloned())
            .collect()
    }
}
