//! The command `cowl check`.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{CliCommand, Context, Namespace, output};
use crate::check::{CheckReport, Depth, Finding, Options, check, repair::repair};
use crate::error::{Kind, Result};
use crate::store::Store;
use crate::store::family;
use cowl_layers::shown::Show as _;

/// Verify the integrity of the store
///
/// All files of the store are read, and the metadata of each frozen layer (names, types, modes, owners,
/// sizes, times) is compared with the record of its first check. With --deep, contents are compared as
/// well; the first deep check of a layer records them. The exit code is 5 if damage is found.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Check only this container
    name: Option<OsString>,
    /// Read and compare all contents
    #[arg(long)]
    deep: bool,
    /// Repair the damage that can be repaired. Removes only copies: unreadable files are moved to the
    /// directory `damaged` of the store
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let only = self.name.as_ref().map(|name| context.container(name));
        let only = only.transpose()?;
        let mut list = Vec::new();
        let mut damaged = false;
        // Opened without the cleanup of other commands, which would change what is checked.
        let stores = match &only {
            Some(name) => vec![family::holding(&context.root, &context.session, name)?],
            None => match family::stores(&context.root, &context.session) {
                // The list of stores is damaged; the home store can be checked without it.
                Err(error) if error.kind == Kind::Damaged => {
                    let home = Store::open(&context.root, context.session.clone());
                    output::print_error(&error, output::Format::from_option(self.json));
                    damaged = true;
                    vec![home?]
                }
                other => other?,
            },
        };
        let options = Options {
            only,
            depth: match self.deep {
                true => Depth::Content,
                false => Depth::Metadata,
            },
        };
        for store in &stores {
            let mut bar = super::progress::Bar::new("reading");
            let mut report = check(store, &options, &mut |done| bar.update(done))?;
            drop(bar);
            if self.repair {
                repair(store, &mut report);
            }
            damaged |= report.is_damaged();
            if !self.json {
                self.print(store, &report)?;
            }
            list.push(report_json(store, &report));
        }
        if self.json {
            output::print_json(&json!({ "stores": list }))?;
        }
        Ok(if damaged { Kind::Damaged.code() } else { 0 })
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

impl Args {
    fn print(&self, store: &Store, report: &CheckReport) -> Result<()> {
        for finding in &report.findings {
            output::print_line(&line(finding))?;
        }
        output::print_note(&format!(
            "{}: {}, {}: {}",
            store.root().shown(),
            output::counted(report.containers, "container"),
            output::counted(report.layers, "layer"),
            match (report.findings.len(), report.is_damaged()) {
                (0, _) => "no problems",
                (_, true) => "DAMAGED",
                (_, false) => "nothing is damaged",
            }
        ));
        if report.new > 0 {
            let recorded = if self.deep { "contents" } else { "metadata" };
            output::print_note(&format!(
                "recorded the {recorded} of {} for the first time: nothing to compare with yet",
                output::counted(report.new, "layer")
            ));
        }
        let is_repairable = |finding: &Finding| finding.fix.is_some() && finding.done.is_none();
        if !self.repair && report.findings.iter().any(is_repairable) {
            output::print_note("some of this can be repaired: cowl check --repair");
        }
        if report.is_damaged() {
            output::print_note(
                "restore the rest from a backup; states that do not use the damaged layers are intact",
            );
        }
        Ok(())
    }
}

/// Formats a finding; the path is left out if the message contains it.
fn line(finding: &Finding) -> String {
    let Finding {
        level, what, path, ..
    } = finding;
    let shown = output::shown(path.as_os_str().as_encoded_bytes());
    let path = match what.contains(shown.as_str()) {
        true => String::new(),
        false => format!(": {shown}"),
    };
    let done = match &finding.done {
        Some(done) => format!(" ({done})"),
        None => String::new(),
    };
    format!("{}: {what}{path}{done}", level.name())
}

fn report_json(store: &Store, report: &CheckReport) -> Value {
    let path = |path: &std::path::Path| output::json_path(path.as_os_str().as_encoded_bytes());
    let findings: Vec<_> = report
        .findings
        .iter()
        .map(|finding| {
            json!({
                "level": finding.level.name(),
                "about": finding.about,
                "what": finding.what,
                "path": path(&finding.path),
                "repairable": finding.fix.is_some(),
                "done": finding.done,
            })
        })
        .collect();
    json!({
        "store": path(store.root()),
        "containers": report.containers,
        "layers": report.layers,
        "new": report.new,
        "damaged": report.is_damaged(),
        "findings": findings,
    })
}
