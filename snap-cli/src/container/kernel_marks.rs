//! The markers in layers that kernel overlayfs cannot read, and its own that do not fit the layers any more.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::format::{OPAQUE_XATTR_WHITEOUTS, XattrSpace};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;
use cowl_layers::sys::kernel::version;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::within::{self, OpenedObject, SymlinkPolicy};
use rustix::fs::OFlags;

use crate::error::{Error, Result};
use crate::tree::error::{ErrorKind, TreeError};
use crate::tree::walk::{Item, Visitor, visit_dir};

/// The first version of Linux that reads whiteouts that are regular files.
const MARKED_WHITEOUTS: (u32, u32, u32) = (6, 7, 0);

/// Returns an error if a layer has a marker that the running kernel does not read.
pub(super) fn refuse_unreadable(tree: &Path, space: XattrSpace) -> Result<()> {
    let mut search = Search {
        space,
        kernel: version(),
        found: None,
    };
    match visit_dir(tree, &mut search) {
        // The walk ends at the first marker.
        Err(_) if search.found.is_some() => {}
        done => done.map_err(|error| Error::at("read the layer", tree, error))?,
    }
    let Some((path, marker)) = search.found else {
        return Ok(());
    };
    let path = tree.join(std::ffi::OsStr::from_bytes(&path));
    Err(Error::failed(format!(
        "kernel overlayfs cannot mount these layers: {} {marker}",
        path.shown()
    ))
    .hint("use the default driver: --driver fuse"))
}

/// The search for a marker that the kernel does not read.
struct Search {
    space: XattrSpace,
    kernel: (u32, u32, u32),
    /// The path and a description.
    found: Option<(Vec<u8>, &'static str)>,
}

impl Search {
    /// Returns the description of an unreadable marker on a directory or a regular file.
    fn describe(&self, kind: FileKind, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Option<&'static str> {
        let space = self.space;
        let value = |name: &str| {
            let found = xattrs.iter().find(|(other, _)| other == name.as_bytes());
            found.map(|(_, value)| value.as_slice())
        };
        let is_old = self.kernel < MARKED_WHITEOUTS;
        match (kind, space) {
            (FileKind::Directory, _) if value(space.nodes()).is_some() => {
                Some("contains character devices with the number 0:0")
            }
            (FileKind::Directory, _)
                if is_old && value(space.opaque()) == Some(OPAQUE_XATTR_WHITEOUTS) =>
            {
                Some("contains whiteouts that are regular files (Linux 6.7 or later reads them)")
            }
            (FileKind::Directory, XattrSpace::User) if value(space.redirect()).is_some() => {
                Some("is a renamed directory, which the kernel cannot resolve in a user namespace")
            }
            (_, XattrSpace::User) if value(space.recorded()).is_some() => Some(
                "has recorded attributes, which the kernel would discard (docs/decisions/0039)",
            ),
            (FileKind::Regular, XattrSpace::User) if value(space.metacopy()).is_some() => Some(
                "has its content in a lower layer, where the kernel does not find it in a user namespace",
            ),
            _ => None,
        }
    }
}

impl Visitor for Search {
    fn visit(&mut self, item: &Item<'_>) -> Result<(), TreeError> {
        let kind = item.kind();
        // In the trusted namespace, only directories have such markers.
        let is_concerned = match self.space {
            XattrSpace::Trusted => kind == FileKind::Directory,
            XattrSpace::User => matches!(kind, FileKind::Directory | FileKind::Regular),
        };
        if !is_concerned {
            return Ok(());
        }
        match self.describe(kind, &item.xattrs()?) {
            None => Ok(()),
            Some(marker) => {
                self.found = Some((item.path.to_vec(), marker));
                Err(TreeError::new(ErrorKind::Refused, marker))
            }
        }
    }
}

/// Removes the handles of lower objects that the kernel compares: those of the root and of files whose content is in a
/// lower layer.
///
/// With other lower layers than before, the kernel would refuse the mount, or access to such a file, with ESTALE. The
/// handles of other objects provide only an inode number.
pub(super) fn remove_origins(tree: &Path, space: XattrSpace) -> Result<()> {
    let root = sys::dir::open_root(tree).map_err(|error| Error::at("open", tree, error))?;
    let mut removal = OriginRemoval { space, root: &root };
    visit_dir(tree, &mut removal).map_err(|error| Error::at("prepare the layer", tree, error))?;
    remove_origin(root.as_fd(), space).map_err(|error| Error::at("prepare the layer", tree, error))
}

struct OriginRemoval<'a> {
    space: XattrSpace,
    /// The root of the layer. The walk itself reads through a mount that is read-only.
    root: &'a OwnedFd,
}

