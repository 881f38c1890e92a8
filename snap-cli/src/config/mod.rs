//! Settings of all commands.
//!
//! An option of the command line takes precedence over the environment, the environment over the configuration file,
//! and the file over the default. The origin of each value is recorded for `cowl config`. This module does not depend
//! on stores or commands.

mod file;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cowlfs::config::{Awake, Coherence, Keeper, Passthrough, find_choice};
use serde::{Deserialize, Serialize};

use self::file::Presence;
use crate::error::{Error, Result};
use crate::host::rootless;
use crate::store::Mounts;
use crate::store::kernel::Driver;
use crate::store::retention::Rules;
use cowl_layers::shown::Show as _;

/// The conditions under which output is colored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ColorChoice {
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
    /// The directory with one subdirectory for each event.
    pub dir: PathBuf,
    /// The time limit of one script; zero means no limit.
    pub timeout: Duration,
}

/// The origin of a setting's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// An option of the command line.
    CommandLine,
    /// The environment variable of this name.
    Environment(&'static str),
    /// The configuration file at this path.
    File(PathBuf),
    /// The default.
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
    /// The home store, unless it is the default.
    pub store: Option<PathBuf>,
    /// The time to wait for locks of other commands, in seconds.
    pub wait: u64,
    /// The number of days that a destroyed container stays in the trash.
    pub trash_days: u32,
    /// The number of layers above which a container is flattened.
    pub depth_limit: usize,
    /// Mount options of containers.
    pub mounts: Mounts,
    /// The conditions under which output is colored.
    pub color: ColorChoice,
    /// The directory of LXC's containers.
    pub lxcpath: PathBuf,
    /// Scripts that run before and after commands.
    pub hooks: Hooks,
    /// The retention rules of containers without rules of their own.
    pub prune: Rules,
    /// The configuration file that was read.
    file: Option<PathBuf>,
    origins: BTreeMap<String, Origin>,
}

/// The settings on the command line.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--config`
    pub config: Option<PathBuf>,
    /// `--store`
    pub store: Option<PathBuf>,
    /// `--wait`
    pub wait: Option<u64>,
    /// `--color`
    pub color: Option<ColorChoice>,
}

/// A function that returns the value of an environment variable; tests replace it.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Config {
    /// Merges the command line, this process's environment and the configuration file.
    pub fn load(overrides: Overrides) -> Result<Self> {
        let environment = |name: &str| std::env::var_os(name);
        Self::merge(overrides, &environment, rootless::is_system_root())
    }

    /// Merges the command line and the environment, without a configuration file.
    ///
    /// This is for internal commands: the command that started them has read the file.
    pub fn without_file(overrides: Overrides) -> Result<Self> {
        let environment = |name: &str| std::env::var_os(name);
        let root = rootless::is_system_root();
        Sources {
            environment: &environment,
            file: file::Settings::default(),
            path: None,
            origins: BTreeMap::new(),
        }
        .merge(overrides, root)
    }

    fn merge(overrides: Overrides, environment: Environment<'_>, root: bool) -> Result<Self> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        let chosen = overrides
            .config
            .clone()
            .or_else(|| set("COWL_CONFIG").map(PathBuf::from));
        let (path, presence) = match chosen {
            Some(path) => (Some(path), Presence::Required),
            None => (default_file(environment, root), Presence::Optional),
        };
        let found = match &path {
            Some(path) => file::read(path, presence)?,
            None => None,
        };
        Sources {
            environment,
            path: path.filter(|_| found.is_some()),
            file: found.unwrap_or_default(),
            origins: BTreeMap::new(),
        }
        .merge(overrides, root)
    }

    /// Returns the path of the configuration file that was read.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Returns the origin of the value of a key.
    pub fn origin(&self, key: &str) -> &Origin {
        self.origins.get(key).unwrap_or(&Origin::BuiltIn)
    }
}

/// Returns the default path of the configuration file.
fn default_file(environment: Environment<'_>, root: bool) -> Option<PathBuf> {
    if root {
        return Some(PathBuf::from("/etc/cowl/config.toml"));
    }
    absolute_dir(environment, "XDG_CONFIG_HOME")
        .or_else(|| absolute_dir(environment, "HOME").map(|home| home.join(".config")))
        .map(|config| config.join("cowl/config.toml"))
}

