//! Retention rules of `prune`: as options of the command line, in the configuration file and in a container's settings.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::span;
use crate::error::{Error, Result};
use crate::shell::quoted;

/// The numbers of retained snapshots: the last ones, and the newest of each of the latest periods that have any.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(default)]
pub struct Counts {
    /// Keep the last N
    #[arg(long = "keep-last", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<u32>,
    /// Keep the newest of each of N hours
    #[arg(long = "keep-hourly", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hourly: Option<u32>,
    /// Keep the newest of each of N days
    #[arg(long = "keep-daily", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub daily: Option<u32>,
    /// Keep the newest of each of N weeks
    #[arg(long = "keep-weekly", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weekly: Option<u32>,
    /// Keep the newest of each of N months
    #[arg(long = "keep-monthly", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub monthly: Option<u32>,
    /// Keep the newest of each of N years
    #[arg(long = "keep-yearly", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub yearly: Option<u32>,
}

impl Counts {
    /// Returns each count with its name.
    pub fn named(&self) -> [(&'static str, Option<u32>); 6] {
        self.clone().named_mut().map(|(name, count)| (name, *count))
    }

    fn named_mut(&mut self) -> [(&'static str, &mut Option<u32>); 6] {
        [
            ("last", &mut self.last),
            ("hourly", &mut self.hourly),
            ("daily", &mut self.daily),
            ("weekly", &mut self.weekly),
            ("monthly", &mut self.monthly),
            ("yearly", &mut self.yearly),
        ]
    }

    /// Sets the count `name`. Returns false if there is no such count.
    pub fn set(&mut self, name: &str, count: u32) -> bool {
        let found = self.named_mut().into_iter().find(|(own, _)| *own == name);
        found.map(|(_, own)| *own = Some(count)).is_some()
    }
}

/// Retention rules. Serialized in a container's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rules {
    /// The numbers of retained snapshots.
    #[serde(flatten)]
    pub counts: Counts,
    /// The span of time whose snapshots are all retained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
    /// The tags whose snapshots are all retained: "KEY" or "KEY=VALUE".
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Whether manual snapshots may be removed as well.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub manual: bool,
    /// Whether protected snapshots may be removed as well.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Rules {
    /// Returns whether there are no rules.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether the rules only extend the removable snapshots (`manual`, `protected`) and retain none.
    pub fn has_only_scope(&self) -> bool {
        let retaining = Self {
            manual: false,
            protected: false,
            ..self.clone()
        };
        !self.is_empty() && retaining.is_empty()
    }

    /// Returns the rules as options of a command line.
    pub fn typed(&self) -> String {
        let mut words = Vec::new();
        for (name, count) in self.counts.named() {
            words.extend(count.map(|count| format!("--keep-{name} {count}")));
        }
        let within = self.within.iter();
        words.extend(within.map(|span| format!("--keep-within {}", quoted(span))));
        let tags = self.tags.iter();
        words.extend(tags.map(|tag| format!("--keep-tag {}", quoted(tag))));
        words.extend(self.manual.then(|| "--manual".to_owned()));
        words.extend(self.protected.then(|| "--protected".to_owned()));
        words.join(" ")
    }

    /// Returns an error if the rules retain no snapshots or contain unknown fields.
    pub fn check(&self) -> Result<()> {
        if !self.extra.is_empty() {
            let unknown: Vec<_> = self.extra.keys().map(String::as_str).collect();
            return Err(Error::failed(format!(
                "the container's retention settings contain unknown keys: {}",
                unknown.join(", ")
            ))
            .hint("a newer cowl wrote them: use that version, or specify the rules on the command line"));
        }
        let has_count = self
            .counts
            .named()
            .iter()
            .any(|(_, count)| count.unwrap_or_default() > 0);
        if let Some(within) = &self.within {
            span::parse(within)?;
        }
        if !has_count && self.within.is_none() && self.tags.is_empty() {
            return Err(
                Error::usage("no retention rules: all snapshots would be removed").hint(
                    "specify rules, for example: --keep-last 3 --keep-daily 7; `cowl rm NAME --all` \
                     removes all snapshots",
                ),
            );
        }
        Ok(())
    }
}
