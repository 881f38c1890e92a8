//! The command line of `cowlfs`, as mount(8), podman and containerd call an overlay program.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::config::{Awake, Coherence, Config, Passthrough, named};
use cowl_layers::format::XattrSpace;
use cowl_layers::shown::{Allowed, Show, plain};
use cowl_overlay::idmap::IdMap;

/// Mount a stack of layers as one copy-on-write file system.
///
/// The layers are in kernel overlayfs's format: what cowlfs writes the kernel mounts (with
/// redirect_dir=on,metacopy=on), and the other way round.
#[derive(Debug, Parser)]
#[command(name = "cowlfs", version)]
pub struct Args {
    /// Options, separated by commas: lowerdir=TOP:NEXT:...[::DATA-ONLY]..., upperdir=DIR, workdir=DIR
    /// (without the last two the mount is read-only), ro, nosuid, nodev, noexec, noatime, volatile, metacopy=on|off,
    /// userxattr, fuse_overlayfs (its .wh. names and attributes are marks too), uidmapping=DISK:SHOWN:COUNT, gidmapping=..., squash_to_root, squash_to_uid=N,
    /// squash_to_gid=N, static_nlink, noacl, timeout=SECONDS, lookout=MICROSECONDS, threaded=0|1,
    /// awake=auto|on|off (whether idle CPUs are kept from sleeping while requests come in numbers; auto: on small virtual machines where they halt),
    /// passthrough=auto|all|read|off (which files the kernel reads and writes by itself: those of the upper, programs and libraries;
    /// programs and libraries alone; none), coherence=posix|overlay (old descriptors of a lower file see what is written
    /// to it, those of programs and libraries excepted; or none does, and the kernel reads all lower files by itself), fsname=NAME, subtype=NAME;
    /// control=SOCKET, on which the daemon can be asked what it has done;
    /// remount, to change ro, nosuid, nodev, noexec, noatime of a mount that is there.
    /// SIGUSR1 has the daemon say on standard error what it has done. SIGTERM, SIGINT and SIGHUP unmount it
    /// everywhere, sync what was written and end it, five seconds later at the latest. SIGUSR2 ends it if it was
    /// unmounted and only unused copies in other mount namespaces are left.
    /// In paths, a backslash stands before a colon or comma that belongs to the name
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<OsString>,
    /// Stay in the foreground
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// Log every detail to standard error and stay in the foreground
    #[arg(short = 'd', long)]
    pub debug: bool,
    /// The mount point; a source name before it, as mount(8) gives one, is passed over
    #[arg(value_name = "MOUNTPOINT", num_args = 1..=2, required = true)]
    pub places: Vec<PathBuf>,
}

/// What clap has to say of a command line, help or a mistake, in text for people: it repeats words of the command
/// line as they are.
pub fn explanation(mut error: clap::Error, colors: bool) -> String {
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
    // A suggestion repeats a word in the midst of its styles: where a word was escaped it is left out.
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
        true => error.render().ansi().to_string(),
        false => error.render().to_string(),
    };
    let allowed = Allowed {
        lines: true,
        colors,
    };
    plain(&text, allowed).into_owned()
}

/// What a command line asks for.
#[derive(Debug)]
pub struct Invocation {
    /// The mount.
    pub config: Config,
    /// No fork.
    pub foreground: bool,
    /// Log everything.
    pub debug: bool,
    /// No new mount: the flags of the one that is there are to change.
    pub remount: bool,
}

impl Args {
    /// Checks the options and makes a configuration; the error says which option is wrong and why.
    pub fn into_invocation(self) -> Result<Invocation, String> {
        let mountpoint = self.places.into_iter().next_back().unwrap_or_default();
        let mut build = Build::new(mountpoint);
        for options in &self.options {
            for option in split(options.as_bytes(), b',', false) {
                if !option.is_empty() {
                    build.take(&option)?;
                }
            }
        }
        Ok(Invocation {
            remount: build.remount,
            config: build.finish()?,
            foreground: self.foreground || self.debug,
            debug: self.debug,
        })
    }
}

