//! Pruning: removing what the rules of a container don't keep.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::keep::{Rules, choose};
use super::remove::{self, Removal};
use crate::container::Container;
use crate::container::Swap;
use crate::error::{Error, Result};
use crate::store::manifest::{ContainerManifest, SnapshotRef};

/// Where the rules stand in a container's settings.
const SETTING: &str = "prune";

/// What pruning would do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Every snapshot, oldest first, with the reasons why it stays; without any it goes.
    pub verdicts: Vec<(SnapshotRef, Vec<String>)>,
    /// The removal.
    pub removal: Removal,
}

/// The rules that a container keeps.
pub fn saved(manifest: &ContainerManifest) -> Result<Option<Rules>> {
    let Some(value) = manifest.settings.get(SETTING) else {
        return Ok(None);
    };
    serde_json::from_value(value.clone())
        .map(Some)
        .map_err(|error| {
            let name = &manifest.name;
            Error::failed(format!("the settings of {name} for pruning can't be read"))
                .because(error)
                .hint(format!(
                    "set them anew: cowl prune {name} --keep-daily 7 --save"
                ))
        })
}

/// Keeps rules for a container, or forgets them.
pub fn save(container: &mut Container<'_>, rules: Option<&Rules>) -> Result<()> {
    let mut next = container.manifest().clone();
    match rules {
        Some(rules) => {
            rules.check()?;
            let value = serde_json::to_value(rules)
                .map_err(|error| Error::failed("cannot keep the settings").because(error))?;
            next.settings.insert(SETTING.to_owned(), value);
        }
        None => {
            next.settings.remove(SETTING);
        }
    }
    if next == *container.manifest() {
        return Ok(());
    }
    container.commit(next, None, |_| Ok(Swap::Done))
}

/// What pruning by these rules would do now.
pub fn plan(container: &Container<'_>, rules: &Rules) -> Result<Plan> {
    let snapshots = &container.manifest().snapshots;
    let verdicts = choose(snapshots, rules, Timestamp::now(), &TimeZone::system())?;
    let mut verdicts: Vec<_> = snapshots.iter().cloned().zip(verdicts).collect();
    let going: Vec<_> = verdicts
        .iter()
        .filter_map(|(snapshot, why)| why.is_empty().then_some(snapshot.id))
        .collect();
    let removal = remove::plan(container, &going, rules.protected)?;
    for refused in &removal.refused {
        for (snapshot, why) in &mut verdicts {
            if snapshot.name == refused.name {
                why.push(refused.why.clone());
            }
        }
    }
    Ok(Plan { verdicts, removal })
}
