//! What a comparison found, as it is kept in target/bench.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::rows::Group;
use super::variants::REFERENCE;
use crate::run::{Failure, Result, note, target};

/// One comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) machine: Machine,
    pub(super) ground: String,
    pub(super) rounds: usize,
    pub(super) files: usize,
    pub(super) big_mib: usize,
    pub(super) variants: Vec<Told>,
    pub(super) lines: Vec<Line>,
    /// Inodes that a walk made known, and the bytes of the daemon's memory that they took.
    pub(super) memory: BTreeMap<String, (u64, u64)>,
    /// Bytes of page cache that the first and the second reader of one library took.
    pub(super) page_cache: BTreeMap<String, [u64; 2]>,
}

/// A file system that was compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Told {
    pub(super) name: String,
    pub(super) options: String,
    /// Why it could not be mounted.
    pub(super) refused: Option<String>,
}

/// A row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) group: Group,
    pub(super) unit: String,
    pub(super) units: usize,
    pub(super) cells: BTreeMap<String, Cell>,
}

/// One file system's part of a row.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Cell {
    /// Of each round.
    pub(super) seconds: Vec<f64>,
    /// What came in a round that failed.
    pub(super) error: Option<String>,
    /// Requests by kind, of one round.
    pub(super) requests: BTreeMap<String, u64>,
}

impl Cell {
    /// Median, smallest, largest; nothing where a round failed.
    pub(super) fn spread(&self) -> Option<[f64; 3]> {
        if self.error.is_some() {
            return None;
        }
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = match sorted.len() % 2 {
            0 => (upper + *sorted.get(middle - 1)?) / 2.0,
            _ => upper,
        };
        Some([median, *sorted.first()?, *sorted.last()?])
    }
}

impl Line {
    /// Median, smallest and largest of a file system, as ratios to the kernel's median.
    pub(super) fn ratio(&self, name: &str) -> Option<[f64; 3]> {
        let [reference, ..] = self.cells.get(REFERENCE)?.spread()?;
        let spread = self.cells.get(name)?.spread()?;
        (reference > 0.0).then(|| spread.map(|seconds| seconds / reference))
    }

    /// How many requests for each unit.
    pub(super) fn requests(&self, name: &str) -> Option<f64> {
        let requests = &self.cells.get(name)?.requests;
        let total: u64 = requests.values().sum();
        (!requests.is_empty()).then(|| total as f64 / self.units.max(1) as f64)
    }
}

impl Outcome {
    /// Names of what was compared, the one that all is compared to left out.
    pub(super) fn compared(&self) -> impl Iterator<Item = &str> {
        let able = self.variants.iter().filter(|told| told.refused.is_none());
        able.map(|told| told.name.as_str())
            .filter(|name| *name != REFERENCE)
    }

    /// The geometric mean of a file system's ratios, and of how many rows it is.
    pub(super) fn mean(&self, name: &str) -> Option<(f64, usize)> {
        let ratios: Vec<f64> = self
            .lines
            .iter()
            .filter_map(|line| line.ratio(name).map(|[median, ..]| median.ln()))
            .collect();
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        (!ratios.is_empty()).then(|| (mean.exp(), ratios.len()))
    }

    /// How many measurements failed.
    pub(super) fn failed(&self) -> usize {
        let cells = self.lines.iter().flat_map(|line| line.cells.values());
        cells.filter(|cell| cell.error.is_some()).count()
    }

    fn place(whole: bool) -> Result<PathBuf> {
        let name = if whole {
            "mounted.json"
        } else {
            "partial.json"
        };
        Ok(target()?.join("bench").join(name))
    }

    /// Keeps it; one of some rows only does not take the place of a whole one.
    pub(super) fn keep(&self, whole: bool) -> Result<()> {
        let place = Self::place(whole)?;
        if let Some(folder) = place.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Failure(format!("the result can't be written down: {error}")))?;
        std::fs::write(&place, text)?;
        note(&format!("the result is in {}", place.display()));
        Ok(())
    }

    /// The last whole one.
    pub(super) fn kept() -> Result<Self> {
        let place = Self::place(true)?;
        let text = std::fs::read(&place).map_err(|error| {
            Failure(format!(
                "{}: {error}; `cargo xtask bench mounted` makes it",
                place.display()
            ))
        })?;
        serde_json::from_slice(&text)
            .map_err(|error| Failure(format!("{}: {error}", place.display())))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn medians_and_ratios() {
        let cell = |seconds: &[f64]| Cell {
            seconds: seconds.to_vec(),
            ..Cell::default()
        };
        let mut line = Line {
            name: "walk".to_owned(),
            group: Group::Metadata,
            unit: "file".to_owned(),
            units: 4,
            cells: BTreeMap::from([
                (REFERENCE.to_owned(), cell(&[3.0, 1.0, 2.0])),
                ("even".to_owned(), cell(&[4.0, 2.0])),
                ("none".to_owned(), cell(&[])),
            ]),
        };
        assert_eq!(line.ratio("even"), Some([1.5, 1.0, 2.0]));
        assert_eq!(line.ratio("none"), None);
        assert_eq!(line.ratio("absent"), None);
        let even = line.cells.get_mut("even").unwrap();
        even.requests.insert("lookup".to_owned(), 6);
        assert_eq!(line.requests("even"), Some(1.5));
        assert_eq!(line.requests("none"), None);
        line.cells.get_mut("even").unwrap().error = Some("failed".to_owned());
        assert_eq!(line.ratio("even"), None);
    }
}
