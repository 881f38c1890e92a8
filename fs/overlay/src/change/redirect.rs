//! Redirects, which record where the lower layers have an object.
//!
//! An object without a redirect is found in the lower layers by its own path, so one must be set before the object
//! gets another path.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::copy_up::{CopyExtent, CopyUp};
use crate::inode::Inode;
use crate::names::{LinkIndex, path_below};
use crate::reach::{Context, access_path};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;
use cowl_layers::sys;
use cowl_layers::view::resolve::join;

/// The target directory of a rename, relative to the source directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    SameDir,
    OtherDir,
}

/// Copy-up with a redirect, before a name changes.
#[derive(Clone, Copy)]
pub(crate) struct Redirects<'o> {
    pub(crate) cx: &'o Context<'o>,
    pub(crate) copy_up: CopyUp<'o>,
    pub(crate) index: &'o LinkIndex,
}

impl Redirects<'_> {
    /// Copies up a file that is about to get another name.
    ///
    /// A metacopy gets a redirect to its content.
    pub(super) fn copy_up_file_with_redirect(&self, inode: &Arc<Inode>) -> Result<()> {
        self.copy_up.copy_up_file(inode, CopyExtent::Metadata)?;
        let file = inode.file()?;
        if file.data.is_none() || matches!(file.redirect.as_deref(), Some(Redirect::Path(_))) {
            return Ok(());
        }
        let alias = file.aliases.first().ok_or(Error::NOT_FOUND)?;
        let last = match file.redirect.as_deref() {
            Some(Redirect::Sibling(name)) => name.clone(),
            _ => alias.name.clone(),
        };
        let stack = &self.cx.stack;
        let path = join(&path_below(stack, &alias.parent)?, &last);
        let redirect = Redirect::Path(path.into());
        let marker = stack.upper()?.layer.space().redirect().as_bytes();
        let target = access_path(inode)?;
        match sys::xattr::set((*target).as_fd(), marker, &redirect.to_value()) {
            Ok(()) => inode.update_file(|file| file.redirect = Some(Box::new(redirect))),
            // A path of thousands of bytes does not fit in an xattr. Copy up the content, which then needs no
            // redirect.
            Err(Error::Errno(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)) => {
                self.copy_up.copy_up_file(inode, CopyExtent::Data).map(drop)
            }
            Err(error) => Err(error),
        }
    }

    /// Copies up an object of any type that is about to be moved.
    ///
    /// A merged directory and a metacopy get a redirect. Returns EXDEV if the redirect of a directory does not fit.
    pub(super) fn copy_up_with_redirect(&self, inode: &Arc<Inode>, to: Destination) -> Result<()> {
        if !inode.is_dir() {
            return self.copy_up_file_with_redirect(inode);
        }
        let (dir, upper_dir) = self.copy_up.copy_up_dir(inode)?;
        if dir.locs.len() < 2 || matches!(dir.redirect, Some(Redirect::Path(_))) {
            return Ok(());
        }
        let stack = &self.cx.stack;
        let mut redirect = Redirect::Path(path_below(stack, inode)?.into());
        let marker = stack.upper()?.layer.space().redirect().as_bytes();
        let set = |value: &Redirect| {
            sys::xattr::set((*upper_dir.fd()?).as_fd(), marker, &value.to_value())
        };
        match set(&redirect) {
            Ok(()) => {}
            // A path of thousands of bytes does not fit in an xattr. Within the same parent directory, the old
            // name is sufficient as a redirect.
            Err(Error::Errno(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE))
                if to == Destination::SameDir =>
            {
                redirect = match (dir.redirect, dir.alias) {
                    (Some(sibling @ Redirect::Sibling(_)), _) => sibling,
                    (_, Some(alias)) => Redirect::Sibling(alias.name),
                    (_, None) => return Err(Error::NOT_FOUND),
                };
                set(&redirect)?;
            }
            // After EXDEV, programs such as mv(1) fall back to a copy.
            Err(Error::Errno(Errno::NOSPC | Errno::TOOBIG | Errno::RANGE)) => {
                return Err(Error::Errno(Errno::XDEV));
            }
            Err(error) => return Err(error),
        }
        inode.update_dir(|dir| dir.redirect = Some(redirect))?;
        self.index.add_moved(inode);
        Ok(())
    }
}
