//! The commands `cowl adopt` and `cowl release`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{CliCommand, Context, output};
use crate::error::{Error, Result};
use crate::lifecycle::adopt::{AdoptSource, Candidate, adopt, find_adopted, update_config};
use crate::lifecycle::release::{ReleaseMethod, Snapshots, plan, release};
use crate::lxc::{self as tools, LxcContainer};
use crate::recover;
use crate::shell::quoted;
use crate::store::family;
use crate::store::name::ContainerName;
use cowl_layers::shown::Show as _;

/// Adopt an LXC container or a directory with a root filesystem, in place
///
/// Copies nothing: the directory becomes a layer of a store on the same file system. In LXC's config,
/// one line is changed and five are appended (six for a plain user); lxc-start, lxc-stop and similar
/// tools work as before. `cowl release` reverts all of it. Refused while the container runs. If the
/// container is already adopted, cowl's lines in LXC's config are repaired.
#[derive(Debug, clap::Args)]
pub(super) struct AdoptArgs {
    /// The name of an LXC container, or a directory (anything with a '/')
    #[arg(value_name = "NAME|DIR")]
    source: OsString,
    /// The container's name in cowl [default: the name in LXC]
    #[arg(long)]
    name: Option<OsString>,
    /// The directory of LXC's containers [default: the output of `lxc-config lxc.lxcpath`]
    #[arg(long, short = 'P', value_name = "DIR")]
    lxcpath: Option<PathBuf>,
    /// Create a store here if the file system has none [default: .cowl at its mount point]
    #[arg(long, value_name = "DIR")]
    store_at: Option<PathBuf>,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

impl AdoptArgs {
    /// Returns what to adopt, and the name that it gets in cowl.
    fn source(&self) -> Result<(AdoptSource, ContainerName)> {
        let source = &self.source;
        let is_path = source.as_bytes().contains(&b'/') || source == "." || source == "..";
        let name = self.name.as_ref().map(ContainerName::parse).transpose()?;
        if is_path {
            let name = name.ok_or_else(|| {
                Error::usage("a directory needs a name in cowl").hint(format!(
                    "name it: cowl adopt {} --name NAME",
                    quoted(source)
                ))
            })?;
            return Ok((AdoptSource::Directory(PathBuf::from(source)), name));
        }
        let lxc = ContainerName::parse(source)?;
        let container = LxcContainer {
            lxcpath: tools::lxcpath(self.lxcpath.as_deref())?,
            name: lxc.to_string(),
        };
        Ok((AdoptSource::Lxc(container), name.unwrap_or(lxc)))
    }
}

impl CliCommand for AdoptArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let (source, name) = self.source()?;
        let home = context.open_or_create_store()?;
        if let AdoptSource::Lxc(container) = &source
            && let Some((store, known)) = find_adopted(&home, container)?
            && !self.dry_run
            && update_config(&store, &known)?
        {
            output::print_note(&format!(
                "repaired cowl's lines in the LXC config of {known}"
            ));
            return Ok(0);
        }
        let candidate = Candidate::inspect(&home, &source)?;
        if self.dry_run {
            family::claim(&home, &name)?.remove()?;
            output::print_note(&format!("would adopt {} as {name}", candidate.rootfs()));
            return Ok(0);
        }
        let store = candidate.store(&home, self.store_at.as_deref())?;
        for note in adopt(&store, &candidate, &name)? {
            output::print_note(&note);
        }
        output::print_note(&format!(
            "adopted {name} into the store {}; to revert this: cowl release {name}",
            store.root().shown()
        ));
        Ok(0)
    }
}

/// Turn an adopted container back into a plain directory
///
/// LXC's config is restored, too. A root filesystem that has not changed since the adoption is moved
/// back; otherwise, the container's current state is copied to a plain directory. Snapshots are lost:
/// refused if there are any, unless --yes is given. Refused while the container runs.
#[derive(Debug, clap::Args)]
pub(super) struct ReleaseArgs {
    /// The container
    name: OsString,
    /// Remove its snapshots
    #[arg(long, short)]
    yes: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
}

impl CliCommand for ReleaseArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_for(&name)?;
        let (container, _) = recover::open_to_unmount(&store, &name)?;
        let snapshots = match self.yes {
            true => Snapshots::Drop,
            false => Snapshots::Refuse,
        };
        let result = match plan(&container, snapshots)? {
            ReleaseMethod::Move => "the original root filesystem",
            ReleaseMethod::Copy => "a plain copy of the container's current state",
        };
        if self.dry_run {
            output::print_note(&format!("would release {result}"));
            return Ok(0);
        }
        let mut bar = output::Bar::new("copying");
        let notes = release(container, snapshots, &mut |done| bar.update(done))?;
        drop(bar);
        for note in notes {
            output::print_note(&note);
        }
        output::print_note(&format!("released {result}"));
        Ok(0)
    }
}
