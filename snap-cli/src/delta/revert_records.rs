//! Records of attributes that could not be stored, on the objects that a revert recreates.
//!
//! They are not visible through a mount, so that a container cannot forge them. They are therefore set in the layer to
//! which the mount writes, after the mount has created the object there. The path is the same, because an upper layer has
//! the names of the merged tree.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::format::XattrSpace;
use cowl_layers::sys::{dir, xattr};

use crate::tree::error::{Context as _, Result};
use crate::tree::path::{split, split_first};

/// The layer to which the reverted tree is written.
#[derive(Debug)]
pub struct TargetLayer {
    root: OwnedFd,
    space: XattrSpace,
}

impl TargetLayer {
    /// Opens the tree of a layer.
    pub fn open(tree: &Path, space: XattrSpace) -> Result<Self> {
        let root = dir::open_root(tree);
        Ok(Self {
            root: root.context("cannot open the layer", tree.as_os_str().as_bytes())?,
            space,
        })
    }

    /// Sets the record of the object at a path, or removes it. No component of the path is a symbolic link.
    pub(super) fn set_record(&self, path: &[u8], record: Option<&[u8]>) -> Result<()> {
        // Only an import of a user without privileges writes records.
        if self.space != XattrSpace::User {
            return Ok(());
        }
        let name = self.space.recorded().as_bytes();
        let message = "cannot record the attributes of";
        let set = || -> cowl_layers::Result<()> {
            let object = self.find(path)?;
            match record {
                Some(value) => xattr::set(object.as_fd(), name, value),
                None if xattr::get(object.as_fd(), name)?.is_some() => {
                    xattr::remove(object.as_fd(), name)
                }
                None => Ok(()),
            }
        };
        match set() {
            // Without its own attributes, the object need not be in this layer.
            Err(error) if record.is_none() && error.is_absent() => Ok(()),
            other => other.context(message, path),
        }
    }

    fn find(&self, path: &[u8]) -> cowl_layers::Result<OwnedFd> {
        let (mut rest, name) = split(path);
        let mut parent = dir::reopen_dir(self.root.as_fd())?;
        loop {
            let (part, more) = split_first(rest);
            if part.is_empty() {
                break;
            }
            parent = dir::open_dir(parent.as_fd(), part)?;
            rest = more;
        }
        match name {
            b"" => Ok(parent),
            name => dir::open_path(parent.as_fd(), name),
        }
    }
}
