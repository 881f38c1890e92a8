//! `cowl check`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::{Context, Verb, output};
use crate::check::{CheckReport, Depth, Finding, Options, check, repair::repair};
use crate::error::{Kind, Result};
use crate::store::Store;
use crate::store::family;
use crate::store::name::ContainerName;
use cowl_layers::shown::Show as _;

/// Look whether everything is there, unchanged, and holds together
///
/// Every file is read, and every layer that no container writes to is compared with what it looked
/// like when it was measured: names, types, modes, owners, sizes, times. With --deep contents are
/// compared as well; what was never read through before is from then on. Ends with 5 when something
/// is damaged.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this container
    name: Option<OsString>,
    /// Read all contents and compare them, too
    #[arg(long)]
    deep: bool,
    /// Put in order what can be, and say how. Nothing is ever thrown away that is not a copy: what
    /// can't be read is moved to the folder `damaged` of the store
    #[arg(long)]
    repair: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let only = self.name.as_ref().map(ContainerName::parse).transpose()?;
        let mut list = Vec::new();
        let mut damaged = false;
        // As they are: others clean up when they open a store.
        let stores = match &only {
            Some(name) => vec![family::holding(&context.root, &context.session, name)?],
            None => match family::stores(&context.root, &context.session) {
                // The list of the others is damaged: this one can be looked at all the same.
                Err(error) if error.kind == Kind::Damaged => {
                    let home = Store::open(&context.root, context.session.clone());
                    output::complain(&error, self.json);
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
            let mut report = check(store, &options, &mut |done| bar.tell(done))?;
            drop(bar);
            if self.repair {
                repair(store, &mut report);
            }
            damaged |= report.is_damaged();
            if !self.json {
                self.tell(store, &report)?;
            }
            list.push(report_json(store, &report));
        }
        if self.json {
            output::data(&json!({ "stores": list }))?;
        }
        Ok(if damaged { Kind::Damaged.code() } else { 0 })
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn tell(&self, store: &Store, report: &CheckReport) -> Result<()> {
        for finding in &report.findings {
            output::line(&line(finding))?;
        }
        output::note(&format!(
            "{}: {} containers, {} layers: {}",
            store.root().shown(),
            report.containers,
            report.layers,
            match (report.findings.len(), report.is_damaged()) {
                (0, _) => "all in order",
                (_, true) => "DAMAGED",
                (_, false) => "nothing is damaged",
            }
        ));
        if report.new > 0 {
            let what = if self.deep {
                "read through"
            } else {
                "measured"
            };
            output::note(&format!(
                "{} layers were {what} for the first time: there was nothing to compare them with",
                report.new
            ));
        }
        let can_be = |finding: &&Finding| finding.fix.is_some() && finding.done.is_none();
        if !self.repair && report.findings.iter().any(|finding| can_be(&finding)) {
            output::note("`cowl check --repair` puts in order what can be");
        }
        if report.is_damaged() {
            output::note(
                "what can't be put in order comes back from a backup; what stands on other layers is whole",
            );
        }
        Ok(())
    }
}

fn line(finding: &Finding) -> String {
    let Finding {
        level, what, path, ..
    } = finding;
    let shown = output::shown(path.as_os_str().as_encoded_bytes());
    let place = match what.contains(shown.as_str()) {
        true => String::new(),
        false => format!(": {shown}"),
    };
    let done = match &finding.done {
        Some(done) => format!(" ({done})"),
        None => String::new(),
    };
    format!("{}: {what}{place}{done}", level.name())
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
