//! The command line of `cowlfs`, compatible with the way in which mount(8), podman and containerd call an overlay
//! program.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::config::{Awake, CACHE_TIMEOUT, Coherence, Config, Passthrough, find_choice};
use cowl_layers::format::XattrSpace;
use cowl_layers::shown::{Allowed, Show, plain};
use cowl_overlay::idmap::IdMap;

/// Mount a stack of layers as one copy-on-write file system
///
/// The layers are in the on-disk format of kernel overlayfs: the kernel can mount what cowlfs has written (with
/// redirect_dir=on,metacopy=on), and vice versa.
///
/// Signals: SIGTERM, SIGINT and SIGHUP unmount the file system in all mount namespaces, sync it, and end the process
/// within five seconds. SIGUSR1 logs the statistics to standard error. SIGUSR2 ends the process if the file system was
/// unmounted and only unused copies of the mount remain in other mount namespaces.
#[derive(Debug, Parser)]
#[command(name = "cowlfs", version)]
pub struct Args {
    /// Set mount options, separated by commas
    ///
    /// Layers: lowerdir=TOP:NEXT:...[::DATA-ONLY]..., upperdir=DIR, workdir=DIR. Without the last two the mount is
    /// read-only. In paths, a backslash escapes a colon or a comma that is part of the name.
    ///
    /// Flags: ro, nosuid, nodev, noexec, noatime. With remount they are changed on an existing mount.
    ///
    /// Format: metacopy=on|off, userxattr, fuse_overlayfs (also read .wh. names and the xattrs of fuse-overlayfs).
    ///
    /// Owners and attributes: uidmapping=DISK:SHOWN:COUNT, gidmapping=DISK:SHOWN:COUNT, squash_to_root,
    /// squash_to_uid=N, squash_to_gid=N, static_nlink, noacl.
    ///
    /// Durability: volatile (do not sync).
    ///
    /// passthrough=auto|all|read|off: files that the kernel reads and writes without the daemon. all: those of the
    /// upper layer, programs and libraries; read: programs and libraries; off: none; auto: all, unless snapshots of the
    /// mount can be taken.
    ///
    /// coherence=posix|overlay: content that a descriptor of a lower file reads after the file was written to. posix:
    /// the new content, except for programs and libraries; overlay: the old content, and the kernel reads all lower
    /// files without the daemon.
    ///
    /// awake=auto|on|off: keep idle CPUs awake during bursts of requests. auto: on small virtual machines whose idle
    /// CPUs halt.
    ///
    /// Daemon: timeout=SECONDS (for cached names and attributes), lookout=MICROSECONDS (busy-polling for the next
    /// request), threaded=0|1, control=SOCKET (path of the control socket).
    ///
    /// Names in the mount table: fsname=NAME, subtype=NAME.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<OsString>,
    /// Run in the foreground
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// Log every detail to standard error and run in the foreground
    #[arg(short = 'd', long)]
    pub debug: bool,
    /// The mount point; a source before it, as mount(8) passes one, is ignored
    #[arg(value_name = "MOUNTPOINT", num_args = 1..=2, required = true)]
    pub paths: Vec<PathBuf>,
}

/// Whether a message has colors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colors {
    /// With the escape sequences for colors.
    On,
    /// Plain text.
    Off,
}

