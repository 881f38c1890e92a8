//! What somebody set once for all commands: the command line comes before the environment, that before
//! the configuration file, that before what is built in. Where each value comes from is kept, so that
//! `cowl config` can tell.
//!
//! It knows nothing of stores or verbs: those ask it.

mod file;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowlfs::config::{Awake, Coherence, Passthrough, find_choice};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::store::Mounts;
use crate::store::retention::Rules;
use cowl_layers::shown::Show as _;

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum When {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Scripts that run before and after commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// The folder with one folder for each event.
    pub dir: PathBuf,
    /// How long one script may take.
    pub timeout: Duration,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An option of the command line.
    CommandLine,
    /// A variable of the environment.
    Environment(&'static str),
    /// The configuration file.
    File(PathBuf),
    /// Nobody set it.
    BuiltIn,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine => f.write_str("command line"),
            Self::Environment(name) => f.write_str(name),
            Self::File(path) => write!(f, "{}", path.shown()),
            Self::BuiltIn => f.write_str("built in"),
        }
    }
}

/// The settings in force.
#[derive(Clone, Debug)]
pub struct Config {
    /// The home store, if somebody chose one.
    pub store: Option<PathBuf>,
    /// Seconds to wait for other commands.
    pub wait: u64,
    /// Days that a destroyed container stays in the trash.
    pub trash_days: u32,
    /// A container with more layers than this is flattened.
    pub depth_limit: usize,
    /// How containers are mounted.
    pub mounts: Mounts,
    /// When output is coloured.
    pub color: When,
    /// Where LXC keeps its containers.
    pub lxcpath: PathBuf,
    /// Scripts before and after commands.
    pub hooks: Hooks,
    /// What pruning keeps of containers without rules of their own.
    pub prune: Rules,
    /// The file that was read.
    file: Option<PathBuf>,
    origins: BTreeMap<String, Origin>,
}

/// What the command line says.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--store`
    pub store: Option<PathBuf>,
    /// `--wait`
    pub wait: Option<u64>,
    /// `--color`
    pub color: Option<When>,
}

/// A variable's value, by name: the environment, or a test's.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Config {
    /// What the command line, this process's environment and the configuration file say together.
    pub fn load(asked: Asked) -> Result<Self> {
        let environment = |name: &str| std::env::var_os(name);
        Self::merge(asked, &environment, rustix::process::geteuid().is_root())
    }

    /// The same without any file, for cowl's own inner commands: whoever started them has read it.
    pub fn without_file(asked: Asked) -> Result<Self> {
        let environment = |name: &str| std::env::var_os(name);
        let root = rustix::process::geteuid().is_root();
        Sources {
            environment: &environment,
            file: file::Settings::default(),
            path: None,
            origins: BTreeMap::new(),
        }
        .merge(asked, root)
    }

    fn merge(asked: Asked, environment: Environment<'_>, root: bool) -> Result<Self> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        // A file that was asked for must be there; one at its usual place need not.
        let chosen = asked
            .config
            .clone()
            .or_else(|| set("COWL_CONFIG").map(PathBuf::from));
        let (path, wanted) = match chosen {
            Some(path) => (Some(path), true),
            None => (usual_file(environment, root), false),
        };
        let found = match &path {
            Some(path) => file::read(path, wanted)?,
            None => None,
        };
        Sources {
            environment,
            path: path.filter(|_| found.is_some()),
            file: found.unwrap_or_default(),
            origins: BTreeMap::new(),
        }
        .merge(asked, root)
    }

    /// The configuration file that was read.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Where the value of a key comes from.
    pub fn origin(&self, key: &str) -> &Origin {
        self.origins.get(key).unwrap_or(&Origin::BuiltIn)
    }
}

