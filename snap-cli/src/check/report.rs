//! The result of a verification.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotManifest,
};
use crate::store::name::ContainerName;

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// An object is missing, or not as it was written.
    Damaged,
    /// An object is a leftover, or waits for the next command. No data is lost.
    Loose,
}

impl Severity {
    /// Returns the name that is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Loose => "loose",
        }
    }
}

/// A possible repair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Rewrite the file of a snapshot with this stack, which is known from its top layer.
    Snapshot(ContainerId, SnapshotId, Vec<LayerId>),
    /// Rewrite the file of a layer. The layers below it are known from a stack that contains it.
    Layer(LayerId, LayerKind, Vec<LayerId>),
    /// Correct the counters and parents of a container.
    Container(ContainerName),
    /// Complete or roll back an interrupted operation, as the next command on the container would.
    Settle(ContainerName),
    /// Create the missing work directory of a head.
    Work(LayerId),
    /// Accept an incomplete state as it is: of a snapshot, or of the layers below the head (`None`).
    Accept(ContainerName, Option<SnapshotId>),
    /// Remove the retained blob of a layer. An export creates it from the files of the layer.
    Blob(LayerId),
    /// Collect the object as garbage.
    Collect,
}

/// A problem that a verification found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The severity.
    pub level: Severity,
    /// The kind of the affected object, for programs: "container", "snapshot", "layer", ...
    pub about: &'static str,
    /// A description of the problem.
    pub what: String,
    /// The path of the affected object.
    pub path: PathBuf,
    /// The possible repair, if any.
    pub fix: Option<Fix>,
    /// A description of the repair that was performed, if any.
    pub done: Option<String>,
}

/// The extent to which layers are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Depth {
    /// Read names and attributes.
    #[default]
    Metadata,
    /// Read all contents, too.
    Content,
}

/// The extent of a verification.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Verify only this container, and no leftovers.
    pub only: Option<ContainerName>,
    /// The extent to which layers are read.
    pub depth: Depth,
}

/// The result of the verification of a store.
#[derive(Debug, Default)]
pub struct CheckReport {
    /// The problems found.
    pub findings: Vec<Finding>,
    /// The number of containers that were checked.
    pub containers: usize,
    /// The number of layers that were checked.
    pub layers: usize,
    /// The number of these layers without recorded values to compare with. This verification recorded them.
    pub new: usize,
}

impl CheckReport {
    /// Returns whether there is damage that was not repaired.
    pub fn is_damaged(&self) -> bool {
        let bad = |finding: &Finding| finding.level == Severity::Damaged && finding.done.is_none();
        self.findings.iter().any(bad)
    }

    pub(super) fn add(
        &mut self,
        level: Severity,
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

/// A container with a readable manifest.
#[derive(Debug)]
pub(super) struct ReadableContainer {
    pub(super) id: ContainerId,
    pub(super) manifest: ContainerManifest,
    /// The snapshots with readable files.
    pub(super) snapshots: BTreeMap<SnapshotId, SnapshotManifest>,
}
