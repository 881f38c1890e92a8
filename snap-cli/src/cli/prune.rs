//! The command `cowl prune`.

use std::ffi::OsString;

use serde_json::{Value, json};

use super::rm::{removal_json, remove_with_hooks, summarize};
use super::table::Style;
use super::{CliCommand, Context, RunMode, output, text};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::prune::{Plan, load_rules, plan, protected_policy, save_rules};
use crate::store::Store;
use crate::store::name::ContainerName;
use crate::store::ownership;
use crate::store::retention::{Counts, Rules};

/// Remove old snapshots, keeping some per hour, day, week, month or year
///
/// Keeps the newest snapshot of each of the last N days (hours, ...) that have any. Removes only
/// snapshots that a timer, a hook or a restore took, and no protected ones. Without rules on the command
/// line, the container's saved rules apply (--save), else those of the configuration file.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    #[arg(
        required_unless_present = "all_containers",
        conflicts_with = "all_containers"
    )]
    name: Option<OsString>,
    /// Prune each container by its own rules, and skip containers without rules
    #[arg(long)]
    all_containers: bool,
    #[command(flatten)]
    keep: Keep,
    /// Save these rules in the container, without pruning
    #[arg(long, conflicts_with_all = ["all_containers", "show_settings", "forget"])]
    save: bool,
    /// Delete the container's saved rules, without pruning
    #[arg(long, conflicts_with_all = ["all_containers", "show_settings"])]
    forget: bool,
    /// Print the container's rules, without pruning
    #[arg(long, conflicts_with = "all_containers")]
    show_settings: bool,
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    style: Style,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The rules on the command line.
#[derive(Debug, clap::Args)]
struct Keep {
    #[command(flatten)]
    counts: Counts,
    /// Keep all snapshots younger than this: 36h, 7d, 2w
    #[arg(long, value_name = "SPAN")]
    keep_within: Option<OsString>,
    /// Keep all snapshots with this tag; may be given several times
    #[arg(long, value_name = "KEY[=VALUE]")]
    keep_tag: Vec<OsString>,
    /// Also remove snapshots that were taken manually
    #[arg(long)]
    manual: bool,
    /// Also remove protected snapshots
    #[arg(long)]
    protected: bool,
}

impl CliCommand for Args {
    fn frees_space(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let given = self.keep.rules()?;
        let Some(name) = &self.name else {
            return self.all(context, &given);
        };
        let name = context.container(name)?;
        let store = context.store_for(&name)?;
        if self.save || self.forget {
            let mut container = recover::open(&store, &name)?;
            save_rules(&mut container, self.save.then_some(&given))?;
            return Ok(0);
        }
        let rules = match given.is_empty() {
            true => self.configured_rules(context, &store, &name)?,
            // --manual and --protected only extend the candidates; what to keep comes from the saved rules.
            false if given.has_only_scope() => Some(Rules {
                manual: given.manual,
                protected: given.protected,
                ..self
                    .configured_rules(context, &store, &name)?
                    .unwrap_or_default()
            }),
            false => Some(given),
        };
        if self.show_settings {
            return self.show(&name, rules.as_ref());
        }
        let rules = rules.unwrap_or_default();
        let value = self.one(context, &store, &name, &rules)?;
        if self.json {
            output::print_json(&value)?;
        }
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    /// Returns the container's saved rules, else those of the configuration file.
    fn configured_rules(
        &self,
        context: &Context,
        store: &Store,
        name: &ContainerName,
    ) -> Result<Option<Rules>> {
        if let Some(rules) = load_rules(&store.find(name)?.1.body)? {
            return Ok(Some(rules));
        }
        let file = &context.config.prune;
        Ok((!file.is_empty()).then(|| file.clone()))
    }

    fn all(&self, context: &Context, given: &Rules) -> Result<u8> {
        if !given.is_empty() {
            return Err(Error::usage(
                "--all-containers uses the rules of each container, not of the command line",
            )
            .hint(
                "save rules with `cowl prune NAME --keep-daily 7 --save`, or in the \
                     configuration file",
            ));
        }
        let (mut done, mut broken) = (Vec::new(), None);
        for store in context.stores()? {
            for (_, record) in store.containers()? {
                if let Ok(record) = &record
                    && ownership::refuse_closed(&record.body).is_err()
                {
                    // It has no snapshots.
                    continue;
                }
                let pruned = record.and_then(|record| {
                    let name = record.body.name;
                    let rules = self.configured_rules(context, &store, &name)?;
                    rules
                        .map(|rules| self.one(context, &store, &name, &rules))
                        .transpose()
                });
                match pruned {
                    Ok(value) => done.extend(value),
                    // The other containers are pruned even if this one cannot be.
                    Err(error) => {
                        output::print_error(&error, output::Format::from_option(self.json));
                        broken = Some(error);
                    }
                }
            }
        }
        if self.json {
            output::print_json(&json!({ "containers": done }))?;
        }
        broken.map_or(Ok(0), Err)
    }

    fn one(
        &self,
        context: &Context,
        store: &Store,
        name: &ContainerName,
        rules: &Rules,
    ) -> Result<Value> {
        rules.check()?;
        let mut planned = plan(&recover::open(store, name)?, rules)?;
        if !self.json {
            self.print(name, &planned)?;
            let would = if self.dry_run {
                "would remove"
            } else {
                "removing"
            };
            output::print_note(&format!("{name}: {}", summarize(would, &planned.removal)));
        }
        if !self.dry_run && !planned.removal.going.is_empty() {
            let removal = &mut planned.removal;
            remove_with_hooks(
                context,
                store,
                name,
                removal,
                protected_policy(rules),
                |_| Ok(()),
            )?;
        }
        let mut value = removal_json(name, &planned.removal, RunMode::from_option(self.dry_run));
        let kept = planned.verdicts.iter().filter(|(_, why)| !why.is_empty());
        let kept: Vec<_> = kept
            .map(|(snapshot, why)| json!({ "name": snapshot.name, "why": why }))
            .collect();
        if let Some(object) = value.as_object_mut() {
            object.insert("kept".to_owned(), kept.into());
        }
        Ok(value)
    }

    fn print(&self, name: &ContainerName, planned: &Plan) -> Result<()> {
        let rows = planned.verdicts.iter().map(|(snapshot, why)| {
            let plan = if why.is_empty() { "remove" } else { "keep" };
            vec![
                format!("{name}@{}", snapshot.name),
                output::format_local_time(&snapshot.created),
                snapshot.kind.name().to_owned(),
                plan.to_owned(),
                why.join(", "),
            ]
        });
        let heads = ["SNAPSHOT", "TIME", "KIND", "PLAN", "WHY"];
        self.style.print(&heads, rows.collect(), &[])
    }

    fn show(&self, name: &ContainerName, rules: Option<&Rules>) -> Result<u8> {
        if self.json {
            output::print_json(&json!({ "name": name, "rules": rules }))?;
            return Ok(0);
        }
        match rules {
            Some(rules) => output::print_line(&rules.typed())?,
            None => output::print_note(&format!("{name} has no rules")),
        }
        Ok(0)
    }
}

impl Keep {
    fn rules(&self) -> Result<Rules> {
        let tags = self.keep_tag.iter().map(text::parse);
        Ok(Rules {
            counts: self.counts.clone(),
            within: self.keep_within.as_ref().map(text::parse).transpose()?,
            tags: tags.collect::<Result<_>>()?,
            manual: self.manual,
            protected: self.protected,
            ..Rules::default()
        })
    }
}
