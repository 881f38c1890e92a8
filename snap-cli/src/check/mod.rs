//! Whether a store holds together: what its files say, whether what they name is there and unchanged, and
//! what lies about that nothing needs. And putting in order what can be, without ever destroying the only
//! copy of anything.
//!
//! Looking changes nothing but what is noted of layers that were never measured; all putting in order
//! stands in [`repair`].

mod layers;
mod leftovers;
mod manifests;
pub mod repair;

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::container::durability::make_all_durable;
use crate::error::Result;
use crate::store::Store;
use crate::store::manifest::{
    ContainerId, ContainerManifest, LayerId, LayerKind, SnapshotId, SnapshotManifest,
};
use crate::store::name::ContainerName;
use crate::tree::error::OnProgress;

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

/// What somebody wants to know.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Only this container, and nothing that lies about.
    pub only: Option<ContainerName>,
    /// Read all contents.
    pub deep: bool,
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

    fn add(
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
struct Known {
    id: ContainerId,
    manifest: ContainerManifest,
    /// The snapshots whose files could be read.
    snapshots: BTreeMap<SnapshotId, SnapshotManifest>,
}

/// Looks at a store.
pub fn check(store: &Store, wish: &Wish, progress: OnProgress<'_>) -> Result<Report> {
    let mut report = Report::default();
    // What a background sync did not come to is whole as long as the machine has not gone down.
    if let Err(error) = make_all_durable(store, wish.only.as_ref()) {
        log::warn!("snapshots stay settling: {error}");
    }
    let known = {
        // What a command is just making looks like something left over.
        let _alone = store.alone()?;
        let known = manifests::look(store, wish, &mut report)?;
        if wish.only.is_none() {
            leftovers::look(store, &known, &mut report)?;
        }
        known
    };
    // The rest takes its time: others may go on, and nothing is collected meanwhile.
    let _reading = store.share()?;
    layers::look(store, wish, &known, &mut report, progress)?;
    report.findings.sort_by_key(|finding| finding.level);
    Ok(report)
}
