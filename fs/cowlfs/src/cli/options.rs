//! Parsing of mount options.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use super::split::{split, unescape};
use crate::config::{
    Awake, CACHE_TIMEOUT, Coherence, Config, ControlSocket, Keeper, LiveLayers, Passthrough,
    find_choice,
};
use cowl_layers::format::XattrSpace;
use cowl_layers::shown::Show;
use cowl_layers::sys::private::AtimeMode;
use cowl_overlay::idmap::IdMap;

/// The state of parsing: options in any order, which [`Builder::finish`] combines.
pub(super) struct Builder {
    config: Config,
    lower: Option<Lowers>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    squash_uid: Option<u32>,
    squash_gid: Option<u32>,
    uids: String,
    gids: String,
    read_only: bool,
    pub(super) remount: bool,
    /// Messages about options that were ignored.
    pub(super) ignored: Vec<String>,
}

impl Builder {
    pub(super) fn new(mountpoint: PathBuf) -> Self {
        Self {
            config: Config {
                control_socket: ControlSocket::Optional,
                // Podman passes no option of its own, and its image layers contain these markers.
                foreign: true,
                ..Config::new(Vec::new(), None, mountpoint)
            },
            lower: None,
            upper: None,
            work: None,
            squash_uid: None,
            squash_gid: None,
            uids: String::new(),
            gids: String::new(),
            read_only: false,
            remount: false,
            ignored: Vec::new(),
        }
    }

    pub(super) fn parse_option(&mut self, option: &[u8]) -> Result<(), String> {
        let (key, value) = match option.iter().position(|&byte| byte == b'=') {
            Some(end) => (option.get(..end).unwrap_or_default(), option.get(end + 1..)),
            None => (option, None),
        };
        let Ok(key) = std::str::from_utf8(key) else {
            self.ignored.push(unknown(key));
            return Ok(());
        };
        match value {
            Some(value) if self.parse_path(key, value)? => Ok(()),
            Some(value) => {
                let value = std::str::from_utf8(value)
                    .map_err(|_| format!("option {key}: '{}' is not UTF-8", value.shown()))?;
                self.parse_value(key, value)
            }
            None => self.parse_flag(key),
        }
    }

