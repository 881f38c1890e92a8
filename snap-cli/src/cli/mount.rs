//! `cowl mount` and `cowl umount`

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{Context, Verb, output};
use crate::container::Container;
use crate::error::{Error, Result};
use crate::store::name::ContainerName;

/// Mount a container and print where
///
/// The daemon runs in the background and outlives the shell; its log is run/<id>/log in the store.
/// A container that is mounted already stays as it is, and the place is printed.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// The container
    name: OsString,
    /// An empty folder to mount it at [default: a place in the store]
    #[arg(long, value_name = "PATH")]
    at: Option<PathBuf>,
}

impl Verb for MountArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        let mut container = Container::open(&store, &name)?;
        context.keep_depth(&mut container);
        let place = container.mount(self.at.as_deref(), false)?;
        output::line(place.as_os_str().as_bytes())?;
        Ok(0)
    }
}

/// Unmount a container
///
/// Refused while anything in it is in use; the message names who uses it.
#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    /// The container
    name: OsString,
}

impl Verb for UmountArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = ContainerName::parse(&self.name)?;
        let store = context.store_of(&name)?;
        let (container, dead) = Container::open_to_unmount(&store, &name)?;
        if container.unmount(false)?.is_none() && !dead {
            return Err(Error::failed(format!("{name} is not mounted"))
                .hint(format!("mount it with: cowl mount {name}")));
        }
        Ok(0)
    }
}
