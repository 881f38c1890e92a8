//! Rules that say which snapshots pruning keeps: as options of the command line, in the configuration file and in a
//! container's settings.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::span;
use crate::error::{Error, Result};
use crate::shell::quoted;

/// How many snapshots are kept: the last ones, and the newest of each of the latest periods that have any.
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
    /// Each count with its name.
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

    /// Sets the count `name`. Returns whether there is one of this name.
    pub fn set(&mut self, name: &str, count: u32) -> bool {
        let found = self.named_mut().into_iter().find(|(own, _)| *own == name);
        found.map(|(_, own)| *own = Some(count)).is_some()
    }
}

/// Retention rules. The form of serde is that of a container's settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rules {
    /// How many are kept.
    #[serde(flatten)]
    pub counts: Counts,
    /// All that are not older than this span are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<String>,
    /// All with one of these tags are kept: "KEY" or "KEY=VALUE".
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Snapshots that people asked for may be removed, too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub manual: bool,
    /// Protected ones may be removed, too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Rules {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether they say which snapshots may be removed, and nothing of what is kept.
    pub fn has_only_scope(&self) -> bool {
        let kept = Self {
            manual: false,
            protected: false,
            ..self.clone()
        };
        !self.is_empty() && kept.is_empty()
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

    /// Refuses rules that keep nothing at all.
    pub fn check(&self) -> Result<()> {
        if !self.extra.is_empty() {
            let unknown: Vec<_> = self.extra.keys().map(String::as_str).collect();
            return Err(Error::failed(format!(
                "the settings say something that this program does not know: {}",
                unknown.join(", ")
            ))
            .hint("a newer cowl wrote them: use that, or give the rules on the command line"));
        }
        let some = self
            .counts
            .named()
            .iter()
            .any(|(_, count)| count.unwrap_or_default() > 0);
        if let Some(within) = &self.within {
            span::parse(within)?;
        }
        if !some && self.within.is_none() && self.tags.is_empty() {
            return Err(
                Error::usage("nothing says which snapshots to keep: all would go").hint(
                    "say it, for example: --keep-last 3 --keep-daily 7; `cowl rm NAME --all` \
                     removes all",
                ),
            );
        }
        Ok(())
    }
}
