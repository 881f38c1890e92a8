//! The attributes of directories that are being filled. Most are set at once; those that change while a directory is
//! filled, or change what is made in it, when everything is there.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cowl_fs::sys::attr::SetTime;

use super::dirs::Dirs;
use super::limits;
use crate::delta::error::Result;
use crate::delta::make::{self, Attrs, Last};

/// Attributes that directories get in the end.
#[derive(Debug, Default)]
pub(super) struct Directories {
    pending: Dirs<Pending>,
    /// The ACLs: many directories have the same.
    acls: BTreeSet<Arc<[u8]>>,
    acl_bytes: usize,
}

/// The name and the value of an ACL's attribute.
type Acl = (&'static [u8], Arc<[u8]>);

#[derive(Debug)]
struct Pending {
    perm: u32,
    mtime: SetTime,
    /// `None`: like `mtime`.
    atime: Option<Box<SetTime>>,
    acls: Option<Box<[Acl]>>,
}

impl Directories {
    /// Gives the directory behind `fd` its owner and extended attributes, and remembers the rest.
    pub(super) fn set(&mut self, fd: BorrowedFd<'_>, path: &[u8], attrs: Attrs) -> Result<()> {
        make::apply_first(fd, &attrs, path)?;
        let mut acls = Vec::new();
        for (name, value) in attrs.xattrs {
            if let Some(name) = make::acl_name(&name) {
                acls.push((name, self.acl(value, path)?));
            }
        }
        let pending = Pending {
            perm: attrs.perm,
            mtime: attrs.mtime,
            atime: (attrs.atime != attrs.mtime).then(|| Box::new(attrs.atime)),
            acls: (!acls.is_empty()).then(|| acls.into()),
        };
        self.pending.set(path, pending)
    }

    fn acl(&mut self, value: Vec<u8>, path: &[u8]) -> Result<Arc<[u8]>> {
        if let Some(known) = self.acls.get(value.as_slice()) {
            return Ok(Arc::clone(known));
        }
        self.acl_bytes += value.len();
        if self.acl_bytes > limits::DIRECTORY_ACLS {
            let what = format!(
                "the different ACLs of directories have more than {} bytes, which is the limit",
                limits::DIRECTORY_ACLS
            );
            return Err(limits::exceeded(what, path));
        }
        let new: Arc<[u8]> = value.into();
        self.acls.insert(Arc::clone(&new));
        Ok(new)
    }

    /// Forgets a directory that is about to be replaced, and everything in it.
    pub(super) fn forget(&mut self, path: &[u8]) {
        self.pending.forget(path);
    }

    /// Sets what was remembered, in each directory after everything in it: one that its owner may not
    /// enter must not be in the way of what is below it.
    pub(super) fn finish(self, root: BorrowedFd<'_>) -> Result<()> {
        self.pending.visit(root, &mut |pending, fd, path| {
            let path = if path.is_empty() { b"." } else { path };
            let acls = pending.acls.unwrap_or_default();
            let acls = acls.iter().map(|(name, value)| (*name, &**value));
            let last = Last {
                perm: Some(pending.perm),
                atime: pending.atime.map_or(pending.mtime, |atime| *atime),
                mtime: pending.mtime,
            };
            make::apply_last(fd, &last, acls, path)
        })
    }
}
