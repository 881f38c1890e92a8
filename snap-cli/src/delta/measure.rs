//! How large a layer is, for lists.

use std::collections::HashSet;
use std::path::Path;

use super::error::{Progress, Result};
use super::walk;

/// Entries in the tree (its root not counted, marks counted) and the bytes that it takes up on the
/// disk, each inode once.
pub fn measure(tree: &Path) -> Result<Progress> {
    let mut done = Progress::default();
    let mut seen = HashSet::new();
    walk::plain(tree, &mut |item| {
        done.entries += u64::from(!item.path.is_empty());
        if seen.insert((item.stat.dev, item.stat.ino)) {
            done.bytes += item.stat.blocks * 512;
        }
        Ok(())
    })?;
    Ok(done)
}
