//! Copying the root filesystem of an LXC snapshot into a plain directory.

use std::path::{Path, PathBuf};

use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::shown::Show as _;
use cowl_layers::view::View;

use super::layout::Rootfs;
use crate::archive::{export_dir, import};
use crate::error::{Error, Result};
use crate::tree::error::OnProgress;
use crate::tree::measure;

/// Returns the merged view of an overlay of LXC's.
fn view(delta: &Path, lowers: &[PathBuf]) -> Result<View> {
    let space = XattrSpace::detect();
    let mut layers = vec![Layer::open_foreign(delta, space)?];
    for lower in lowers {
        layers.push(Layer::open_foreign(lower, space)?);
    }
    Ok(View::new(layers))
}

/// Copies a root filesystem into a new plain directory, and verifies that it did not change meanwhile. Returns notes on
/// what was left out.
pub fn copy(from: &Rootfs, to: &Path, progress: OnProgress<'_>) -> Result<Vec<String>> {
    let done = match from {
        Rootfs::Folder(path) => import::copy_plain(path, to, progress)?,
        Rootfs::Overlay { delta, lowers } => export_dir::fill(&view(delta, lowers)?, to, progress)?,
        Rootfs::Other(_) => return Err(Error::failed("its files are in no folder")),
    };
    if let (Rootfs::Folder(path), true) = (from, done.notes.is_empty())
        && measure(path)?.looks != measure(to)?.looks
    {
        return Err(Error::failed(format!(
            "{} changed while it was copied; nothing else was changed",
            path.shown()
        ))
        .hint("try again when nobody writes to it"));
    }
    Ok(done
        .notes
        .iter()
        .map(|(path, why)| format!("{}: {why}", path.escape_ascii()))
        .collect())
}
