//! Copies the root filesystem of an LXC snapshot into a plain directory.

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

/// Opens the merged view of an LXC overlay.
fn open_overlay(delta: &Path, lowers: &[PathBuf]) -> Result<View> {
    let space = XattrSpace::detect();
    let mut layers = vec![Layer::open_foreign(delta, space)?];
    for lower in lowers {
        layers.push(Layer::open_foreign(lower, space)?);
    }
    Ok(View::new(layers))
}

/// Copies a root filesystem into a new plain directory, and verifies that it did not change meanwhile.
///
/// Returns notes on files that were not copied.
pub fn copy(from: &Rootfs, to: &Path, progress: OnProgress<'_>) -> Result<Vec<String>> {
    let done = match from {
        Rootfs::Dir(path) => import::copy_plain(path, to, progress)?,
        Rootfs::Overlay { delta, lowers } => {
            export_dir::fill(&open_overlay(delta, lowers)?, to, progress)?
        }
        Rootfs::Other(_) => {
            return Err(Error::failed(
                "cannot copy the root filesystem: it is not a directory",
            ));
        }
    };
    if let (Rootfs::Dir(path), true) = (from, done.notes.is_empty())
        && measure(path)?.metadata_digest != measure(to)?.metadata_digest
    {
        return Err(Error::failed(format!(
            "cannot copy {}: it changed during the copy",
            path.shown()
        ))
        .hint("stop all processes that write to it, then retry"));
    }
    Ok(done.notes.lines())
}