/// Where the file is when nobody says otherwise.
fn usual_file(environment: Environment<'_>, root: bool) -> Option<PathBuf> {
    if root {
        return Some(PathBuf::from("/etc/cowl/config.toml"));
    }
    folder(environment, "XDG_CONFIG_HOME")
        .or_else(|| folder(environment, "HOME").map(|home| home.join(".config")))
        .map(|config| config.join("cowl/config.toml"))
}

fn folder(environment: Environment<'_>, name: &str) -> Option<PathBuf> {
    environment(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

struct Sources<'a> {
    environment: Environment<'a>,
    path: Option<PathBuf>,
    file: file::Settings,
    origins: BTreeMap<String, Origin>,
}

impl Sources<'_> {
    fn merge(mut self, asked: Asked, root: bool) -> Result<Config> {
        let mut file = std::mem::take(&mut self.file);
        let color = self.color(asked.color, file.color)?;
        let mounts = self.mounts(&mut file)?;
        let hooks = self.hooks(&mut file, root)?;
        let lxcpath = self.in_home(".local/share/lxc", "/var/lib/lxc", root);
        let config = Config {
            store: self.pick("store", "COWL_STORE", asked.store, file.store, path)?,
            wait: self
                .pick("wait", "COWL_WAIT", asked.wait, file.wait, number)?
                .unwrap_or(10),
            trash_days: {
                let set = file.trash_days;
                self.pick("trash_days", "COWL_TRASH_DAYS", None, set, number)?
                    .unwrap_or(7)
            },
            depth_limit: {
                let set = file.depth_limit;
                self.pick("depth_limit", "COWL_DEPTH_LIMIT", None, set, depth)?
                    .unwrap_or(128)
            },
            mounts,
            color,
            lxcpath: self
                .pick("lxcpath", "COWL_LXCPATH", None, file.lxcpath, path)?
                .unwrap_or(lxcpath),
            hooks,
            prune: file.prune.rules,
            file: self.path.clone(),
            origins: BTreeMap::new(),
        };
        self.note_prune(file.prune.keys);
        Ok(Config {
            origins: self.origins,
            ..config
        })
    }

    /// A path below the home directory, or another one for root.
    fn in_home(&self, below: &str, of_root: &str, root: bool) -> PathBuf {
        let home = folder(self.environment, "HOME").filter(|_| !root);
        home.map_or_else(|| PathBuf::from(of_root), |home| home.join(below))
    }

    /// NO_COLOR takes precedence over the file, but not over `--color` and COWL_COLOR.
    fn color(&mut self, asked: Option<When>, set: Option<When>) -> Result<When> {
        let plain = (self.environment)("NO_COLOR").is_some_and(|value| !value.is_empty());
        let color = self.pick("color", "COWL_COLOR", asked, set, colour)?;
        let color = match color {
            Some(_) if plain && matches!(self.origins.get("color"), Some(Origin::File(_))) => None,
            other => other,
        };
        if color.is_none() && plain {
            self.origins
                .insert("color".to_owned(), Origin::Environment("NO_COLOR"));
        }
        Ok(color.unwrap_or(if plain { When::Never } else { When::Auto }))
    }

    fn mounts(&mut self, file: &mut file::Settings) -> Result<Mounts> {
        let (set, name) = (file.passthrough.take(), "COWL_PASSTHROUGH");
        let passthrough = self.pick("passthrough", name, None, set, passthrough)?;
        let (set, name) = (file.coherence.take(), "COWL_COHERENCE");
        let coherence = self.pick("coherence", name, None, set, coherence)?;
        let awake = self.pick("awake", "COWL_AWAKE", None, file.awake.take(), awake)?;
        Ok(Mounts {
            passthrough: passthrough.unwrap_or_default(),
            coherence: coherence.unwrap_or_default(),
            awake: awake.unwrap_or_default(),
        })
    }

    fn hooks(&mut self, file: &mut file::Settings, root: bool) -> Result<Hooks> {
        let default = self.in_home(".config/cowl/hooks.d", "/etc/cowl/hooks.d", root);
        let default = match folder(self.environment, "XDG_CONFIG_HOME").filter(|_| !root) {
            Some(config) => config.join("cowl/hooks.d"),
            None => default,
        };
        let set = file.hooks.dir.take();
        let dir = self.pick("hooks.dir", "COWL_HOOKS_DIR", None, set, path)?;
        let (set, name) = (file.hooks.timeout.take(), "COWL_HOOKS_TIMEOUT");
        let timeout = self.pick("hooks.timeout", name, None, set, number)?;
        Ok(Hooks {
            dir: dir.unwrap_or(default),
            timeout: timeout.map_or(Duration::from_secs(60), Duration::from_secs),
        })
    }

    /// The first of them that says something of `key`.
    fn pick<T>(
        &mut self,
        key: &'static str,
        variable: &'static str,
        asked: Option<T>,
        file: Option<T>,
        parse: fn(OsString) -> Result<T, &'static str>,
    ) -> Result<Option<T>> {
        if asked.is_some() {
            self.origins.insert(key.to_owned(), Origin::CommandLine);
            return Ok(asked);
        }
        if let Some(value) = (self.environment)(variable) {
            let shown = value.as_encoded_bytes().escape_ascii().to_string();
            let value = parse(value).map_err(|why| {
                Error::usage(format!(
                    "the environment's {variable} is \"{shown}\": {why}"
                ))
                .hint(format!("unset {variable}, or set it to something else"))
            })?;
            self.origins
                .insert(key.to_owned(), Origin::Environment(variable));
            return Ok(Some(value));
        }
        if let (Some(value), Some(path)) = (file, &self.path) {
            self.origins
                .insert(key.to_owned(), Origin::File(path.clone()));
            return Ok(Some(value));
        }
        Ok(None)
    }

    /// Pruning is set by the file alone, and by each container's own settings.
    fn note_prune(&mut self, keys: Vec<String>) {
        let Some(path) = &self.path else { return };
        for key in keys {
            self.origins
                .insert(format!("prune.{key}"), Origin::File(path.clone()));
        }
    }
}

