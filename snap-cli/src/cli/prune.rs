//! `cowl prune`

use std::ffi::OsString;

use serde_json::{Value, json};

use super::rm::{removal_json, remove_hooked, sentence};
use super::table::Style;
use super::{Context, Verb, output, text};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::prune::{Plan, load_rules, plan, protected_policy, save_rules};
use crate::store::Store;
use crate::store::name::ContainerName;
use crate::store::retention::{Counts, Rules};

/// Remove old snapshots, and keep some of each hour, day, week, month or year
///
/// Of each of the latest N days (hours, ...) that have any, the newest snapshot stays. Only what a
/// timer, a hook or a restore made is removed; what people asked for stays, and what is protected.
/// Without rules those of the container are used (--save), else those of the configuration file.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container
    #[arg(
        required_unless_present = "all_containers",
        conflicts_with = "all_containers"
    )]
    name: Option<OsString>,
    /// Every container by its own saved rules; those without any are left alone
    #[arg(long)]
    all_containers: bool,
    #[command(flatten)]
    keep: Keep,
    /// Keep these rules with the container, and do nothing else
    #[arg(long, conflicts_with_all = ["all_containers", "show_settings", "forget"])]
    save: bool,
    /// Forget the container's rules, and do nothing else
    #[arg(long, conflicts_with_all = ["all_containers", "show_settings"])]
    forget: bool,
    /// Show the container's rules, and do nothing else
    #[arg(long, conflicts_with = "all_containers")]
    show_settings: bool,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    style: Style,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The rules of the command line.
#[derive(Debug, clap::Args)]
struct Keep {
    #[command(flatten)]
    counts: Counts,
    /// Keep all that are younger: 36h, 7d, 2w
    #[arg(long, value_name = "SPAN")]
    keep_within: Option<OsString>,
    /// Keep all with this tag; may be given several times
    #[arg(long, value_name = "KEY[=VALUE]")]
    keep_tag: Vec<OsString>,
    /// What people asked for may go, too
    #[arg(long)]
    manual: bool,
    /// Protected ones may go, too
    #[arg(long)]
    protected: bool,
}

impl Verb for Args {
    fn frees(&self) -> bool {
        true
    }

    fn run(&self, context: &Context) -> Result<u8> {
        let asked = self.keep.rules()?;
        let Some(name) = &self.name else {
            return self.all(context, &asked);
        };
        let name = ContainerName::parse(name)?;
        let store = context.store_of(&name)?;
        if self.save || self.forget {
            let mut container = recover::open(&store, &name)?;
            save_rules(&mut container, self.save.then_some(&asked))?;
            return Ok(0);
        }
        let rules = match asked.is_empty() {
            true => self.rules_of(context, &store, &name)?,
            // Which snapshots are meant is one thing, what is kept of them another.
            false if asked.has_only_scope() => Some(Rules {
                manual: asked.manual,
                protected: asked.protected,
                ..self.rules_of(context, &store, &name)?.unwrap_or_default()
            }),
            false => Some(asked),
        };
        if self.show_settings {
            return self.show(&name, rules.as_ref());
        }
        let rules = rules.unwrap_or_default();
        let value = self.one(context, &store, &name, &rules)?;
        if self.json {
            output::data(&value)?;
        }
        Ok(0)
    }

    fn json(&self) -> bool {
        self.json
    }
}

impl Args {
    /// The container's own rules, else those of the configuration file.
    fn rules_of(
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

    fn all(&self, context: &Context, asked: &Rules) -> Result<u8> {
        if !asked.is_empty() {
            return Err(Error::usage(
                "--all-containers goes by the rules that each container keeps",
            )
            .hint(
                "keep them with `cowl prune NAME --keep-daily 7 --save`, or in the \
                     configuration file",
            ));
        }
        let (mut done, mut broken) = (Vec::new(), None);
        for store in context.stores()? {
            for (_, record) in store.containers()? {
                let pruned = record.and_then(|record| {
                    let name = record.body.name;
                    let rules = self.rules_of(context, &store, &name)?;
                    rules
                        .map(|rules| self.one(context, &store, &name, &rules))
                        .transpose()
                });
                match pruned {
                    Ok(value) => done.extend(value),
                    // One that can't be pruned hides none of the others.
                    Err(error) => {
                        output::complain(&error, self.json);
                        broken = Some(error);
                    }
                }
            }
        }
        if self.json {
            output::data(&json!({ "containers": done }))?;
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
            output::note(&format!("{name}: {}", sentence(would, &planned.removal)));
        }
        if !self.dry_run && !planned.removal.going.is_empty() {
            let removal = &mut planned.removal;
            remove_hooked(
                context,
                store,
                name,
                removal,
                protected_policy(rules),
                |_| Ok(()),
            )?;
        }
        let mut value = removal_json(name, &planned.removal, self.dry_run);
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
                output::local_time(&snapshot.created),
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
            output::data(&json!({ "name": name, "rules": rules }))?;
            return Ok(0);
        }
        match rules {
            Some(rules) => output::line(&rules.typed())?,
            None => output::note(&format!("{name} has no rules")),
        }
        Ok(0)
    }
}

impl Keep {
    fn rules(&self) -> Result<Rules> {
        let tags = self.keep_tag.iter().map(text::plain);
        Ok(Rules {
            counts: self.counts.clone(),
            within: self.keep_within.as_ref().map(text::plain).transpose()?,
            tags: tags.collect::<Result<_>>()?,
            manual: self.manual,
            protected: self.protected,
            ..Rules::default()
        })
    }
}
