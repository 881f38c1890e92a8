//! The configuration file.
//!
//! Parsing is strict: a misspelled key is an error, not ignored. Errors name the file, the line and the key.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use cowlfs::config::{Awake, Coherence, Keeper, Passthrough, find_choice};
use serde::{Deserialize, Deserializer, de};

use super::ColorChoice;
use crate::error::{Error, Result};
use crate::store::kernel::Driver;
use crate::store::name::nearest;
use crate::store::retention::{Counts, Rules};
use cowl_layers::shown::Show as _;

/// The valid limits of a container's layers: kernel overlayfs mounts at most 500.
pub(super) const DEPTHS: RangeInclusive<usize> = 2..=500;

/// The messages for invalid values.
pub(super) const PASSTHROUGH: &str = "it must be auto, all, read or off";
pub(super) const COHERENCE: &str = "it must be packages, posix or overlay";
pub(super) const AWAKE: &str = "it must be auto, on or off";
pub(super) const KEEPER: &str = "it must be on or off";
pub(super) const DRIVER: &str = "it must be fuse or kernel";

/// The keys outside tables, and the names of the tables.
const TOP: [&str; 13] = [
    "store",
    "wait",
    "trash_days",
    "depth_limit",
    "passthrough",
    "coherence",
    "awake",
    "keeper",
    "driver",
    "color",
    "lxcpath",
    "hooks",
    "prune",
];

/// The prefix of the keys of the table `[prune]`.
const KEEP: &str = "keep_";

/// Returns the tables with their keys; the first element has the keys outside tables.
fn keys() -> [(&'static str, Vec<String>); 3] {
    let owned = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
    let counts = Counts::default();
    let counts = counts.named().into_iter().map(|(name, _)| name);
    let prune = counts.chain(["within", "tag"]);
    [
        ("", owned(&TOP)),
        ("hooks", owned(&["dir", "timeout"])),
        ("prune", prune.map(|name| format!("{KEEP}{name}")).collect()),
    ]
}

/// The content of a configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    #[serde(default, deserialize_with = "absolute")]
    pub(super) store: Option<PathBuf>,
    pub(super) wait: Option<u64>,
    pub(super) trash_days: Option<u32>,
    #[serde(default, deserialize_with = "depth")]
    pub(super) depth_limit: Option<usize>,
    #[serde(default, deserialize_with = "passthrough")]
    pub(super) passthrough: Option<Passthrough>,
    #[serde(default, deserialize_with = "coherence")]
    pub(super) coherence: Option<Coherence>,
    #[serde(default, deserialize_with = "awake")]
    pub(super) awake: Option<Awake>,
    #[serde(default, deserialize_with = "keeper")]
    pub(super) keeper: Option<Keeper>,
    #[serde(default, deserialize_with = "driver")]
    pub(super) driver: Option<Driver>,
    pub(super) color: Option<ColorChoice>,
    #[serde(default, deserialize_with = "absolute")]
    pub(super) lxcpath: Option<PathBuf>,
    #[serde(default)]
    pub(super) hooks: Hooks,
    #[serde(default)]
    pub(super) prune: Prune,
}

/// The table `[prune]`.
#[derive(Debug, Default)]
pub(super) struct Prune {
    pub(super) rules: Rules,
    /// The keys that the file sets.
    pub(super) keys: Vec<String>,
}

impl<'de> Deserialize<'de> for Prune {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(PruneVisitor)
    }
}

struct PruneVisitor;

impl<'de> de::Visitor<'de> for PruneVisitor {
    type Value = Prune;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("struct Prune")
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Prune, A::Error> {
        let mut prune = Prune::default();
        while let Some(PruneKey(key)) = map.next_key()? {
            let rules = &mut prune.rules;
            match key.strip_prefix(KEEP).unwrap_or_default() {
                "within" => rules.within = Some(map.next_value()?),
                "tag" => rules.tags = map.next_value()?,
                name => {
                    let count = map.next_value()?;
                    rules.counts.set(name, count);
                }
            }
            prune.keys.push(key);
        }
        Ok(prune)
    }
}

/// A key of the table `[prune]`. Unknown keys are rejected here, so that the error has a position in the file.
struct PruneKey(String);

impl<'de> Deserialize<'de> for PruneKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let key = String::deserialize(from)?;
        let [_, _, (_, known)] = keys();
        match known.contains(&key) {
            true => Ok(Self(key)),
            false => Err(de::Error::unknown_field(&key, &[])),
        }
    }
}

