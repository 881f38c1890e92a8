//! The command line of `cowlfs`, compatible with the way in which mount(8), podman and containerd call an overlay
//! program.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod options;
mod split;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::config::Config;
use cowl_layers::shown::{Allowed, Show, plain};
use options::Builder;
use split::split;

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
    /// Another cowlfs mount may write to a layer of a read-only mount. Its changes then appear after at most a second.
    ///
    /// Flags: ro, nosuid, nodev, noexec, nosymfollow, noatime, strictatime, nodiratime. With remount they are changed on
    /// an existing mount.
    ///
    /// Format: metacopy=on|off, userxattr.
    ///
    /// fuse_overlayfs, nofuse_overlayfs: whether names that begin with .wh. are the whiteouts and opaque markers of
    /// container images and of fuse-overlayfs (the default), or names like any other.
    ///
    /// Owners and attributes: uidmapping=DISK:SHOWN:COUNT, gidmapping=DISK:SHOWN:COUNT, squash_to_root,
    /// squash_to_uid=N, squash_to_gid=N, static_nlink, noacl.
    ///
    /// Durability: volatile (do not sync), sync (every write is durable when it returns).
    ///
    /// passthrough=auto|all|read|off: files that the kernel reads and writes without the daemon. all: those of the
    /// upper layer, programs and libraries; read: programs and libraries; off: none; auto: all, unless snapshots of the
    /// mount can be taken.
    ///
    /// coherence=packages|posix|overlay: content that a descriptor of a lower file reads after the file was written to.
    /// posix: the new content, except for programs and libraries; packages (the default): the new content, except for
    /// programs, libraries, and files of 256 KiB or more that programs replace instead of writing to them (images and
    /// compressed archives, for example; files without write permission; files in /usr, except /usr/local,
    /// and other directories of package managers); overlay: the old content. The kernel reads the excepted files
    /// without the daemon.
    ///
    /// keeper=on|off: whether a second process starts another daemon if the daemon is killed, so that programs in the
    /// mount continue (on by default; Linux 6.9 or later).
    ///
    /// awake=auto|on|off: keep idle CPUs awake during bursts of requests. auto: on small virtual machines whose idle
    /// CPUs halt.
    ///
    /// Daemon: timeout=SECONDS (for cached names and attributes), lookout=MICROSECONDS (busy-polling for the next
    /// request), threaded=0|1, control=SOCKET (path of the control socket).
    ///
    /// managed: mount as cowl mounts a container: snapshots of the mount can be taken, which restricts passthrough=auto,
    /// and names that begin with .wh. are names like any other. For benchmarks.
    ///
    /// Names in the mount table: fsname=NAME, subtype=NAME.
    ///
    /// Other options are ignored with a warning, as fuse-overlayfs does.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<OsString>,
    /// Run in the foreground
    #[arg(short = 'f', long)]
    pub foreground: bool,
    /// Log every detail to standard error and run in the foreground
    #[arg(short = 'd', long)]
    pub debug: bool,
    /// Replace the daemon with this control socket by this version of the program
    ///
    /// The mount remains, with all open files. Programs that use it wait for a moment. If the daemon cannot be replaced,
    /// it continues, and the exit code is 1. The new daemon runs in the background, with another process id.
    #[arg(long, value_name = "SOCKET", exclusive = true)]
    pub upgrade: Option<PathBuf>,
    /// Take over a mount from the daemon that has started this process
    #[arg(long, hide = true)]
    pub take_over: bool,
    /// The mount point; a source before it, as mount(8) passes one, is ignored
    #[arg(value_name = "MOUNTPOINT", num_args = 1..=2, required_unless_present_any = ["upgrade", "take_over"])]
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
    /// Messages about options that were ignored.
    pub ignored: Vec<String>,
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
            ignored: std::mem::take(&mut builder.ignored),
            config: builder.finish()?,
            foreground: self.foreground || self.debug,
            debug: self.debug,
        })
    }
}
