//! `cowl lxc`

use std::ffi::OsString;
use std::path::PathBuf;

use crate::cli::{Context, Verb, output};
use crate::container::lxc::LxcCopy;
use crate::error::{Error, Result};
use crate::lxc::lxcpath;
use crate::recover;
use crate::store::name::ContainerName;

/// Make a container one of LXC's, so that lxc-start starts it
///
/// For containers that came from an archive or a folder; clones of LXC's containers are LXC's anyway.
/// Another container's config is the model: host name, hardware addresses and files in the
/// container's own folder become the new one's.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The container
    name: OsString,
    /// A container whose LXC config is the model
    #[arg(long, value_name = "NAME", required_unless_present = "config_file")]
    like: Option<OsString>,
    /// A file that is the model
    #[arg(long, value_name = "FILE", conflicts_with = "like")]
    config_file: Option<PathBuf>,
    /// The folder of LXC's containers [default: the model's, else what lxc-config lxc.lxcpath says]
    #[arg(long, short = 'P', value_name = "DIR")]
    lxcpath: Option<PathBuf>,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        let copy = match (&self.like, &self.config_file) {
            (Some(like), _) => {
                let like = ContainerName::parse(like)?;
                let (id, record) = context.store_of(&like)?.find(&like)?;
                let copy = LxcCopy::for_container((id, &record.body), None, &name)?;
                let copy = copy.ok_or_else(|| {
                    Error::usage(format!("{like} is no LXC container"))
                        .hint("give a config with --config-file")
                })?;
                match &self.lxcpath {
                    Some(path) => copy.into_lxcpath(lxcpath(Some(path))?)?,
                    None => copy,
                }
            }
            (None, Some(file)) => {
                LxcCopy::from_config(file, lxcpath(self.lxcpath.as_deref())?, &name)?
            }
            (None, None) => return Err(Error::usage("neither --like nor --config-file is given")),
        };
        let place = copy.options();
        let mut container = recover::open(&store, &name)?;
        let notes = copy.convert(&mut container)?;
        recover::complete_outside(container)?;
        for note in notes {
            output::note(&note);
        }
        output::note(&format!("start it with: lxc-start {place}"));
        Ok(0)
    }
}