/// The table `[hooks]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hooks {
    #[serde(default, deserialize_with = "absolute")]
    pub(super) dir: Option<PathBuf>,
    pub(super) timeout: Option<u64>,
}

fn absolute<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(from)?;
    if path.is_absolute() {
        return Ok(Some(path));
    }
    Err(de::Error::custom("it must be an absolute path"))
}

fn depth<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    let depth = usize::deserialize(from)?;
    if DEPTHS.contains(&depth) {
        return Ok(Some(depth));
    }
    Err(de::Error::custom("it must be from 2 to 500"))
}

fn passthrough<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Passthrough>, D::Error> {
    let found = find_choice(&Passthrough::NAMES, &String::deserialize(from)?);
    found.map(Some).ok_or(de::Error::custom(PASSTHROUGH))
}

fn coherence<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Coherence>, D::Error> {
    let found = find_choice(&Coherence::NAMES, &String::deserialize(from)?);
    found.map(Some).ok_or(de::Error::custom(COHERENCE))
}

fn awake<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Awake>, D::Error> {
    let found = find_choice(&Awake::NAMES, &String::deserialize(from)?);
    found.map(Some).ok_or(de::Error::custom(AWAKE))
}

fn keeper<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Keeper>, D::Error> {
    let found = find_choice(&Keeper::NAMES, &String::deserialize(from)?);
    found.map(Some).ok_or(de::Error::custom(KEEPER))
}

fn driver<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Driver>, D::Error> {
    let found = find_choice(&Driver::NAMES, &String::deserialize(from)?);
    found.map(Some).ok_or(de::Error::custom(DRIVER))
}

/// Whether a configuration file must exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// The user named the file.
    Required,
    /// The path is the default.
    Optional,
}

/// Reads a configuration file; returns `None` if it is optional and does not exist.
pub(super) fn read(path: &Path, presence: Presence) -> Result<Option<Settings>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound && presence == Presence::Optional =>
        {
            return Ok(None);
        }
        Err(error) => {
            let hint = "specify a readable file with --config or COWL_CONFIG";
            return Err(Error::usage(format!(
                "cannot read the configuration file {}",
                path.shown()
            ))
            .because(error)
            .hint(hint));
        }
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        Error::usage(format!("{} is not valid UTF-8", path.shown())).because(error.utf8_error())
    })?;
    toml::from_str(&text)
        .map(Some)
        .map_err(|error| locate(path, &text, &error))
}

/// Converts an error of the parser into one that names the file, the line and the key.
fn locate(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let (at, length) = error.span().map_or((0, 0), |s| (s.start, s.len()));
    let before = text.get(..at).unwrap_or_default();
    let number = before.matches('\n').count() + 1;
    let line = text.lines().nth(number - 1).unwrap_or_default();
    let table = before
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix('[')?.strip_suffix(']'))
        .unwrap_or_default();
    let mut message = error.message().replace('\n', ", ");
    let mut hint = "`man cowl` lists all keys; `cowl config` shows the values in force".to_owned();
    let mut key = line
        .split_once('=')
        .map_or("", |(key, _)| key.trim())
        .to_owned();
    if message.starts_with("unknown field") {
        key = text.get(at..at + length).unwrap_or(&key).to_owned();
        message = "there is no such key".to_owned();
        if let Some(near) = nearest_key(table, &key) {
            hint = format!("did you mean {near}?");
        }
    }
    let key = match key.as_str() {
        "" => String::new(),
        key => format!(": {}", key.escape_debug()),
    };
    Error::usage(format!("{}, line {number}{key}: {message}", path.shown())).hint(hint)
}

