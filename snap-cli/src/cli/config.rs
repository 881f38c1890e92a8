//! The command `cowl config`.

use cowlfs::config::{Awake, Coherence, Keeper, Passthrough, choice_name};
use std::path::Path;

use serde_json::{Value, json};

use super::{CliCommand, Context, Namespace, output};
use crate::config::Origin;
use crate::error::Result;

/// Show the settings in force and the origin of each
///
/// An option of the command line takes precedence over the environment, the environment over the
/// configuration file, and the file over the default.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    style: super::table::Style,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let config = &context.config;
        let settings = settings(context);
        if self.json {
            let list: Vec<Value> = settings
                .into_iter()
                .map(|(key, value)| {
                    json!({ "key": key, "value": value, "from": config.origin(&key).to_string() })
                })
                .collect();
            let file = config.file().map(json_path);
            output::print_json(&json!({ "file": file, "settings": list }))?;
            return Ok(0);
        }
        let rows = settings.into_iter().map(|(key, value)| {
            let origin = config.origin(&key).to_string();
            vec![key, text(&value), output::shown(origin.as_bytes())]
        });
        self.style
            .print(&["KEY", "VALUE", "FROM"], rows.collect(), &[])?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }

    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

fn settings(context: &Context) -> Vec<(String, Value)> {
    let config = &context.config;
    let mut settings: Vec<(String, Value)> = [
        ("store", json_path(&context.root)),
        ("wait", config.wait.into()),
        ("trash_days", config.trash_days.into()),
        ("depth_limit", config.depth_limit.into()),
        (
            "passthrough",
            choice_name(&Passthrough::NAMES, &config.mounts.passthrough).into(),
        ),
        (
            "coherence",
            choice_name(&Coherence::NAMES, &config.mounts.coherence).into(),
        ),
        (
            "awake",
            choice_name(&Awake::NAMES, &config.mounts.awake).into(),
        ),
        (
            "keeper",
            choice_name(&Keeper::NAMES, &config.mounts.keeper).into(),
        ),
        ("driver", config.mounts.driver.name().into()),
        ("color", json!(config.color)),
        ("lxcpath", json_path(&config.lxcpath)),
        ("hooks.dir", json_path(&config.hooks.dir)),
        ("hooks.timeout", config.hooks.timeout.as_secs().into()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    let prune = &config.prune;
    let counts = prune.counts.named();
    settings.extend(counts.map(|(name, count)| (format!("prune.keep_{name}"), json!(count))));
    settings.push(("prune.keep_within".to_owned(), json!(prune.within)));
    let tags = match config.origin("prune.keep_tag") {
        Origin::BuiltIn => Value::Null,
        _ => json!(prune.tags),
    };
    settings.push(("prune.keep_tag".to_owned(), tags));
    settings
}

fn json_path(path: &Path) -> Value {
    output::json_path(path.as_os_str().as_encoded_bytes())
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => output::shown(text.as_bytes()),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    }
}
