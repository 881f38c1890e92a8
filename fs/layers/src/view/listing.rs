//! Merging the listings of the layers' folders.

use std::collections::HashSet;
use std::sync::Arc;

use super::names::Known;
use super::{DirNode, Listed, View};
use crate::error::Result;
use crate::layer::{LayerDir, LayerEntry, Markers, list, number_at};
use crate::name::Name;
use crate::sys::stat::FileKind;

/// One name of a folder, and the place that says what it is.
#[derive(Clone, Debug)]
pub struct Line {
    /// The name.
    pub name: Name,
    /// Its type.
    pub kind: FileKind,
    /// Inode number on disk.
    pub ino: u64,
    /// Which of the folder's places.
    pub place: usize,
    /// The name is hidden there.
    pub whiteout: bool,
}

impl View {
    /// The names of a folder, each once, sorted by their bytes, without what is hidden.
    pub fn list(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        let mut lines = self.lines(&dir.locs, None)?;
        lines.retain(|line| !line.whiteout);
        self.listed(dir, lines)
    }

    /// The same, with the names that a layer hides.
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

    /// The number that a line shows.
    pub fn line_number(&self, places: &[Arc<LayerDir>], line: &Line) -> Result<u64> {
        let Some(place) = places.get(line.place) else {
            return Ok(line.ino);
        };
        let mark = if self.markers(place.layer()) == Markers::Read && !line.whiteout {
            number_at(place, &line.name)?
        } else {
            None
        };
        Ok(self.number_of(place.layer(), line.ino, mark))
    }

    /// The names of a folder that lies at these places, each once, in no order, with those that are hidden
    /// and with no system call for a single one.
    pub fn lines(&self, places: &[Arc<LayerDir>], known: Option<Known<'_>>) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        let mut seen = HashSet::new();
        let read = known.map_or(places.len(), |known| known.above);
        for (at, place) in places.iter().enumerate().take(read) {
            // The first layer that has the name decides. The last one's need not be remembered.
            let last = at + 1 == places.len();
            for entry in list(place, self.markers(place.layer()))? {
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