    /// Parses an option whose value is a path. Returns false if `key` is no such option.
    fn parse_path(&mut self, key: &str, value: &[u8]) -> Result<bool, String> {
        let path = |raw: &[u8]| {
            if raw.is_empty() {
                Err(format!("option {key}: empty path"))
            } else {
                Ok(PathBuf::from(OsString::from_vec(unescape(raw))))
            }
        };
        match key {
            "lowerdir" => {
                self.lower = Some(parse_lowers(&split(value, b':', true), path)?);
            }
            "upperdir" => self.upper = Some(path(value)?),
            "workdir" => self.work = Some(path(value)?),
            "control" => self.config.control = Some(path(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn parse_value(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = || {
            let parsed: Result<u32, _> = value.parse();
            parsed.map_err(|_| format!("option {key}: '{}' is not a number", value.shown()))
        };
        let switch = || match value {
            "on" | "1" => Ok(true),
            "off" | "0" => Ok(false),
            _ => Err(unknown_value(key, value, "on, off")),
        };
        match key {
            "uidmapping" => self.uids = value.into(),
            "gidmapping" => self.gids = value.into(),
            "squash_to_uid" => self.squash_uid = Some(number()?),
            "squash_to_gid" => self.squash_gid = Some(number()?),
            "timeout" => {
                let seconds: f64 = value
                    .parse()
                    .ok()
                    .filter(|s: &f64| s.is_finite() && *s >= 0.0)
                    .ok_or_else(|| {
                        format!(
                            "option timeout: '{}' is not a number of seconds",
                            value.shown()
                        )
                    })?;
                let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(CACHE_TIMEOUT);
                self.config.cache_timeout = timeout.min(CACHE_TIMEOUT);
            }
            "lookout" => self.config.busy_poll = Duration::from_micros(number()?.into()),
            "awake" => {
                self.config.awake = find_choice(&Awake::NAMES, value)
                    .ok_or_else(|| unknown_value(key, value, "auto, on, off"))?;
            }
            "passthrough" => {
                self.config.passthrough = find_choice(&Passthrough::NAMES, value)
                    .ok_or_else(|| unknown_value(key, value, "auto, all, read, off"))?;
            }
            "coherence" => {
                self.config.coherence = find_choice(&Coherence::NAMES, value)
                    .ok_or_else(|| unknown_value(key, value, "posix, overlay"))?;
            }
            "fsync" => self.config.overlay.volatile = !switch()?,
            "threaded" => self.config.threads = if switch()? { None } else { Some(1) },
            "keeper" => {
                self.config.keeper = if switch()? { Keeper::On } else { Keeper::Off };
            }
            "metacopy" => self.config.overlay.metacopy = switch()?,
            "fsname" => self.config.mount.source = value.into(),
            "subtype" => self.config.mount.subtype = value.into(),
            // Accepted for compatibility with the kernel. Inode numbers are always unique, and hard links are preserved
            // without an index.
            "xino" if matches!(value, "on" | "off" | "auto") => {}
            "xino" => return Err(unknown_value(key, value, "on, off, auto")),
            "index" => {
                switch()?;
            }
            "redirect_dir" if matches!(value, "on" | "follow") => {}
            "redirect_dir" => {
                return Err(format!(
                    "option redirect_dir: '{}' is not supported, cowlfs always writes redirects (remove the option)",
                    value.shown()
                ));
            }
            // The kernel shows these options for each FUSE mount, and mount(8) passes them to a remount.
            "user_id" | "group_id" => {
                number()?;
            }
            "plugins" => {
                return Err(
                    "option plugins: not supported (copy the layers to a local directory)".into(),
                );
            }
            // Options of mount(8), not of the file system.
            "comment" | "user" => {}
            _ => self.ignored.push(unknown(key)),
        }
        Ok(())
    }

    fn parse_flag(&mut self, key: &str) -> Result<(), String> {
        let mount = &mut self.config.mount;
        match key {
            "remount" => self.remount = true,
            "managed" => self.config.manage(),
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "suid" => mount.nosuid = false,
            "nosuid" => mount.nosuid = true,
            "dev" => mount.nodev = false,
            "nodev" => mount.nodev = true,
            "exec" => mount.noexec = false,
            "noexec" => mount.noexec = true,
            "symfollow" => mount.nosymfollow = false,
            "nosymfollow" => mount.nosymfollow = true,
            "atime" | "relatime" | "norelatime" | "nostrictatime" => {
                mount.atime.mode = AtimeMode::Default;
            }
            "strictatime" => mount.atime.mode = AtimeMode::Strict,
            "noatime" => mount.atime.mode = AtimeMode::Never,
            "diratime" => mount.atime.nodiratime = false,
            "nodiratime" => mount.atime.nodiratime = true,
            "async" => mount.sync = false,
            "sync" => mount.sync = true,
            "dirsync" => self
                .ignored
                .push("option dirsync has no effect: sync a directory with fsync(2)".into()),
            "lazytime" => self.ignored.push(
                "option lazytime has no effect: mount the file system of upperdir with it".into(),
            ),
            "mand" => self.ignored.push(
                "option mand has no effect: Linux has no mandatory locks since version 5.15".into(),
            ),
            "volatile" => self.config.overlay.volatile = true,
            "static_nlink" => self.config.overlay.static_nlink = true,
            "noacl" => self.config.overlay.no_acl = true,
            "squash_to_root" => (self.squash_uid, self.squash_gid) = (Some(0), Some(0)),
            "fuse_overlayfs" => self.config.foreign = true,
            "nofuse_overlayfs" => self.config.foreign = false,
            "userxattr" => self.config.space = Some(XattrSpace::User),
            // Always set.
            "default_permissions" | "allow_other" => {}
            // Options of mount(8) and fstab, not of the file system.
            "defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "user" | "users" | "nouser"
            | "owner" | "group" | "silent" | "loud" => {}
            // The defaults of the options above that have no effect.
            "nolazytime" | "nomand" | "noiversion" => {}
            _ if key.starts_with("x-") => {}
            _ => self.ignored.push(unknown(key)),
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Config, String> {
        if self.remount {
            self.config.mount.read_only = self.read_only;
            return Ok(self.config);
        }
        let map = |key: &str, text: &str, squash| -> Result<IdMap, String> {
            let ranges = if text.is_empty() {
                Vec::new()
            } else {
                IdMap::parse(text).map_err(|error| format!("option {key}: {error}"))?
            };
            Ok(IdMap::new(ranges, squash))
        };
        self.config.overlay.uids = map("uidmapping", &self.uids, self.squash_uid)?;
        self.config.overlay.gids = map("gidmapping", &self.gids, self.squash_gid)?;
        (self.config.lowers, self.config.data_only) = self
            .lower
            .ok_or("option lowerdir is missing: specify the layers, topmost first")?;
        self.config.upper = match (self.upper, self.work) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (Some(_), None) => {
                return Err(
                    "option workdir is missing: specify an empty directory on the \
                            file system of upperdir"
                        .into(),
                );
            }
            (None, Some(_)) => {
                return Err("option upperdir is missing: specify it, or remove workdir".into());
            }
            (None, None) => None,
        };
        self.config.mount.read_only = self.read_only || self.config.upper.is_none();
        if self.config.mount.read_only {
            self.config.live_layers = LiveLayers::Allowed;
        }
        Ok(self.config)
    }
}

/// Lower layers, and data-only layers.
type Lowers = (Vec<PathBuf>, Vec<PathBuf>);

/// Parses lowerdir in the kernel's syntax: `A:B::C::D` means two lower layers, and two data-only layers below them.
fn parse_lowers(
    parts: &[Vec<u8>],
    path: impl Fn(&[u8]) -> Result<PathBuf, String>,
) -> Result<Lowers, String> {
    let (mut visible, mut data) = (Vec::new(), Vec::new());
    let mut parts = parts.iter();
    while let Some(part) = parts.next() {
        if !part.is_empty() || visible.is_empty() {
            if !data.is_empty() {
                return Err(format!(
                    "option lowerdir: '{}' follows data-only layers: write '::' before it as well",
                    part.shown()
                ));
            }
            visible.push(path(part)?);
            continue;
        }
        // An empty part is the position between two colons.
        data.push(path(parts.next().map_or(&[][..], Vec::as_slice))?);
    }
    Ok((visible, data))
}

fn unknown_value(key: &str, value: &str, known: &str) -> String {
    format!(
        "option {key}: invalid value '{}' (possible values: {known})",
        value.shown()
    )
}

fn unknown(key: &(impl Show + ?Sized)) -> String {
    format!(
        "unknown option '{}' is ignored (see cowlfs --help)",
        key.shown()
    )
}