/// Returns the most similar known key of the same table, or else of another one.
fn nearest_key(table: &str, key: &str) -> Option<String> {
    let in_table = |(name, keys): &(&str, Vec<String>)| {
        let near = nearest(key, keys.iter().map(String::as_str))?;
        Some(match *name {
            _ if *name == table => near.to_owned(),
            "" => format!("{near}, above all tables"),
            _ => format!("{near} in [{name}]"),
        })
    };
    let all = keys();
    let own = all.iter().find(|(name, _)| *name == table);
    own.and_then(in_table)
        .or_else(|| all.iter().find_map(in_table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, what: &str, hint: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        let error = read(&path, Presence::Required).unwrap_err();
        assert_eq!(error.kind, crate::error::Kind::Usage);
        let message = error.to_string();
        assert!(message.contains("config.toml, line"), "{message}");
        assert!(message.contains(what), "no {what:?} in {message}");
        assert!(!message.contains('\n'), "{message}");
        let actual = error.hint.unwrap_or_default();
        assert!(actual.contains(hint), "no {hint:?} in {actual}");
    }

    #[test]
    fn errors_name_the_line_and_the_key() {
        refused(
            "# x\n\ntrahs_days = 3\n",
            "line 3: trahs_days: there is no such key",
            "did you mean trash_days?",
        );
        refused(
            "[prune]\nkeep_dayly = 3\n",
            "line 2: keep_dayly",
            "did you mean keep_daily?",
        );
        refused(
            "passthrough = \"none\"\n",
            "line 1: passthrough: it must be auto, all, read or off",
            "man cowl",
        );
        refused(
            "keep_last = 3\n",
            "line 1: keep_last",
            "did you mean keep_last in [prune]?",
        );
        refused(
            "[hooks]\nwait = 3\n",
            "line 2: wait",
            "did you mean wait, above all tables?",
        );
        refused(
            "wait = \"long\"\n",
            "line 1: wait: invalid type",
            "man cowl",
        );
        refused("wait = -1\n", "line 1: wait: ", "man cowl");
        refused("wait = 1\nwait = 2\n", "line 2: wait: duplicate key", "");
        refused("x\n", "line 1", "");
        refused("\n\nstore = [1\n", "line ", "");
        refused("color = \"pink\"\n", "line 1: color: unknown variant", "");
        refused(
            "store = \"here\"\n",
            "line 1: store: it must be an absolute path",
            "",
        );
        refused("depth_limit = 1\n", "line 1: depth_limit: it must", "");
        refused("zebra = 1\n", "line 1: zebra", "man cowl");
    }

    #[test]
    fn only_a_required_file_must_exist() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.toml");
        assert!(read(&path, Presence::Optional).unwrap().is_none());
        let error = read(&path, Presence::Required).unwrap_err();
        assert!(error.to_string().contains("none.toml"), "{error}");
        // A directory is an error, even at the default path.
        read(dir.path(), Presence::Optional).unwrap_err();
    }

    #[test]
    fn the_installed_file_sets_no_key_and_lists_every_key() {
        let sample = include_str!("../../dist/config.toml");
        let settings: Settings = toml::from_str(sample).unwrap();
        assert_eq!(
            format!("{settings:?}"),
            format!("{:?}", Settings::default())
        );
        // Without its # signs, each line is valid and has the default.
        let bare = |line: &str| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => rest.to_owned(),
            _ => line.to_owned(),
        };
        let all: Vec<_> = sample.lines().map(bare).collect();
        let settings: Settings = toml::from_str(&all.join("\n")).unwrap();
        assert_eq!((settings.wait, settings.trash_days), (Some(10), Some(7)));
        assert_eq!(settings.depth_limit, Some(128));
        for (table, keys) in keys() {
            for key in keys
                .iter()
                .filter(|key| !table.is_empty() || !["hooks", "prune"].contains(&key.as_str()))
            {
                assert!(sample.contains(&format!("#{key} = ")), "{key}");
            }
        }
    }

    #[test]
    fn every_key_is_read() {
        let mut text = String::new();
        for (table, keys) in keys() {
            if !table.is_empty() {
                text.push_str(&format!("[{table}]\n"));
            }
            for key in keys {
                let value = match key.as_str() {
                    "hooks" | "prune" => continue,
                    "store" | "lxcpath" | "dir" => "\"/x\"",
                    "color" => "\"never\"",
                    "passthrough" => "\"all\"",
                    "coherence" => "\"overlay\"",
                    "awake" => "\"off\"",
                    "keeper" => "\"on\"",
                    "driver" => "\"kernel\"",
                    "keep_within" => "\"2w\"",
                    "keep_tag" => "[\"release\"]",
                    _ => "9",
                };
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
        let settings: Settings = toml::from_str(&text).unwrap();
        assert_eq!(settings.depth_limit, Some(9));
        assert_eq!(settings.passthrough, Some(Passthrough::All));
        assert_eq!(settings.coherence, Some(Coherence::Overlay));
        assert_eq!(settings.awake, Some(Awake::Off));
        assert_eq!(settings.keeper, Some(Keeper::On));
        assert_eq!(settings.driver, Some(Driver::Kernel));
        assert_eq!(settings.hooks.timeout, Some(9));
        assert_eq!(settings.prune.rules.counts.yearly, Some(9));
    }
}
