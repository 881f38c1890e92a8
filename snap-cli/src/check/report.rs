//! What a verification finds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotManifest,
};
use crate::store::name::ContainerName;

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something is not what was written there, or not there.
    Damaged,
    /// Something is left over, or waits for the next command. Nothing is lost.
    Loose,
}

impl Level {
    /// The word that is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Loose => "loose",
        }
    }
}

/// What can be done about something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fix {
    /// A snapshot's file can be written anew: what its top layer was made over is known.
    Snapshot(ContainerId, SnapshotId, Vec<LayerId>),
    /// A layer's file can be written anew: what lies below it is known from a stack.
    Layer(LayerId, LayerKind, Vec<LayerId>),
    /// The counters and parents of a container can be set right.
    Container(ContainerName),
    /// The next command on the container puts it in order.
    Settle(ContainerName),
    /// A head's work folder can be made.
    Work(LayerId),
    /// What is left of a state can be accepted: a snapshot's, or what the container stands on.
    Accept(ContainerName, Option<SnapshotId>),
    /// Collection removes it.
    Collect,
}

/// Something that is not as it should be.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How bad it is.
    pub level: Level,
    /// A word for programs: "container", "snapshot", "layer", ...
    pub about: &'static str,
    /// What is wrong.
    pub what: String,
    /// Where.
    pub path: PathBuf,
    /// What can be done.
    pub fix: Option<Fix>,
    /// What was done.
    pub done: Option<String>,
}

/// How much of the layers is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Depth {
    /// Names and attributes.
    #[default]
    Metadata,
    /// All contents too.
    Content,
}

/// The extent of a verification.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only this container, and nothing that lies about.
    pub only: Option<ContainerName>,
    /// How much of the layers is read.
    pub depth: Depth,
}

/// What was found in a store.
#[derive(Debug, Default)]
pub struct Report {
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// How many containers were looked at.
    pub containers: usize,
    /// How many layers were looked at.
    pub layers: usize,
    /// Of how many of them nothing had been known to compare with: from now on it is.
    pub new: usize,
}

impl Report {
    /// Whether something is damaged that was not put right.
    pub fn is_damaged(&self) -> bool {
        let bad = |finding: &Finding| finding.level == Level::Damaged && finding.done.is_none();
        self.findings.iter().any(bad)
    }

    pub(super) fn add(
        &mut self,
        level: Level,
        about: &'static str,
        path: PathBuf,
        what: impl Into<String>,
        fix: Option<Fix>,
    ) {
        self.findings.push(Finding {
            level,
            about,
            what: what.into(),
            path,
            fix,
            done: None,
        });
    }
}

/// A container whose manifest could be read.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) id: ContainerId,
    pub(super) manifest: ContainerManifest,
    /// The snapshots whose files could be read.
    pub(super) snapshots: BTreeMap<SnapshotId, SnapshotManifest>,
}