struct Build {
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

impl Build {
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

    fn take(&mut self, option: &[u8]) -> Result<(), String> {
        let (key, value) = match option.iter().position(|&byte| byte == b'=') {
            Some(at) => (option.get(..at).unwrap_or_default(), option.get(at + 1..)),
            None => (option, None),
        };
        let key = std::str::from_utf8(key)
            .map_err(|_| format!("unknown option '{}'", option.escape_ascii()))?;
        match value {
            Some(value) if self.take_path(key, value)? => Ok(()),
            Some(value) => {
                let value = std::str::from_utf8(value)
                    .map_err(|_| format!("option {key}: '{}' is no text", value.escape_ascii()))?;
                self.take_value(key, value)
            }
            None => self.take_flag(key),
        }
    }

    fn take_path(&mut self, key: &str, value: &[u8]) -> Result<bool, String> {
        let path = |raw: &[u8]| {
            if raw.is_empty() {
                Err(format!("option {key}: an empty path"))
            } else {
                Ok(PathBuf::from(OsString::from_vec(unescape(raw))))
            }
        };
        match key {
            "lowerdir" => {
                self.lower = Some(lowers(&split(value, b':', true), path)?);
            }
            "upperdir" => self.upper = Some(path(value)?),
            "workdir" => self.work = Some(path(value)?),
            "control" => self.config.control = Some(path(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn take_value(&mut self, key: &str, value: &str) -> Result<(), String> {
        let number = || {
            let parsed: Result<u32, _> = value.parse();
            parsed.map_err(|_| format!("option {key}: '{value}' is no number"))
        };
        let switch = || match value {
            "on" | "1" => Ok(true),
            "off" | "0" => Ok(false),
            _ => Err(format!("option {key}: '{value}' is neither on nor off")),
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
                    .ok_or_else(|| format!("option timeout: '{value}' is no number of seconds"))?;
                let keep = Duration::try_from_secs_f64(seconds).unwrap_or(crate::config::KEEP);
                self.config.keep = keep.min(crate::config::KEEP);
            }
            "lookout" => self.config.lookout = Duration::from_micros(number()?.into()),
            "awake" => {
                self.config.awake = named(&Awake::NAMES, value)
                    .ok_or_else(|| unknown_value(key, value, "auto, on, off"))?;
            }
            "passthrough" => {
                self.config.passthrough = named(&Passthrough::NAMES, value)
                    .ok_or_else(|| unknown_value(key, value, "auto, all, read, off"))?;
            }
            "coherence" => {
                self.config.coherence = named(&Coherence::NAMES, value)
                    .ok_or_else(|| unknown_value(key, value, "posix, overlay"))?;
            }
            "fsync" => self.config.overlay.volatile = !switch()?,
            "threaded" => self.config.threads = if switch()? { None } else { Some(1) },
            "metacopy" => self.config.overlay.metacopy = switch()?,
            "fsname" => self.config.mount.source = value.into(),
            "subtype" => self.config.mount.subtype = value.into(),
            // Numbers are unique whatever is said here; the values of others are taken.
            "xino" if matches!(value, "on" | "off" | "auto") => {}
            "redirect_dir" if matches!(value, "on" | "follow") => {}
            "redirect_dir" => {
                return Err(format!(
                    "option redirect_dir={value}: cowlfs always moves folders by redirect marks"
                ));
            }
            "index" if value == "off" => {}
            // The kernel's own words for any FUSE mount, which mount(8) hands back on a remount.
            "user_id" | "group_id" => {
                number()?;
            }
            "plugins" => {
                return Err("option plugins: cowlfs has none; copy the layers to a folder".into());
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn take_flag(&mut self, key: &str) -> Result<(), String> {
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
            // Always so.
            "default_permissions" | "allow_other" => {}
            // Words for mount(8) and fstab, not for the file system.
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
            .ok_or("option lowerdir is missing: name the layers, topmost first")?;
        self.config.upper = match (self.upper, self.work) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (Some(_), None) => {
                return Err("option workdir is missing: an upperdir needs one beside it".into());
            }
            (None, Some(_)) => {
                return Err("option upperdir is missing: a workdir alone has no use".into());
            }
            (None, None) => None,
        };
        self.config.mount.read_only = self.read_only || self.config.upper.is_none();
        Ok(self.config)
    }
}

/// Layers that show, and data-only ones.
type Lowers = (Vec<PathBuf>, Vec<PathBuf>);

/// `A:B::C::D`: two layers that show, and two below them that only hold data, as the kernel writes it.
fn lowers(
    parts: &[Vec<u8>],
    path: impl Fn(&[u8]) -> Result<PathBuf, String>,
) -> Result<Lowers, String> {
    let (mut shown, mut data) = (Vec::new(), Vec::new());
    let mut parts = parts.iter();
    while let Some(part) = parts.next() {
        if !part.is_empty() || shown.is_empty() {
            if !data.is_empty() {
                return Err(format!(
                    "option lowerdir: after '::' come data-only layers, each with '::' before it, \
                     and '{}' has not",
                    part.escape_ascii()
                ));
            }
            shown.push(path(part)?);
            continue;
        }
        // Nothing between two colons.
        data.push(path(parts.next().map_or(&[][..], Vec::as_slice))?);
    }
    Ok((shown, data))
}

fn unknown_value(key: &str, value: &str, known: &str) -> String {
    format!("option {key}: '{value}' is none of {known}")
}

fn unknown(key: &str) -> String {
    format!("unknown option '{key}' (cowlfs --help lists them)")
}

/// Splits at a separator that no backslash stands before. The escapes stay, for [`unescape`], unless
/// they are the separator's own and `keep` is not asked for.
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
    fn what_podman_and_mount_pass() {
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
    fn data_only_layers() {
        let config = parse(&["-o", r"lowerdir=A:B::C\:x::D,fuse_overlayfs", "M"]).unwrap();
        assert_eq!(config.lowers, [PathBuf::from("A"), PathBuf::from("B")]);
        assert_eq!(config.data_only, [PathBuf::from("C:x"), PathBuf::from("D")]);
        assert!(config.foreign);
    }

    #[test]
    fn escapes_in_paths() {
        let config = parse(&["-o", r"lowerdir=a\:b:c\\d,upperdir=x\,y,workdir=z\:", "M"]).unwrap();
        assert_eq!(config.lowers, [PathBuf::from("a:b"), PathBuf::from(r"c\d")]);
        assert_eq!(config.upper, Some(("x,y".into(), "z:".into())));
    }

    #[test]
    fn every_flag_does_something() {
        let config = parse(&[
            "-o",
            "lowerdir=A,ro,nosuid,nodev,noexec,noatime,static_nlink,noacl,squash_to_root,userxattr,\
             timeout=0.5,threaded=0,awake=off,passthrough=read,coherence=overlay,metacopy=off,fsync=0,fsname=n,subtype=s,xino=auto,x-foo",
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
        assert_eq!(config.keep, Duration::from_millis(500));
        assert_eq!(config.threads, Some(1));
        assert_eq!(config.passthrough, Passthrough::Read);
        assert_eq!(config.coherence, Coherence::Overlay);
        assert_eq!(config.awake, Awake::Off);
    }

    /// As mount.fuse(8) calls it for `mount -o remount,ro M`.
    #[test]
    fn a_remount_needs_no_layers() {
        let args = [
            "cowlfs",
            "cowlfs",
            "M",
            "-o",
            "ro,noatime,remount,user_id=0,group_id=0,default_permissions,allow_other,dev,suid",
        ];
        let asked = Args::try_parse_from(args).unwrap().into_invocation();
        let asked = asked.unwrap();
        assert!(asked.remount && asked.config.mount.read_only && asked.config.mount.noatime);
        assert!(!asked.config.mount.nodev && !asked.config.mount.nosuid);
    }

    #[test]
    fn what_is_wrong_is_named() {
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