/// Returns the value of a variable if it is an absolute path. A relative one is ignored, as the XDG specification
/// demands.
fn absolute_dir(environment: Environment<'_>, name: &str) -> Option<PathBuf> {
    environment(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

/// The sources of settings besides the command line.
struct Sources<'a> {
    environment: Environment<'a>,
    path: Option<PathBuf>,
    file: file::Settings,
    origins: BTreeMap<String, Origin>,
}

impl Sources<'_> {
    fn merge(mut self, overrides: Overrides, root: bool) -> Result<Config> {
        let mut file = std::mem::take(&mut self.file);
        let color = self.color(overrides.color, file.color)?;
        let mounts = self.mounts(&mut file)?;
        let hooks = self.hooks(&mut file, root)?;
        let lxcpath = self.in_home(".local/share/lxc", "/var/lib/lxc", root);
        let config = Config {
            store: self.pick("store", "COWL_STORE", overrides.store, file.store, to_path)?,
            wait: self
                .pick("wait", "COWL_WAIT", overrides.wait, file.wait, parse_number)?
                .unwrap_or(10),
            trash_days: {
                let set = file.trash_days;
                self.pick("trash_days", "COWL_TRASH_DAYS", None, set, parse_number)?
                    .unwrap_or(7)
            },
            depth_limit: {
                let set = file.depth_limit;
                self.pick("depth_limit", "COWL_DEPTH_LIMIT", None, set, parse_depth)?
                    .unwrap_or(128)
            },
            mounts,
            color,
            lxcpath: self
                .pick("lxcpath", "COWL_LXCPATH", None, file.lxcpath, to_path)?
                .unwrap_or(lxcpath),
            hooks,
            prune: file.prune.rules,
            file: self.path.clone(),
            origins: BTreeMap::new(),
        };
        self.record_prune_origins(file.prune.keys);
        Ok(Config {
            origins: self.origins,
            ..config
        })
    }

    /// Returns a path below the home directory, or `of_root` for root.
    fn in_home(&self, below: &str, of_root: &str, root: bool) -> PathBuf {
        let home = absolute_dir(self.environment, "HOME").filter(|_| !root);
        home.map_or_else(|| PathBuf::from(of_root), |home| home.join(below))
    }

    /// Merges the settings of colors.
    ///
    /// NO_COLOR takes precedence over the file, but not over `--color` and COWL_COLOR.
    fn color(
        &mut self,
        option: Option<ColorChoice>,
        set: Option<ColorChoice>,
    ) -> Result<ColorChoice> {
        let no_color = (self.environment)("NO_COLOR").is_some_and(|value| !value.is_empty());
        let color = self.pick("color", "COWL_COLOR", option, set, parse_color)?;
        let color = match color {
            Some(_) if no_color && matches!(self.origins.get("color"), Some(Origin::File(_))) => {
                None
            }
            other => other,
        };
        if color.is_none() && no_color {
            self.origins
                .insert("color".to_owned(), Origin::Environment("NO_COLOR"));
        }
        Ok(color.unwrap_or(match no_color {
            true => ColorChoice::Never,
            false => ColorChoice::Auto,
        }))
    }

    fn mounts(&mut self, file: &mut file::Settings) -> Result<Mounts> {
        let (set, name) = (file.passthrough.take(), "COWL_PASSTHROUGH");
        let passthrough = self.pick("passthrough", name, None, set, parse_passthrough)?;
        let (set, name) = (file.coherence.take(), "COWL_COHERENCE");
        let coherence = self.pick("coherence", name, None, set, parse_coherence)?;
        let set = file.awake.take();
        let awake = self.pick("awake", "COWL_AWAKE", None, set, parse_awake)?;
        let set = file.keeper.take();
        let keeper = self.pick("keeper", "COWL_KEEPER", None, set, parse_keeper)?;
        let set = file.driver.take();
        let driver = self.pick("driver", "COWL_DRIVER", None, set, parse_driver)?;
        Ok(Mounts {
            passthrough: passthrough.unwrap_or_default(),
            coherence: coherence.unwrap_or_default(),
            awake: awake.unwrap_or_default(),
            keeper: keeper.unwrap_or_default(),
            driver: driver.unwrap_or_default(),
        })
    }

    fn hooks(&mut self, file: &mut file::Settings, root: bool) -> Result<Hooks> {
        let default = self.in_home(".config/cowl/hooks.d", "/etc/cowl/hooks.d", root);
        let config = absolute_dir(self.environment, "XDG_CONFIG_HOME").filter(|_| !root);
        let default = match config {
            Some(config) => config.join("cowl/hooks.d"),
            None => default,
        };
        let set = file.hooks.dir.take();
        let dir = self.pick("hooks.dir", "COWL_HOOKS_DIR", None, set, to_path)?;
        let (set, name) = (file.hooks.timeout.take(), "COWL_HOOKS_TIMEOUT");
        let timeout = self.pick("hooks.timeout", name, None, set, parse_number)?;
        Ok(Hooks {
            dir: dir.unwrap_or(default),
            timeout: timeout.map_or(Duration::from_secs(60), Duration::from_secs),
        })
    }

    /// Returns the value of `key` from the source with the highest precedence that sets it, and records the origin.
    fn pick<T>(
        &mut self,
        key: &'static str,
        variable: &'static str,
        option: Option<T>,
        file: Option<T>,
        parse: fn(OsString) -> Result<T, &'static str>,
    ) -> Result<Option<T>> {
        if option.is_some() {
            self.origins.insert(key.to_owned(), Origin::CommandLine);
            return Ok(option);
        }
        if let Some(value) = (self.environment)(variable) {
            let shown = value.shown().to_string();
            let value = parse(value).map_err(|why| {
                Error::usage(format!(
                    "invalid value of the environment variable {variable}: \"{shown}\": {why}"
                ))
                .hint(format!("unset {variable}, or set another value"))
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

    /// Records the origin of the retention rules: no option and no variable sets them.
    fn record_prune_origins(&mut self, keys: Vec<String>) {
        let Some(path) = &self.path else { return };
        for key in keys {
            self.origins
                .insert(format!("prune.{key}"), Origin::File(path.clone()));
        }
    }
}

fn to_path(value: OsString) -> Result<PathBuf, &'static str> {
    // The user of the path rejects an empty one, and a relative one if it has to.
    Ok(PathBuf::from(value))
}

fn parse_number<N: std::str::FromStr>(value: OsString) -> Result<N, &'static str> {
    value
        .to_str()
        .and_then(|text| text.parse().ok())
        .ok_or("it must be a whole number")
}

fn parse_depth(value: OsString) -> Result<usize, &'static str> {
    parse_number(value).and_then(|depth| {
        if file::DEPTHS.contains(&depth) {
            Ok(depth)
        } else {
            Err("it must be from 2 to 500")
        }
    })
}

fn parse_passthrough(value: OsString) -> Result<Passthrough, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Passthrough::NAMES, text));
    found.ok_or(file::PASSTHROUGH)
}

