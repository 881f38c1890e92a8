//! Writes a state as a tar archive that GNU tar unpacks to the same tree.
//!
//! Names begin with "./", as in the output of `tar -C DIR .`. The output is deterministic: entries are sorted, and
//! depend only on the state. Sockets are skipped with a note, as GNU tar does, because the format cannot represent them.

use std::io::Write;

use cowl_layers::view::View;

use super::compress::{Compression, Encoder};
use super::report::TransferReport;
use super::writer::{Holes, Writer, cannot_write};
use crate::tree::error::{OnProgress, Result};
use crate::tree::walk::{self, Item, ItemAttributes};

/// Writes a state as a tar archive, with an optional comment.
///
/// The writer is flushed. The caller must sync it.
pub fn write_tar(
    view: &View,
    comment: Option<&str>,
    holes: Holes,
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    write_entries(output, compression, holes, progress, |writer| {
        comment.map_or(Ok(()), |comment| writer.write_comment(comment))?;
        walk::visit_state(view, ItemAttributes::Original, &mut |item: &Item<'_>| {
            writer.write_item(item)
        })
    })
}

/// Writes an archive; `entries` is called to write its entries to a [`Writer`].
pub(super) fn write_entries<W: Write>(
    output: W,
    compression: Compression,
    holes: Holes,
    progress: OnProgress<'_>,
    entries: impl FnOnce(&mut Writer<'_, Encoder<W>>) -> Result<()>,
) -> Result<TransferReport> {
    let encoder = Encoder::new(output, compression).map_err(cannot_write)?;
    let mut writer = Writer::new(encoder, progress).with_holes(holes);
    entries(&mut writer)?;
    let (encoder, result) = writer.finish()?;
    let mut output = encoder.finish().map_err(cannot_write)?;
    output.flush().map_err(cannot_write)?;
    Ok(result)
}