fn path(value: OsString) -> Result<PathBuf, &'static str> {
    // An empty one, and one relative to here, are for the one who uses it to judge.
    Ok(PathBuf::from(value))
}

fn number<N: std::str::FromStr>(value: OsString) -> Result<N, &'static str> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or("it must be a whole number")
}

fn depth(value: OsString) -> Result<usize, &'static str> {
    number(value).and_then(|depth| {
        if file::DEPTHS.contains(&depth) {
            Ok(depth)
        } else {
            Err("it must be from 2 to 500")
        }
    })
}

fn passthrough(value: OsString) -> Result<Passthrough, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Passthrough::NAMES, text));
    found.ok_or(file::PASSTHROUGH)
}

fn coherence(value: OsString) -> Result<Coherence, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Coherence::NAMES, text));
    found.ok_or(file::COHERENCE)
}

fn awake(value: OsString) -> Result<Awake, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Awake::NAMES, text));
    found.ok_or(file::AWAKE)
}

fn colour(value: OsString) -> Result<When, &'static str> {
    match value.to_str() {
        Some("auto") => Ok(When::Auto),
        Some("always") => Ok(When::Always),
        Some("never") => Ok(When::Never),
        _ => Err("it must be auto, always or never"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(file: &str, variables: &[(&str, &str)], asked: Asked) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, file).unwrap();
        let environment = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let asked = Asked {
            config: Some(path),
            ..asked
        };
        Config::merge(asked, &environment, true)
    }

    #[test]
    fn the_command_line_then_the_environment_then_the_file_then_what_is_built_in() {
        let text = "wait = 1\ntrash_days = 3\nstore = \"/s\"\n[prune]\nkeep_last = 2\n";
        let asked = || Asked {
            wait: Some(30),
            ..Asked::default()
        };
        let config = merged(text, &[("COWL_WAIT", "20"), ("COWL_STORE", "/e")], asked()).unwrap();
        assert_eq!(config.wait, 30);
        assert_eq!(*config.origin("wait"), Origin::CommandLine);
        assert_eq!(config.store.as_deref(), Some(Path::new("/e")));
        assert_eq!(*config.origin("store"), Origin::Environment("COWL_STORE"));
        assert_eq!(config.trash_days, 3);
        assert!(matches!(config.origin("trash_days"), Origin::File(_)));
        assert_eq!(config.depth_limit, 128);
        assert_eq!(*config.origin("depth_limit"), Origin::BuiltIn);
        assert_eq!(config.prune.counts.last, Some(2));
        assert!(matches!(config.origin("prune.keep_last"), Origin::File(_)));
        let config = merged(text, &[("COWL_WAIT", "20")], Asked::default()).unwrap();
        assert_eq!(config.wait, 20);
        assert_eq!(config.store.as_deref(), Some(Path::new("/s")));
    }

    #[test]
    fn how_containers_are_mounted() {
        let text = "passthrough = \"off\"\ncoherence = \"overlay\"\nawake = \"off\"\n";
        let config = merged(text, &[("COWL_PASSTHROUGH", "all")], Asked::default()).unwrap();
        assert_eq!(config.mounts.passthrough, Passthrough::All);
        assert_eq!(config.mounts.coherence, Coherence::Overlay);
        assert_eq!(config.mounts.awake, Awake::Off);
        let config = merged("", &[], Asked::default()).unwrap();
        assert_eq!(config.mounts, Mounts::default());
    }

    #[test]
    fn what_is_built_in() {
        let config = Config::merge(Asked::default(), &|_| None, false).unwrap();
        assert_eq!((config.wait, config.trash_days), (10, 7));
        assert_eq!(config.color, When::Auto);
        assert_eq!(config.store, None);
        assert_eq!(config.file(), None);
        let home = |name: &str| (name == "HOME").then(|| OsString::from("/home/u"));
        let config = Config::merge(Asked::default(), &home, false).unwrap();
        assert_eq!(config.lxcpath, Path::new("/home/u/.local/share/lxc"));
        assert_eq!(config.hooks.dir, Path::new("/home/u/.config/cowl/hooks.d"));
        let config = merged("", &[("HOME", "/root")], Asked::default()).unwrap();
        assert_eq!(config.lxcpath, Path::new("/var/lib/lxc"));
        assert_eq!(config.hooks.dir, Path::new("/etc/cowl/hooks.d"));
    }

    #[test]
    fn no_color_comes_before_the_file_and_after_the_command_line() {
        let never = [("NO_COLOR", "1")];
        let file = "color = \"always\"";
        let color = |variables: &[(&str, &str)], asked| {
            merged(
                file,
                variables,
                Asked {
                    color: asked,
                    ..Asked::default()
                },
            )
            .unwrap()
            .color
        };
        assert_eq!(color(&[], None), When::Always);
        assert_eq!(color(&never, None), When::Never);
        assert_eq!(color(&[("NO_COLOR", "")], None), When::Always);
        assert_eq!(color(&never, Some(When::Always)), When::Always);
        let both = [("NO_COLOR", "1"), ("COWL_COLOR", "always")];
        assert_eq!(color(&both, None), When::Always);
    }

    #[test]
    fn a_variable_that_is_wrong_is_named() {
        for (name, value) in [
            ("COWL_WAIT", "soon"),
            ("COWL_TRASH_DAYS", "-1"),
            ("COWL_COLOR", "pink"),
            ("COWL_DEPTH_LIMIT", "1"),
            ("COWL_PASSTHROUGH", "some"),
            ("COWL_COHERENCE", "none"),
            ("COWL_AWAKE", "never"),
        ] {
            let error = merged("", &[(name, value)], Asked::default()).unwrap_err();
            assert_eq!(error.kind, crate::error::Kind::Usage);
            assert!(error.what.contains(name) && error.what.contains(value));
        }
    }
}
