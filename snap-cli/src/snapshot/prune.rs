//! Pruning: removes the snapshots that a container's rules do not retain.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use super::remove::{self, Protected, Removal};
use super::retain::choose;
use crate::container::Container;
use crate::container::Swap;
use crate::error::{Error, Result};
use crate::store::manifest::{ContainerManifest, SnapshotRef};
use crate::store::retention::Rules;

/// The key of the rules in a container's settings.
const SETTING: &str = "prune";

/// The snapshots that pruning would remove or retain.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Every snapshot, oldest first, with the reasons to retain it; one without reasons is removed.
    pub verdicts: Vec<(SnapshotRef, Vec<String>)>,
    /// The removal.
    pub removal: Removal,
}

/// Reads the rules saved in a container's manifest.
pub fn load_rules(manifest: &ContainerManifest) -> Result<Option<Rules>> {
    let Some(value) = manifest.settings.get(SETTING) else {
        return Ok(None);
    };
    serde_json::from_value(value.clone())
        .map(Some)
        .map_err(|error| {
            let name = &manifest.name;
            Error::failed(format!("cannot read the pruning rules of {name}"))
                .because(error)
                .hint(format!(
                    "replace them: cowl prune {name} --keep-daily 7 --save"
                ))
        })
}

/// Removes the rules from settings that come from another host.
pub fn remove_rules(settings: &mut Map<String, Value>) {
    settings.remove(SETTING);
}

/// Saves rules in a container's manifest, or removes them.
pub fn save_rules(container: &mut Container<'_>, rules: Option<&Rules>) -> Result<()> {
    let mut next = container.manifest().clone();
    match rules {
        Some(rules) => {
            rules.check()?;
            let value = serde_json::to_value(rules)
                .map_err(|error| Error::failed("cannot save the pruning rules").because(error))?;
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

/// Returns how the rules treat protected snapshots.
pub fn protected_policy(rules: &Rules) -> Protected {
    match rules.protected {
        true => Protected::Remove,
        false => Protected::Refuse,
    }
}

/// Returns what pruning by these rules would do now, without changing anything.
pub fn plan(container: &Container<'_>, rules: &Rules) -> Result<Plan> {
    let snapshots = &container.manifest().snapshots;
    let verdicts = choose(snapshots, rules, Timestamp::now(), &TimeZone::system())?;
    let mut verdicts: Vec<_> = snapshots.iter().cloned().zip(verdicts).collect();
    let going: Vec<_> = verdicts
        .iter()
        .filter_map(|(snapshot, reasons)| reasons.is_empty().then_some(snapshot.id))
        .collect();
    let removal = remove::plan(container, &going, protected_policy(rules))?;
    for refused in &removal.refused {
        for (snapshot, reasons) in &mut verdicts {
            if snapshot.name == refused.name {
                reasons.push(refused.reason.clone());
            }
        }
    }
    Ok(Plan { verdicts, removal })
}