impl Visitor for OriginRemoval<'_> {
    fn visit(&mut self, item: &Item<'_>) -> Result<(), TreeError> {
        if item.kind() != FileKind::Regular || item.stat.size == 0 {
            return Ok(());
        }
        let xattrs = item.xattrs()?;
        let has = |name: &str| xattrs.iter().any(|(other, _)| other == name.as_bytes());
        if !has(self.space.metacopy()) || !has(self.space.kernel_origin()) {
            return Ok(());
        }
        let refused = SymlinkPolicy::Refused;
        let removed =
            within::open(self.root.as_fd(), item.path, refused, OFlags::RDONLY).and_then(|found| {
                match found {
                    OpenedObject::File(file) => remove_origin(file.as_fd(), self.space),
                    OpenedObject::Nothing | OpenedObject::Other(_) => Err(Errno::STALE.into()),
                }
            });
        removed.map_err(|error| {
            TreeError::new(ErrorKind::Io, "cannot remove the kernel's origin")
                .at(item.path)
                .because(error)
        })
    }
}

fn remove_origin(fd: BorrowedFd<'_>, space: XattrSpace) -> cowl_layers::Result<()> {
    match sys::xattr::remove(fd, space.kernel_origin().as_bytes()) {
        Err(error) if !matches!(error.errno(), Errno::NODATA | Errno::OPNOTSUPP) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_readable_or_not_by_kernel_and_namespace() {
        let search = |space, kernel| Search {
            space,
            kernel,
            found: None,
        };
        let xattr = |name: &str, value: &[u8]| vec![(name.as_bytes().to_vec(), value.to_vec())];
        let (trusted, user) = (XattrSpace::Trusted, XattrSpace::User);
        let (dir, file) = (FileKind::Directory, FileKind::Regular);
        for (space, kernel, kind, xattrs, is_refused) in [
            (trusted, (6, 7, 0), dir, xattr(trusted.nodes(), b"aa"), true),
            (trusted, (6, 6, 0), dir, xattr(trusted.opaque(), b"x"), true),
            (
                trusted,
                (6, 7, 0),
                dir,
                xattr(trusted.opaque(), b"x"),
                false,
            ),
            (
                trusted,
                (5, 2, 0),
                dir,
                xattr(trusted.opaque(), b"y"),
                false,
            ),
            (
                trusted,
                (6, 7, 0),
                dir,
                xattr(trusted.redirect(), b"/a"),
                false,
            ),
            (
                trusted,
                (6, 7, 0),
                file,
                xattr(trusted.metacopy(), b""),
                false,
            ),
            (user, (6, 7, 0), dir, xattr(user.redirect(), b"/a"), true),
            (
                user,
                (6, 7, 0),
                dir,
                xattr(trusted.redirect(), b"/a"),
                false,
            ),
            (user, (6, 7, 0), file, xattr(user.metacopy(), b""), true),
            (user, (6, 7, 0), dir, xattr(user.opaque(), b"y"), false),
            (user, (6, 7, 0), dir, xattr(user.recorded(), b""), true),
            (user, (6, 7, 0), file, xattr(user.recorded(), b""), true),
        ] {
            let found = search(space, kernel).describe(kind, &xattrs);
            assert_eq!(found.is_some(), is_refused, "{xattrs:?} on {kernel:?}");
        }
    }
}
