//! Merging the listings of the layers' folders.

use std::collections::HashSet;

use super::{DirNode, Listed, View};
use crate::error::Result;
use crate::layer::list;

impl View {
    /// The names of a folder, each once, sorted by their bytes, without what is hidden.
    pub fn list(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        self.merge(dir, false)
    }

    /// The same, with the names that a layer hides.
    pub fn list_raw(&self, dir: &DirNode) -> Result<Vec<Listed>> {
        self.merge(dir, true)
    }

    fn merge(&self, dir: &DirNode, raw: bool) -> Result<Vec<Listed>> {
        let mut merged = Vec::new();
        let mut seen = HashSet::new();
        for (depth, loc) in dir.locs.iter().enumerate() {
            let last = depth + 1 == dir.locs.len();
            for entry in list(loc, self.marks(loc.layer()))? {
                // The first layer that has the name decides. The last one's need not be remembered.
                let new = if depth == 0 && last {
                    true
                } else if last {
                    !seen.contains(&entry.name)
                } else {
                    seen.insert(entry.name.clone())
                };
                if !new || (entry.whiteout && !raw) {
                    continue;
                }
                let ino = self.number_of(loc.layer(), entry.ino, entry.number);
                merged.push(Listed {
                    name: entry.name,
                    kind: entry.kind,
                    ino,
                    whiteout: entry.whiteout,
                });
            }
        }
        merged.sort_unstable_by(|one, two| one.name.cmp(&two.name));
        Ok(merged)
    }
}
