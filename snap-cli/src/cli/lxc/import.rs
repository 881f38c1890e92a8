//! `cowl import-lxc-snapshots`

use std::ffi::OsString;

use crate::cli::{Context, Verb, output};
use crate::error::{Error, Result};
use crate::lxc::binding;
use crate::lxc::locked::{LockedSnapshots, find_snapshot};
use crate::lxc::snapshots::LxcSnapshot;
use crate::recover;
use crate::snapshot::lxc_import::{import_snapshot, remove_imported};
use crate::store::name::ContainerName;
use cowl_layers::shown::Show as _;

/// Take in the snapshots that LXC's own lxc-snapshot made of a container
///
/// Each becomes a snapshot of cowl's, with its time and its remark, and keeps its name where that is free.
/// Its files are copied into the store, and LXC's folder of it goes when all of it is there.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The container
    name: OsString,
    /// Only these of LXC's snapshots [default: all]
    #[arg(value_name = "SNAP")]
    snapshots: Vec<OsString>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        let mut container = recover::open(&store, &name)?;
        let Some(lxc) = container.manifest().lxc.clone() else {
            return Err(Error::failed(format!(
                "{name} is no LXC container: it has no such snapshots"
            ))
            .hint(format!("`cowl show {name}` tells what it is")));
        };
        let place = LockedSnapshots::open(binding::from_link(&lxc), store.session().patience)?;
        if !self.dry_run {
            remove_imported(&container, &place)?;
        }
        for tree in self.chosen(&place)? {
            let shown = output::shown(tree.name.as_encoded_bytes());
            if tree.taken.is_none() && self.snapshots.is_empty() {
                output::note(&format!("{shown} is left out: it is not whole"));
                continue;
            }
            if self.dry_run {
                output::note(&format!("would take in {}", tree.dir.shown()));
                continue;
            }
            let mut bar = output::Bar::new("importing");
            let brought =
                import_snapshot(&mut container, &place, &tree, &mut |done| bar.tell(done))?;
            drop(bar);
            for note in brought.notes {
                output::note(&note);
            }
            if brought.name.as_str() != shown {
                output::note(&format!(
                    "{shown} is {} now: its name was taken",
                    brought.name
                ));
            }
            output::line(brought.name.as_str())?;
        }
        Ok(0)
    }
}

impl Args {
    fn chosen(&self, place: &LockedSnapshots) -> Result<Vec<LxcSnapshot>> {
        let all = place.list()?;
        if self.snapshots.is_empty() {
            return Ok(all);
        }
        let named = self.snapshots.iter();
        named
            .map(|name| find_snapshot(place.container(), &all, name).cloned())
            .collect()
    }
}
