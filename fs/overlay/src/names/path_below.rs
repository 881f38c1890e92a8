//! Paths of directories in the lower layers, which are the values of redirect xattrs.

use std::sync::Arc;

use crate::inode::Inode;
use crate::reach::Stack;
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::format::Redirect;

/// Returns the path of a directory in the lower layers, without a leading slash.
///
/// It differs from the visible path if the directory or a parent was renamed in this upper, which recorded the path in
/// a redirect.
pub(crate) fn path_below(stack: &Stack, inode: &Arc<Inode>) -> Result<Vec<u8>> {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut next = inode.clone();
    loop {
        let dir = next.dir()?;
        let redirect = dir
            .redirect
            .as_ref()
            .filter(|_| stack.upper_dir(&dir).is_some());
        let Some(alias) = &dir.alias else {
            if dir.removed {
                return Err(Error::Errno(Errno::NOENT));
            }
            break;
        };
        match redirect {
            Some(Redirect::Path(path)) => {
                parts.push(path.to_vec());
                break;
            }
            Some(Redirect::Sibling(name)) => parts.push(name.as_bytes().to_vec()),
            None => parts.push(alias.name.as_bytes().to_vec()),
        }
        next = alias.parent.clone();
    }
    parts.reverse();
    Ok(parts.join(&b'/'))
}