/// Formats help or a usage error of clap for a terminal.
///
/// clap repeats words of the command line verbatim, so their control characters are escaped.
pub fn render_error(mut error: clap::Error, colors: Colors) -> String {
    let words: Vec<_> = error
        .context()
        .filter_map(|(kind, value)| match value {
            ContextValue::String(word) => {
                let shown = word.shown().to_string();
                Some((kind, ContextValue::String(shown)))
            }
            ContextValue::Strings(words) => {
                let shown = words.iter().map(|word| word.shown().to_string()).collect();
                Some((kind, ContextValue::Strings(shown)))
            }
            _ => None,
        })
        .collect();
    // A suggestion repeats a word inside of its styled text, where it cannot be escaped, so it is omitted.
    let is_plain = |word: &String| !word.contains('\\');
    let escaped = words.iter().any(|(_, word)| match word {
        ContextValue::String(word) => !is_plain(word),
        ContextValue::Strings(words) => !words.iter().all(is_plain),
        _ => false,
    });
    if escaped {
        error.insert(ContextKind::Suggested, ContextValue::None);
    }
    for (kind, word) in words {
        error.insert(kind, word);
    }
    let text = match colors {
        Colors::On => error.render().ansi().to_string(),
        Colors::Off => error.render().to_string(),
    };
    let allowed = Allowed {
        lines: true,
        colors: colors == Colors::On,
    };
    plain(&text, allowed).into_owned()
}

/// A parsed command line.
#[derive(Debug)]
pub struct Invocation {
    /// The configuration of the mount.
    pub config: Config,
    /// Whether the process stays in the foreground.
    pub foreground: bool,
    /// Whether everything is logged.
    pub debug: bool,
    /// Whether the flags of an existing mount are changed, instead of a new mount.
    pub remount: bool,
}

impl Args {
    /// Validates the options and returns the configuration, or a message that names the invalid option.
    pub fn into_invocation(self) -> Result<Invocation, String> {
        let mountpoint = self.paths.into_iter().next_back().unwrap_or_default();
        let mut builder = Builder::new(mountpoint);
        for options in &self.options {
            for option in split(options.as_bytes(), b',', false) {
                if !option.is_empty() {
                    builder.parse_option(&option)?;
                }
            }
        }
        Ok(Invocation {
            remount: builder.remount,
            config: builder.finish()?,
            foreground: self.foreground || self.debug,
            debug: self.debug,
        })
    }
}

/// The state of parsing: options in any order, which [`Builder::finish`] combines.
struct Builder {
    config: Config,
    lower: Option<Lowers>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    squash_uid: Option<u32>,
    squash_gid: Option<u32>,
    uids: String,
    gids: String,
    read_only: bool,
    remount: bool,
}

impl Builder {
    fn new(mountpoint: PathBuf) -> Self {
        Self {
            config: Config::new(Vec::new(), None, mountpoint),
            lower: None,
            upper: None,
            work: None,
            squash_uid: None,
            squash_gid: None,
            uids: String::new(),
            gids: String::new(),
            read_only: false,
            remount: false,
        }
    }

