//! The command `cowl doctor`.

use serde_json::{Value, json};

use super::{CliCommand, Context, Namespace, output};
use crate::doctor::{self, Finding, Verdict};
use crate::error::{Kind, Result};
use crate::host::rootless::{self, RunsOutside};

/// Report what works on this host, and what to do about the rest
///
/// For everything that does not work, the report says what that costs and what to type. A container is created in a temporary store beside the store, mounted, snapshotted, restored and removed. Nothing
/// else is changed.
///
/// Each check `works`, is `absent` (only needed by those who use it), `limited` (cowl works without it, at a cost) or
/// `broken` (no container can be mounted). The exit code is 1 if a check is broken.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let entered = rootless::enter(&context.root, RunsOutside::Nothing);
        let found = doctor::examine(&context.root, &entered);
        match self.json {
            true => {
                let checks: Vec<_> = found.iter().map(to_json).collect();
                output::print_json(&json!({ "checks": checks }))?;
            }
            false => print(&found)?,
        }
        let is_broken = found.iter().any(|one| one.verdict == Verdict::Broken);
        Ok(if is_broken { Kind::Failed.code() } else { 0 })
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

fn to_json(found: &Finding) -> Value {
    json!({
        "check": found.check,
        "result": found.verdict.name(),
        "detail": found.detail,
        "cost": found.cost,
        "remedy": found.remedy,
    })
}

fn print(found: &[Finding]) -> Result<()> {
    let rows = found.iter().map(|one| {
        vec![
            one.check.to_owned(),
            one.verdict.name().to_owned(),
            one.detail.clone(),
        ]
    });
    output::print_table(&["CHECK", "RESULT", "DETAIL"], rows.collect(), &[])?;
    for one in found.iter().filter(|one| one.verdict != Verdict::Works) {
        let about = [
            one.cost.clone(),
            one.remedy
                .as_ref()
                .map(|remedy| format!("to change that: {remedy}")),
        ];
        let about: Vec<_> = about.into_iter().flatten().collect();
        if !about.is_empty() {
            output::print_line(&format!("{}: {}", one.check, about.join("; ")))?;
        }
    }
    Ok(())
}
