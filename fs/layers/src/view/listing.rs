//! Merged listings of directories.

use std::collections::HashSet;
use std::sync::Arc;

use super::names::Known;
use super::{DirNode, Listed, View};
use crate::error::Result;
use crate::layer::{LayerDir, LayerEntry, Markers, list, number_at};
use crate::name::Name;
use crate::sys::stat::FileKind;

/// A name in a merged directory, with the entry of the topmost layer that contains it.
#[derive(Clone, Debug)]
pub struct Line {
    /// The name.
    pub name: Name,
    /// The type.
    pub kind: FileKind,
    /// The inode number on disk.
    pub ino: u64,
    /// The index, among the merged directories, of the one that contains the entry.
    pub place: usize,
    /// Whether the entry is a whiteout.
    pub whiteout: bool,
}

impl View {
    /// Lists a directory, without hidden names, sorted by the bytes of the names.
    pub fn list(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        let mut lines = self.lines(&dir.locs, None)?;
        lines.retain(|line| !line.whiteout);
        self.listed(dir, lines)
    }

    /// Lists a directory, including hidden names, sorted by the bytes of the names.
    pub fn list_raw(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        let lines = self.lines(&dir.locs, None)?;
        self.listed(dir, lines)
    }

    fn listed(&self, dir: &DirNode, mut lines: Vec<Line>) -> Result<Vec<Listed>> {
        lines.sort_unstable_by(|one, two| one.name.cmp(&two.name));
        let listed = lines.into_iter().map(|line| {
            Ok(Listed {
                ino: self.line_number(&dir.locs, &line)?,
                name: line.name,
                kind: line.kind,
                whiteout: line.whiteout,
            })
        });
        listed.collect()
    }

    /// Returns the visible inode number of an entry of the directory that is merged from `dirs`.
    pub fn line_number(&self, dirs: &[Arc<LayerDir>], line: &Line) -> Result<u64> {
        let Some(dir) = dirs.get(line.place) else {
            return Ok(line.ino);
        };
        let retained = if self.markers(dir.layer()) == Markers::Read && !line.whiteout {
            number_at(dir, &line.name)?
        } else {
            None
        };
        Ok(self.number_of(dir.layer(), line.ino, retained))
    }

    /// Lists the directory that is merged from `dirs`, including hidden names, in no particular order.
    ///
    /// The directories that `known` covers are not read. Unlike [`Self::list`], this reads no `cowl.ino` xattrs.
    pub fn lines(&self, dirs: &[Arc<LayerDir>], known: Option<Known<'_>>) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
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
                    lines.push(Line::of(at, entry));
                }
            }
        }
        if let Some(known) = known {
            let below = known
                .names
                .iter()
                .filter(|one| !seen.contains(&one.top.name));
            lines.extend(below.map(|one| Line::of(known.above + one.first(), one.top.clone())));
        }
        Ok(lines)
    }
}

impl Line {
    fn of(place: usize, entry: LayerEntry) -> Self {
        Self {
            name: entry.name,
            kind: entry.kind,
            ino: entry.ino,
            place,
            whiteout: entry.whiteout,
        }
    }
}
