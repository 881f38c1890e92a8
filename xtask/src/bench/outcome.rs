//! Results of a comparison, as they are stored in target/bench.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::machine::Machine;
use super::rows::Group;
use super::variants::REFERENCE;
use crate::run::{Failure, Result, note, target};

/// A benchmark that compares file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    /// `bench mounted`.
    Mounted,
    /// `bench work`.
    Work,
}

impl Comparison {
    /// Returns the name of the command.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Mounted => "mounted",
            Self::Work => "work",
        }
    }

    /// Returns the groups of its rows.
    pub(super) fn groups(self) -> &'static [Group] {
        match self {
            Self::Mounted => &Group::MOUNTED,
            Self::Work => &[Group::Work],
        }
    }

    fn path(self, whole: bool) -> Result<PathBuf> {
        let name = match whole {
            true => format!("{}.json", self.name()),
            false => format!("{}-partial.json", self.name()),
        };
        Ok(target()?.join("bench").join(name))
    }
}

/// Results of one comparison.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) machine: Machine,
    pub(super) ground: String,
    pub(super) rounds: usize,
    /// Number of files in the trees; of a root filesystem, all of its objects.
    pub(super) files: usize,
    /// Size of the big files; of a root filesystem, its size.
    pub(super) big_mib: usize,
    pub(super) variants: Vec<Told>,
    pub(super) lines: Vec<Line>,
    /// Number of inodes that a walk loaded, and the bytes of the daemon's memory that they take.
    pub(super) memory: BTreeMap<String, (u64, u64)>,
    /// Bytes of page cache that the first and the second reader of a library added.
    pub(super) page_cache: BTreeMap<String, [u64; 2]>,
}

/// A file system that was compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Told {
    pub(super) name: String,
    pub(super) options: String,
    /// Error if it could not be mounted.
    pub(super) refused: Option<String>,
    /// Outcome of the daemon's request to keep idle CPUs awake, if it reports it.
    #[serde(default)]
    pub(super) awake: Option<String>,
}

/// Results of one row.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) group: Group,
    pub(super) unit: String,
    pub(super) units: usize,
    pub(super) cells: BTreeMap<String, Cell>,
}

/// Results of one file system in a row.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Cell {
    /// Seconds that each round took.
    pub(super) seconds: Vec<f64>,
    /// Error of a round that failed.
    pub(super) error: Option<String>,
    /// Number of requests of one round, by kind.
    pub(super) requests: BTreeMap<String, u64>,
}

impl Cell {
    /// Returns median, minimum and maximum; None if a round failed.
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
    /// Returns median, minimum and maximum of a file system, as ratios to the median of the kernel's overlayfs.
    pub(super) fn ratio(&self, name: &str) -> Option<[f64; 3]> {
        let [reference, ..] = self.cells.get(REFERENCE)?.spread()?;
        let spread = self.cells.get(name)?.spread()?;
        (reference > 0.0).then(|| spread.map(|seconds| seconds / reference))
    }

    /// Returns the number of requests per unit.
    pub(super) fn requests(&self, name: &str) -> Option<f64> {
        let requests = &self.cells.get(name)?.requests;
        let total: u64 = requests.values().sum();
        (!requests.is_empty()).then(|| total as f64 / self.units.max(1) as f64)
    }
}

impl Outcome {
    /// Returns the names of the file systems that were compared, without the reference.
    pub(super) fn compared(&self) -> impl Iterator<Item = &str> {
        let mounted = self
            .variants
            .iter()
            .filter(|variant| variant.refused.is_none());
        mounted
            .map(|variant| variant.name.as_str())
            .filter(|name| *name != REFERENCE)
    }

    /// Returns the geometric mean of a file system's ratios, and the number of rows that it covers.
    pub(super) fn mean(&self, name: &str) -> Option<(f64, usize)> {
        let ratios: Vec<f64> = self
            .lines
            .iter()
            .filter_map(|line| line.ratio(name).map(|[median, ..]| median.ln()))
            .collect();
        let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
        (!ratios.is_empty()).then(|| (mean.exp(), ratios.len()))
    }

    /// Returns the number of failed measurements.
    pub(super) fn failed(&self) -> usize {
        let cells = self.lines.iter().flat_map(|line| line.cells.values());
        cells.filter(|cell| cell.error.is_some()).count()
    }

    /// Stores the results. A partial run does not overwrite the results of a complete run.
    pub(super) fn keep(&self, comparison: Comparison, whole: bool) -> Result<()> {
        let path = comparison.path(whole)?;
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Failure(format!("cannot serialize the results: {error}")))?;
        std::fs::write(&path, text)?;
        note(&format!("the results are in {}", path.display()));
        Ok(())
    }

    /// Reads the results of the last complete run; returns None if there was none.
    pub(super) fn kept(comparison: Comparison) -> Result<Option<Self>> {
        let path = comparison.path(true)?;
        let failed =
            |error: &dyn std::fmt::Display| Failure(format!("{}: {error}", path.display()));
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| failed(&error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn medians_and_ratios_are_computed() {
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
