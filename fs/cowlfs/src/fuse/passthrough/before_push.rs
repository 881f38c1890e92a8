//! What a push of a layer needs to know about files with passthrough (docs/decisions/0043).

use std::sync::Arc;

use cowl_overlay::{Ledger, PassthroughFile};

use super::BackingFiles;

impl BackingFiles {
    /// Ends the registrations of files that the kernel does not access.
    ///
    /// The caller must call this before it freezes a layer. The daemon reads the files of a frozen layer itself, except
    /// those that are usually replaced, and it would take a registration as evidence that a file is usually replaced.
    pub(in crate::fuse) fn end_unused(&self, ledger: Option<&Arc<Ledger>>) {
        let mut ended = Vec::new();
        let mut table = self.table.lock();
        let idle: Vec<u64> = table.idle.iter().map(|(ino, ())| *ino).collect();
        for ino in idle {
            let Some(file) = table.files.get_mut(&ino).filter(|file| !file.has_writer) else {
                continue;
            };
            ended.extend(file.backing.take());
            if !file.must_be_retained() {
                table.files.remove(&ino);
            }
            table.idle.pop(&ino);
            Self::note(&table, ino, ledger);
        }
        drop(table);
        // The files are unregistered here, after the lock was released.
        drop(ended);
    }

    /// Returns the files that the kernel reads or writes without requests.
    pub(in crate::fuse) fn in_use(&self) -> Vec<PassthroughFile> {
        let table = self.table.lock();
        let in_use = table
            .files
            .iter()
            .filter(|(_, file)| file.has_writer || file.is_passthrough);
        in_use
            .map(|(ino, file)| PassthroughFile {
                version: file.backing.as_ref().map(|backing| backing.version),
                node_id: *ino,
                is_written: file.has_writer,
                is_mapped: file.has_volatile_attr,
            })
            .collect()
    }
}
