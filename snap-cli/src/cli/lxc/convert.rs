//! The command `cowl lxc`.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cli::{CliCommand, Context, output};
use crate::container::lxc::{CopyTarget, LxcCopy};
use crate::error::{Error, Result};
use crate::lxc::lxcpath;
use crate::recover;
use crate::store::name::ContainerName;

/// Register a container with LXC, so that lxc-start can start it
///
/// For containers from an archive or a directory; clones of LXC containers already are LXC containers.
/// The config is copied from another container, with a new host name, new hardware addresses, and the
/// new container's directory in place of the other one's.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The container
    name: OsString,
    /// Copy the LXC config of this container
    #[arg(long, value_name = "NAME", required_unless_present = "config_file")]
    like: Option<OsString>,
    /// Copy this LXC config
    #[arg(long, value_name = "FILE", conflicts_with = "like")]
    config_file: Option<PathBuf>,
    /// The directory of LXC's containers [default: that of --like, else the output of `lxc-config
    /// lxc.lxcpath`]
    #[arg(long, short = 'P', value_name = "DIR")]
    lxcpath: Option<PathBuf>,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_for(&name)?;
        let copy = match (&self.like, &self.config_file) {
            (Some(like), _) => {
                let like = ContainerName::parse(like)?;
                let (_, record) = context.store_for(&like)?.find(&like)?;
                let target = self.lxcpath.as_deref().map(|path| lxcpath(Some(path)));
                let target = target.transpose()?.map(CopyTarget::In);
                let copy = LxcCopy::for_container(&record.body, None, (&name, target.as_ref()))?;
                copy.ok_or_else(|| {
                    Error::usage(format!("{like} is not an LXC container"))
                        .hint("specify a config with --config-file")
                })?
            }
            (None, Some(file)) => {
                let target = CopyTarget::In(lxcpath(self.lxcpath.as_deref())?);
                LxcCopy::from_config(file, &target, &name)?
            }
            (None, None) => return Err(Error::usage("--like or --config-file is required")),
        };
        let options = copy.options();
        let mut container = recover::open(&store, &name)?;
        let notes = copy.convert(&mut container)?;
        recover::complete_outside(container)?;
        for note in notes {
            output::print_note(&note);
        }
        output::print_note(&format!("start it with: lxc-start {options}"));
        Ok(0)
    }
}