fn parse_coherence(value: OsString) -> Result<Coherence, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Coherence::NAMES, text));
    found.ok_or(file::COHERENCE)
}

fn parse_awake(value: OsString) -> Result<Awake, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Awake::NAMES, text));
    found.ok_or(file::AWAKE)
}

fn parse_keeper(value: OsString) -> Result<Keeper, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Keeper::NAMES, text));
    found.ok_or(file::KEEPER)
}

fn parse_driver(value: OsString) -> Result<Driver, &'static str> {
    let found = value
        .to_str()
        .and_then(|text| find_choice(&Driver::NAMES, text));
    found.ok_or(file::DRIVER)
}

fn parse_color(value: OsString) -> Result<ColorChoice, &'static str> {
    match value.to_str() {
        Some("auto") => Ok(ColorChoice::Auto),
        Some("always") => Ok(ColorChoice::Always),
        Some("never") => Ok(ColorChoice::Never),
        _ => Err("it must be auto, always or never"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(file: &str, variables: &[(&str, &str)], overrides: Overrides) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        std::fs::write(&path, file).unwrap();
        let environment = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        let overrides = Overrides {
            config: Some(path),
            ..overrides
        };
        Config::merge(overrides, &environment, true)
    }

    #[test]
    fn sources_have_the_documented_precedence() {
        let text = "wait = 1\ntrash_days = 3\nstore = \"/s\"\n[prune]\nkeep_last = 2\n";
        let overrides = Overrides {
            wait: Some(30),
            ..Overrides::default()
        };
        let variables = [("COWL_WAIT", "20"), ("COWL_STORE", "/e")];
        let config = merged(text, &variables, overrides).unwrap();
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
        let config = merged(text, &[("COWL_WAIT", "20")], Overrides::default()).unwrap();
        assert_eq!(config.wait, 20);
        assert_eq!(config.store.as_deref(), Some(Path::new("/s")));
    }

    #[test]
    fn mount_options_come_from_the_file_and_the_environment() {
        let text = "passthrough = \"off\"\ncoherence = \"overlay\"\nawake = \"off\"\n";
        let config = merged(text, &[("COWL_PASSTHROUGH", "all")], Overrides::default()).unwrap();
        assert_eq!(config.mounts.passthrough, Passthrough::All);
        assert_eq!(config.mounts.coherence, Coherence::Overlay);
        assert_eq!(config.mounts.awake, Awake::Off);
        let config = merged("", &[], Overrides::default()).unwrap();
        assert_eq!(config.mounts, Mounts::default());
    }

    #[test]
    fn defaults_depend_on_the_user() {
        let config = Config::merge(Overrides::default(), &|_| None, false).unwrap();
        assert_eq!((config.wait, config.trash_days), (10, 7));
        assert_eq!(config.color, ColorChoice::Auto);
        assert_eq!(config.store, None);
        assert_eq!(config.file(), None);
        let home = |name: &str| (name == "HOME").then(|| OsString::from("/home/u"));
        let config = Config::merge(Overrides::default(), &home, false).unwrap();
        assert_eq!(config.lxcpath, Path::new("/home/u/.local/share/lxc"));
        assert_eq!(config.hooks.dir, Path::new("/home/u/.config/cowl/hooks.d"));
        let config = merged("", &[("HOME", "/root")], Overrides::default()).unwrap();
        assert_eq!(config.lxcpath, Path::new("/var/lib/lxc"));
        assert_eq!(config.hooks.dir, Path::new("/etc/cowl/hooks.d"));
    }

    #[test]
    fn no_color_overrides_the_file_but_not_the_command_line() {
        let never = [("NO_COLOR", "1")];
        let file = "color = \"always\"";
        let color = |variables: &[(&str, &str)], color| {
            let overrides = Overrides {
                color,
                ..Overrides::default()
            };
            merged(file, variables, overrides).unwrap().color
        };
        assert_eq!(color(&[], None), ColorChoice::Always);
        assert_eq!(color(&never, None), ColorChoice::Never);
        assert_eq!(color(&[("NO_COLOR", "")], None), ColorChoice::Always);
        assert_eq!(
            color(&never, Some(ColorChoice::Always)),
            ColorChoice::Always
        );
        let both = [("NO_COLOR", "1"), ("COWL_COLOR", "always")];
        assert_eq!(color(&both, None), ColorChoice::Always);
    }

    #[test]
    fn an_error_names_the_invalid_variable() {
        for (name, value) in [
            ("COWL_WAIT", "soon"),
            ("COWL_TRASH_DAYS", "-1"),
            ("COWL_COLOR", "pink"),
            ("COWL_DEPTH_LIMIT", "1"),
            ("COWL_PASSTHROUGH", "some"),
            ("COWL_COHERENCE", "none"),
            ("COWL_AWAKE", "never"),
            ("COWL_KEEPER", "never"),
        ] {
            let error = merged("", &[(name, value)], Overrides::default()).unwrap_err();
            assert_eq!(error.kind, crate::error::Kind::Usage);
            assert!(error.what.contains(name) && error.what.contains(value));
        }
    }
}
