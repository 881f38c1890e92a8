//! Sets the attributes of directories that are being filled.
//!
//! Most are set immediately. Those that change while a directory is filled, or affect the objects created in it, are
//! set at the end.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cowl_layers::sys::attr::SetTime;

use super::dir_map::DirMap;
use super::limits;
use crate::tree::attrs::{self, Attrs, FinalAttrs};
use crate::tree::error::Result;
use crate::tree::omissions::Omissions;

/// The attributes that directories get at the end.
#[derive(Debug, Default)]
pub(super) struct DirAttrs {
    pending: DirMap<Pending>,
    /// The ACLs, deduplicated: many directories have the same.
    acls: BTreeSet<Arc<[u8]>>,
    acl_bytes: usize,
}

/// The name and value of an ACL xattr.
type Acl = (&'static [u8], Arc<[u8]>);

#[derive(Debug)]
struct Pending {
    perm: u32,
    mtime: SetTime,
    /// `None`: the same as `mtime`.
    atime: Option<Box<SetTime>>,
    acls: Option<Box<[Acl]>>,
}

impl DirAttrs {
    /// Sets the owner and xattrs of the directory behind `fd`, and records the rest.
    pub(super) fn set(
        &mut self,
        fd: BorrowedFd<'_>,
        path: &[u8],
        attrs: Attrs,
        omissions: &mut Omissions,
    ) -> Result<()> {
        let perm = attrs::apply_first(fd, &attrs, path, omissions)?;
        let mut acls = Vec::new();
        for (name, value) in attrs.xattrs {
            if let Some(name) = attrs::acl_name(&name) {
                acls.push((name, self.acl(value, path)?));
            }
        }
        let pending = Pending {
            perm,
            mtime: attrs.mtime,
            atime: (attrs.atime != attrs.mtime).then(|| Box::new(attrs.atime)),
            acls: (!acls.is_empty()).then(|| acls.into()),
        };
        self.pending.set(path, pending)
    }

    /// Adds an ACL to the recorded attributes of a directory.
    pub(super) fn add_acl(
        &mut self,
        path: &[u8],
        name: &'static [u8],
        value: Vec<u8>,
    ) -> Result<()> {
        let value = self.acl(value, path)?;
        self.pending.change(path, |slot| {
            if let Some(pending) = slot {
                let acls = pending.acls.take().unwrap_or_default().into_vec();
                let others = acls.into_iter().filter(|(other, _)| *other != name);
                pending.acls = Some(others.chain([(name, value)]).collect());
            }
        })
    }

    fn acl(&mut self, value: Vec<u8>, path: &[u8]) -> Result<Arc<[u8]>> {
        if let Some(known) = self.acls.get(value.as_slice()) {
            return Ok(Arc::clone(known));
        }
        self.acl_bytes += value.len();
        if self.acl_bytes > limits::DIRECTORY_ACLS {
            let what = format!(
                "the distinct ACLs of directories exceed the limit of {} bytes",
                limits::DIRECTORY_ACLS
            );
            return Err(limits::exceeded(what, path));
        }
        let new: Arc<[u8]> = value.into();
        self.acls.insert(Arc::clone(&new));
        Ok(new)
    }

    /// Discards the records of a directory that is about to be replaced, and of everything in it.
    pub(super) fn forget(&mut self, path: &[u8]) {
        self.pending.forget(path);
    }

    /// Sets the recorded attributes, of each directory after everything in it: a directory that its owner may not
    /// search must not block access to those below it.
    pub(super) fn finish(self, root: BorrowedFd<'_>, omissions: &mut Omissions) -> Result<()> {
        self.pending.visit(root, &mut |pending, fd, path| {
            let path = if path.is_empty() { b"." } else { path };
            let acls = pending.acls.unwrap_or_default();
            let acls = acls.iter().map(|(name, value)| (*name, &**value));
            let last = FinalAttrs {
                perm: Some(pending.perm),
                atime: pending.atime.map_or(pending.mtime, |atime| *atime),
                mtime: pending.mtime,
            };
            attrs::apply_last(fd, &last, acls, path, omissions)
        })
    }
}
