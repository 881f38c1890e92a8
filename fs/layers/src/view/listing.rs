//! Merged listings of directories.

use std::collections::HashSet;
use std::sync::Arc;

use super::names::PartialIndex;
use super::{DirNode, Listed, View};
use crate::error::Result;
use crate::layer::{LayerDir, LayerEntry, Markers, list, number_at};
use crate::name::Name;
use crate::sys::stat::FileKind;

/// A name in a merged directory, with the entry of the topmost layer that contains it.
#[derive(Clone, Debug)]
pub struct MergedEntry {
    /// The name.
    pub name: Name,
    /// The type.
    pub kind: FileKind,
    /// The inode number on disk.
    pub ino: u64,
    /// The index, among the merged directories, of the one that contains the entry.
    pub dir_index: usize,
    /// Whether the entry is a whiteout.
    pub whiteout: bool,
}

impl View {
    /// Lists a directory, without hidden names, sorted by the bytes of the names.
    pub fn list(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        let mut entries = self.merged_entries(&dir.locs, None)?;
        entries.retain(|entry| !entry.whiteout);
        self.listed(dir, entries)
    }

    /// Lists a directory, including hidden names, sorted by the bytes of the names.
    pub fn list_raw(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        let entries = self.merged_entries(&dir.locs, None)?;
        self.listed(dir, entries)
    }

    fn listed(&self, dir: &DirNode, mut entries: Vec<MergedEntry>) -> Result<Vec<Listed>> {
        entries.sort_unstable_by(|one, two| one.name.cmp(&two.name));
        let listed = entries.into_iter().map(|entry| {
            Ok(Listed {
                ino: self.merged_entry_ino(&dir.locs, &entry)?,
                name: entry.name,
                kind: entry.kind,
                whiteout: entry.whiteout,
            })
        });
        listed.collect()
    }

    /// Returns the visible inode number of an entry of the directory that is merged from `dirs`.
    pub fn merged_entry_ino(&self, dirs: &[Arc<LayerDir>], entry: &MergedEntry) -> Result<u64> {
        let Some(dir) = dirs.get(entry.dir_index) else {
            return Ok(entry.ino);
        };
        let retained = if self.markers(dir.layer()) == Markers::Read && !entry.whiteout {
            number_at(dir, &entry.name)?
        } else {
            None
        };
        Ok(self.number_of(dir.layer(), entry.ino, retained))
    }

    /// Lists the directory that is merged from `dirs`, including hidden names, in no particular order.
    ///
    /// The directories that `known` covers are not read. Unlike [`Self::list`], this reads no `cowl.ino` xattrs.
    pub fn merged_entries(
        &self,
        dirs: &[Arc<LayerDir>],
        known: Option<PartialIndex<'_>>,
    ) -> Result<Vec<MergedEntry>> {
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        let read = known.map_or(dirs.len(), |known| known.above);
        for (at, dir) in dirs.iter().enumerate().take(read) {
            // The first layer that has the name decides. The last one's need not be remembered.
            let last = at + 1 == dirs.len();
            for entry in list(dir, self.markers(dir.layer()))? {
                let new = if at == 0 && last {
                    true
                } else if last {
                    !seen.contains(&entry.name)
                } else {
                    seen.insert(entry.name.clone())
                };
                if new {
                    entries.push(MergedEntry::new(at, entry));
                }
            }
        }
        if let Some(known) = known {
            let below = known
                .names
                .iter()
                .filter(|one| !seen.contains(&one.top.name));
            entries.extend(
                below.map(|one| MergedEntry::new(known.above + one.first(), one.top.clone())),
            );
        }
        Ok(entries)
    }
}

impl MergedEntry {
    fn new(dir_index: usize, entry: LayerEntry) -> Self {
        Self {
            name: entry.name,
            kind: entry.kind,
            ino: entry.ino,
            dir_index,
            whiteout: entry.whiteout,
        }
    }
}
