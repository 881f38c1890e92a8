//! The host name of a copy of an LXC container: it is written into the copy's root filesystem.

use std::os::fd::AsFd;
use std::path::Path;

use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::within::{self, OpenedObject, SymlinkPolicy};
use cowl_layers::view::Found;
use rustix::fs::OFlags;

use crate::container::Container;
use crate::container::mount::{AfterUnmount, MountRequest};
use crate::container::state::Lifetime;
use crate::container::state::Mounted;
use crate::error::{Error, Result};
use crate::store::kernel::Driver;

/// Returns whether the container may have a file etc/hostname. If not, it need not be mounted.
fn has_hostname(container: &Container<'_>) -> Result<bool> {
    let view = container.store().view(&container.manifest().stack)?;
    let find = || -> cowl_layers::Result<bool> {
        let etc = view.lookup(&view.root()?, &Name::new(b"etc")?)?;
        Ok(match etc {
            Found::Dir(etc) => {
                let found = view.lookup(&etc, &Name::new(b"hostname")?)?;
                // Only the mount resolves a symlink; it may lead to a file. Objects of other types are not written to.
                match found {
                    Found::File(found) => {
                        matches!(found.stat.kind(), FileKind::Regular | FileKind::Symlink)
                    }
                    Found::Dir(_) | Found::Absent | Found::Whiteout => false,
                }
            }
            // Only the mount resolves a symlink; it may lead to a directory.
            Found::File(_) => true,
            Found::Absent | Found::Whiteout => false,
        })
    };
    find().map_err(|error| Error::failed("cannot read etc/hostname").because(error))
}

/// Writes the host name to the container's etc/hostname, if that file exists.
pub(super) fn write_hostname(container: &Container<'_>, name: &str) -> Result<()> {
    if !has_hostname(container)? {
        return Ok(());
    }
    let before = matches!(container.mounted()?, Mounted::Alive(_));
    let request = MountRequest {
        // The kernel may refuse to mount these layers.
        driver: (!before).then_some(Driver::Fuse),
        ..MountRequest::of(Lifetime::OfCommand)
    };
    let mount_point = container.mount_unrecorded(request)?;
    let written = write_hostname_at(&mount_point, name);
    if !before {
        container.unmount(AfterUnmount::StayUnmounted)?;
    }
    written
}

/// Writes the host name to etc/hostname in a mount. Symlinks are resolved inside the mount.
fn write_hostname_at(mount_point: &Path, name: &str) -> Result<()> {
    let at = |error: cowl_layers::Error| Error::at("write etc/hostname in", mount_point, error);
    let root = sys::dir::open_root(mount_point).map_err(at)?;
    let access = OFlags::WRONLY | OFlags::TRUNC;
    let found =
        within::open(root.as_fd(), b"etc/hostname", SymlinkPolicy::InTree, access).map_err(at)?;
    let mut file = match found {
        OpenedObject::File(file) => std::fs::File::from(file),
        // Like LXC, do not create the file.
        OpenedObject::Nothing | OpenedObject::Other(_) => return Ok(()),
    };
    std::io::Write::write_all(&mut file, format!("{name}\n").as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|e| Error::at("write etc/hostname in", mount_point, e))
}