    fn parse_option(&mut self, option: &[u8]) -> Result<(), String> {
        let (key, value) = match option.iter().position(|&byte| byte == b'=') {
            Some(end) => (option.get(..end).unwrap_or_default(), option.get(end + 1..)),
            None => (option, None),
        };
        let key = std::str::from_utf8(key).map_err(|_| unknown(key))?;
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
            "metacopy" => self.config.overlay.metacopy = switch()?,
            "fsname" => self.config.mount.source = value.into(),
            "subtype" => self.config.mount.subtype = value.into(),
            // Accepted for compatibility with the kernel. Inode numbers are always unique.
            "xino" if matches!(value, "on" | "off" | "auto") => {}
            "redirect_dir" if matches!(value, "on" | "follow") => {}
            "redirect_dir" => {
                return Err(format!(
                    "option redirect_dir: '{}' is not supported, cowlfs always writes redirects (remove the option)",
                    value.shown()
                ));
            }
            "index" if value == "off" => {}
            // The kernel shows these options for each FUSE mount, and mount(8) passes them to a remount.
            "user_id" | "group_id" => {
                number()?;
            }
            "plugins" => {
                return Err(
                    "option plugins: not supported (copy the layers to a local directory)".into(),
                );
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn parse_flag(&mut self, key: &str) -> Result<(), String> {
        let mount = &mut self.config.mount;
        match key {
            "remount" => self.remount = true,
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "suid" => mount.nosuid = false,
            "nosuid" => mount.nosuid = true,
            "dev" => mount.nodev = false,
            "nodev" => mount.nodev = true,
            "exec" => mount.noexec = false,
            "noexec" => mount.noexec = true,
            "atime" | "relatime" => mount.noatime = false,
            "noatime" => mount.noatime = true,
            "volatile" => self.config.overlay.volatile = true,
            "static_nlink" => self.config.overlay.static_nlink = true,
            "noacl" => self.config.overlay.no_acl = true,
            "squash_to_root" => (self.squash_uid, self.squash_gid) = (Some(0), Some(0)),
            "fuse_overlayfs" => self.config.foreign = true,
            "userxattr" => self.config.space = Some(XattrSpace::User),
            // Always set.
            "default_permissions" | "allow_other" => {}
            // Options of mount(8) and fstab, not of the file system.
            "defaults" | "auto" | "noauto" | "nofail" | "_netdev" => {}
            _ if key.starts_with("x-") => {}
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Config, String> {
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
    format!("unknown option '{}' (see cowlfs --help)", key.shown())
}

/// Splits at each separator that has no backslash before it.
///
/// Escapes remain for [`unescape`], except those of the separator, unless `keep` is true.
fn split(text: &[u8], separator: u8, keep: bool) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        let Some(last) = parts.last_mut() else { break };
        match byte {
            b'\\' => match bytes.next() {
                Some(next) if next == separator && !keep => last.push(next),
                Some(next) => last.extend([b'\\', next]),
                None => last.push(b'\\'),
            },
            _ if byte == separator => parts.push(Vec::new()),
            _ => last.push(byte),
        }
    }
    parts
}

/// Removes the backslashes of escapes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => plain.extend(bytes.next().or(Some(b'\\'))),
            _ => plain.push(byte),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Config, String> {
        let args = std::iter::once("cowlfs").chain(args.iter().copied());
        let args = Args::try_parse_from(args).map_err(|error| error.to_string())?;
        args.into_invocation().map(|invocation| invocation.config)
    }

    #[test]
    fn the_options_of_podman_and_mount_are_accepted() {
        let config = parse(&["-o", "lowerdir=A:B,upperdir=U,workdir=W,", "M"]).unwrap();
        assert_eq!(config.lowers, [PathBuf::from("A"), PathBuf::from("B")]);
        assert_eq!(config.upper, Some(("U".into(), "W".into())));
        assert_eq!(config.mountpoint, PathBuf::from("M"));
        assert!(!config.mount.read_only);

        let config = parse(&[
            "-o",
            "lowerdir=A,upperdir=U,workdir=W,,volatile,uidmapping=:0:100000:65536,gidmapping=:0:100000:65536",
            "M",
        ])
        .unwrap();
        assert!(config.overlay.volatile);
        assert_eq!(config.overlay.uids.to_mount(1), 100_001);

        let config = parse(&["-o", r"lowerdir=D,control=a\,b", "M"]).unwrap();
        assert_eq!(config.control, Some("a,b".into()));

        let config = parse(&["-o", "lowerdir=D:E", "M"]).unwrap();
        assert!(config.mount.read_only);

        let config = parse(&["overlay", "/mnt", "-o", "lowerdir=A,dev,suid,rw"]).unwrap();
        assert_eq!(config.mountpoint, PathBuf::from("/mnt"));
    }

    #[test]
    fn data_only_layers_are_parsed() {
        let config = parse(&["-o", r"lowerdir=A:B::C\:x::D,fuse_overlayfs", "M"]).unwrap();
        assert_eq!(config.lowers, [PathBuf::from("A"), PathBuf::from("B")]);
        assert_eq!(config.data_only, [PathBuf::from("C:x"), PathBuf::from("D")]);
        assert!(config.foreign);
    }

    #[test]
    fn escaped_characters_in_paths_are_parsed() {
        let config = parse(&["-o", r"lowerdir=a\:b:c\\d,upperdir=x\,y,workdir=z\:", "M"]).unwrap();
        assert_eq!(config.lowers, [PathBuf::from("a:b"), PathBuf::from(r"c\d")]);
        assert_eq!(config.upper, Some(("x,y".into(), "z:".into())));
    }

    #[test]
    fn every_flag_has_an_effect() {
        let config = parse(&[
            "-o",
            "lowerdir=A,ro,nosuid,nodev,noexec,noatime,static_nlink,noacl,squash_to_root,userxattr,\
             timeout=0.5,threaded=0,awake=off,passthrough=read,coherence=overlay,metacopy=off,fsync=0,\
             fsname=n,subtype=s,xino=auto,x-foo",
            "M",
        ])
        .unwrap();
        let m = &config.mount;
        assert!(m.read_only && m.nosuid && m.nodev && m.noexec && m.noatime);
        assert_eq!((&*m.source, &*m.subtype), ("n", "s"));
        let b = &config.overlay;
        assert!(b.static_nlink && b.no_acl && b.volatile && !b.metacopy);
        assert_eq!(b.uids.to_mount(7), 0);
        assert_eq!(config.space, Some(XattrSpace::User));
        assert_eq!(config.cache_timeout, Duration::from_millis(500));
        assert_eq!(config.threads, Some(1));
        assert_eq!(config.passthrough, Passthrough::Read);
        assert_eq!(config.coherence, Coherence::Overlay);
        assert_eq!(config.awake, Awake::Off);
    }

    /// The arguments of mount.fuse(8) for `mount -o remount,ro M`.
    #[test]
    fn a_remount_needs_no_layers() {
        let args = [
            "cowlfs",
            "cowlfs",
            "M",
            "-o",
            "ro,noatime,remount,user_id=0,group_id=0,default_permissions,allow_other,dev,suid",
        ];
        let invocation = Args::try_parse_from(args).unwrap().into_invocation();
        let invocation = invocation.unwrap();
        let mount = &invocation.config.mount;
        assert!(invocation.remount && mount.read_only && mount.noatime);
        assert!(!mount.nodev && !mount.nosuid);
    }

    #[test]
    fn an_error_names_the_invalid_option() {
        for (options, word) in [
            ("upperdir=U,workdir=W", "lowerdir"),
            ("lowerdir=A,upperdir=U", "workdir"),
            ("lowerdir=A,workdir=W", "upperdir"),
            ("lowerdir=A,bogus", "bogus"),
            ("lowerdir=A,bogus=1", "bogus"),
            ("lowerdir=A,plugins=x", "plugins"),
            ("lowerdir=A::B:C", "data-only"),
            ("lowerdir=::B", "empty path"),
            ("lowerdir=A::", "empty path"),
            ("lowerdir=A:", "empty path"),
            ("lowerdir=A:::B", "empty path"),
            ("lowerdir=", "empty path"),
            ("lowerdir=A,timeout=x", "timeout"),
            ("lowerdir=A,timeout=-1", "timeout"),
            ("lowerdir=A,uidmapping=1:2", "uidmapping"),
            ("lowerdir=A,metacopy=maybe", "metacopy"),
            ("lowerdir=A,xino=maybe", "xino"),
            ("lowerdir=A,passthrough=maybe", "passthrough"),
            ("lowerdir=A,awake=maybe", "awake"),
            ("lowerdir=A,coherence=maybe", "coherence"),
            ("lowerdir=A,redirect_dir=off", "redirect_dir"),
        ] {
            let error = parse(&["-o", options, "M"]).unwrap_err();
            assert!(error.contains(word), "{options}: {error}");
        }
        assert!(parse(&["-o", "lowerdir=A"]).is_err());
        assert!(parse(&["-o", "lowerdir=A", "a", "b", "c"]).is_err());
    }
}
