//! Writing a state as a tar archive that GNU tar unpacks to the same tree.
//!
//! Names start with "./" as `tar -C DIR .` writes them, and the same state always gives the same bytes:
//! entries are sorted and nothing but the state goes in. Sockets can't be in a tar and are left out, with a
//! note, as GNU tar does.

use std::io::Write;

use cowl_layers::view::View;

use super::compress::{Compression, Encoder};
use super::report::Report;
use super::writer::{Holes, Writer, cannot_write};
use crate::tree::error::{OnProgress, Result};
use crate::tree::walk::{self, Item};

/// Writes the state, with a comment on it if there is one. The writer is flushed; making it durable is the
/// caller's.
pub fn tar(
    view: &View,
    comment: Option<&str>,
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<Report> {
    with_entries(output, compression, Holes::Left, progress, |writer| {
        comment.map_or(Ok(()), |comment| writer.comment(comment))?;
        walk::visit_state(view, &mut |item: &Item<'_>| writer.item(item))
    })
}

/// Writes an archive of the entries that `entries` gives.
pub(super) fn with_entries<W: Write>(
    output: W,
    compression: Compression,
    holes: Holes,
    progress: OnProgress<'_>,
    entries: impl FnOnce(&mut Writer<'_, Encoder<W>>) -> Result<()>,
) -> Result<Report> {
    let encoder = Encoder::new(output, compression).map_err(cannot_write)?;
    let mut writer = Writer::new(encoder, progress).with_holes(holes);
    entries(&mut writer)?;
    let (encoder, result) = writer.finish()?;
    let mut output = encoder.finish().map_err(cannot_write)?;
    output.flush().map_err(cannot_write)?;
    Ok(result)
}
