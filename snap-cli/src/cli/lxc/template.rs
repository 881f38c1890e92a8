//! The command `cowl lxc-template`, which LXC's template `cowl` executes.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cli::{CliCommand, Context, output};
use crate::error::{Error, Result};
use crate::lifecycle::clone::clone_into_created;
use crate::store::name::{Address, ContainerName};

/// Create an LXC container as a clone: lxc-create -n NEW -t cowl -- NAME[@SNAP]
///
/// A clone of an LXC container gets the config of the original, as with `cowl clone`. Any other clone
/// keeps the config that lxc-create wrote.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The container, or a snapshot of it
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The directory of the new container (set by lxc-create)
    #[arg(long, value_name = "DIR")]
    path: PathBuf,
    /// The name of the new container (set by lxc-create)
    #[arg(long)]
    name: OsString,
    /// The root filesystem (set by lxc-create)
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
    /// The user that is root in a container of an ordinary user (set by lxc-create)
    #[arg(long, value_name = "UID")]
    mapped_uid: Option<u32>,
    /// The group of that user (set by lxc-create)
    #[arg(long, value_name = "GID")]
    mapped_gid: Option<u32>,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        if self.mapped_uid.is_some() || self.mapped_gid.is_some() {
            return Err(
                Error::usage("the template works for containers of root only")
                    .hint("run lxc-create as root; an lxc.idmap of the original is copied"),
            );
        }
        let source = Address::parse(&self.source)?;
        let name = ContainerName::parse(&self.name)?;
        if self.path.file_name() != Some(self.name.as_os_str()) {
            return Err(Error::usage(
                "lxc-create must set --path to the directory of the container",
            ));
        }
        let lxcpath =
            std::path::absolute(&self.path).map_err(|e| Error::at("use", &self.path, e))?;
        let lxcpath = lxcpath.parent().map(PathBuf::from).unwrap_or_default();
        let store = context.store_for(&source.container)?;
        for note in clone_into_created(&store, &source, &name, lxcpath)? {
            output::print_note(&note);
        }
        Ok(0)
    }
}
