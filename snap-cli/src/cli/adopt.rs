//! `cowl adopt` and `cowl release`

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{Context, Verb, output};
use crate::error::{Error, Result};
use crate::lifecycle::adopt::{AdoptSource, Candidate, adopt, find_adopted, update_config};
use crate::lifecycle::release::{ReleaseMethod, Snapshots, plan, release};
use crate::lxc::{self as tools, LxcContainer};
use crate::recover;
use crate::shell::quoted;
use crate::store::family;
use crate::store::name::ContainerName;
use cowl_layers::shown::Show as _;

/// Take over an LXC container, or any folder with a root file system, where it stands
///
/// Nothing is copied: the folder becomes a layer of a store on the same file system. LXC's config is
/// changed in one line, and four are added at its end; lxc-start, lxc-stop and the like go on as
/// before. `cowl release` gives all of it back. Refused while the container runs. For a container
/// that was taken over already, its lines in LXC's config are put right where they are not.
#[derive(Debug, clap::Args)]
pub(super) struct AdoptArgs {
    /// An LXC container's name, or a folder (anything with a '/')
    #[arg(value_name = "NAME|DIR")]
    what: OsString,
    /// The container's name in cowl [default: LXC's]
    #[arg(long)]
    name: Option<OsString>,
    /// The folder of LXC's containers [default: what lxc-config lxc.lxcpath says]
    #[arg(long, short = 'P', value_name = "DIR")]
    lxcpath: Option<PathBuf>,
    /// Where a store is to be made when none is on that file system [default: .cowl at its mount point]
    #[arg(long, value_name = "DIR")]
    store_at: Option<PathBuf>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl AdoptArgs {
    fn what(&self) -> Result<(AdoptSource, ContainerName)> {
        let is_path = self.what.as_bytes().contains(&b'/') || self.what == "." || self.what == "..";
        let asked = self.name.as_ref().map(ContainerName::parse).transpose()?;
        if is_path {
            let name = asked.ok_or_else(|| {
                Error::usage("a folder has no name in cowl yet").hint(format!(
                    "give it one: cowl adopt {} --name NAME",
                    quoted(&self.what)
                ))
            })?;
            return Ok((AdoptSource::Directory(PathBuf::from(&self.what)), name));
        }
        let lxc = ContainerName::parse(&self.what)?;
        let container = LxcContainer {
            lxcpath: tools::lxcpath(self.lxcpath.as_deref())?,
            name: lxc.to_string(),
        };
        Ok((AdoptSource::Lxc(container), asked.unwrap_or(lxc)))
    }
}

impl Verb for AdoptArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let (what, name) = self.what()?;
        let home = context.store_or_new()?;
        if let AdoptSource::Lxc(container) = &what
            && let Some((store, known)) = find_adopted(&home, container)?
            && !self.dry_run
            && update_config(&store, &known)?
        {
            output::note(&format!(
                "the lines of {known}'s LXC config are as they are to be again"
            ));
            return Ok(0);
        }
        let candidate = Candidate::inspect(&home, &what)?;
        if self.dry_run {
            family::claim(&home, &name)?.remove()?;
            output::note(&format!("would take over {} as {name}", candidate.rootfs()));
            return Ok(0);
        }
        let store = candidate.store(&home, self.store_at.as_deref())?;
        for note in adopt(&store, &candidate, &name)? {
            output::note(&note);
        }
        output::note(&format!(
            "{name} is cowl's now, in the store {}; to give it back: cowl release {name}",
            store.root().shown()
        ));
        Ok(0)
    }
}

/// Give back what was adopted: a plain folder in its place, and LXC's config as it was
///
/// A root file system that nothing was written to since moves back; else what the container shows is
/// written into a plain folder beside it first. Snapshots can't come along: refused while there are
/// any, unless --yes gives them up. Refused while the container runs.
#[derive(Debug, clap::Args)]
pub(super) struct ReleaseArgs {
    /// The container
    name: OsString,
    /// Give up its snapshots
    #[arg(long, short)]
    yes: bool,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Verb for ReleaseArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        let (container, _) = recover::open_to_unmount(&store, &name)?;
        let snapshots = match self.yes {
            true => Snapshots::Drop,
            false => Snapshots::Refuse,
        };
        let how = plan(&container, snapshots)?;
        let said = match how {
            ReleaseMethod::Move => "the root file system as it was taken over",
            ReleaseMethod::Copy => "a plain copy of what the container shows",
        };
        if self.dry_run {
            output::note(&format!("would give back {said}"));
            return Ok(0);
        }
        let mut bar = output::Bar::new("copying");
        let notes = release(container, snapshots, &mut |done| bar.tell(done))?;
        drop(bar);
        for note in notes {
            output::note(&note);
        }
        output::note(&format!("given back: {said}"));
        Ok(0)
    }
}
