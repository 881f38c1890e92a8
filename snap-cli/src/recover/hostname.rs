//! The host name of a copy of an LXC container, which is written into its root file system.

use std::os::fd::AsFd;
use std::path::Path;

use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::within::{self, Links, Named};
use cowl_layers::view::Found;
use rustix::fs::OFlags;

use crate::container::Container;
use crate::container::state::Mounted;
use crate::error::{Error, Result};

/// Whether the container has a host name in etc/hostname. Without one it need not be mounted.
fn has_hostname(container: &Container<'_>) -> Result<bool> {
    let view = container.store().view(&container.manifest().stack)?;
    let look = || -> cowl_layers::Result<bool> {
        let etc = view.lookup(&view.root()?, &Name::new(b"etc")?)?;
        Ok(match etc {
            Found::Dir(etc) => {
                let found = view.lookup(&etc, &Name::new(b"hostname")?)?;
                // A link may lead to a file, which only the mount shows. Nothing else is written to.
                match found {
                    Found::File(found) => {
                        matches!(found.stat.kind(), FileKind::Regular | FileKind::Symlink)
                    }
                    Found::Dir(_) | Found::Absent | Found::Whiteout => false,
                }
            }
            // A link may lead to a directory, which only the mount shows.
            Found::File(_) => true,
            Found::Absent | Found::Whiteout => false,
        })
    };
    look().map_err(|error| Error::failed("cannot look for etc/hostname").because(error))
}

/// Writes the host name into etc/hostname of the container, if it has such a file.
pub(super) fn write_hostname(container: &Container<'_>, name: &str) -> Result<()> {
    if !has_hostname(container)? {
        return Ok(());
    }
    let before = matches!(container.mounted()?, Mounted::Alive(_));
    let place = container.mount_noted(None, true)?;
    let written = write_hostname_at(&place, name);
    if !before {
        container.unmount(false)?;
    }
    written
}

fn write_hostname_at(place: &Path, name: &str) -> Result<()> {
    let at = |error: cowl_layers::Error| Error::at("write etc/hostname in", place, error);
    let root = sys::dir::open_root(place).map_err(at)?;
    let access = OFlags::WRONLY | OFlags::TRUNC;
    let found = within::open(root.as_fd(), b"etc/hostname", Links::InTree, access).map_err(at)?;
    let mut file = match found {
        Named::File(file) => std::fs::File::from(file),
        // As LXC does: no such file is created.
        Named::Nothing | Named::Other(_) => return Ok(()),
    };
    std::io::Write::write_all(&mut file, format!("{name}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::at("write etc/hostname in", place, e))
}
