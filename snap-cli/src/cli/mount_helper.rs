//! cowl called by mount(8): as `mount.cowl` for the file system type `cowl`, or by mount.fuse(8) for `fuse.cowl`.
//!
//! So `/etc/fstab` and systemd mount units can mount containers and snapshots. The grammar and the exit codes are those of
//! mount helpers (mount(8), "EXTERNAL HELPERS").

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use clap::Parser as _;

use super::output;
use crate::error::{Error, Kind, Result};

/// The exit code for an incorrect call.
const USAGE: u8 = 1;
/// The exit code for a mount that failed.
const FAILED: u8 = 32;

/// Options that mount(8) and systemd use themselves, or that are the default.
const WITHOUT_EFFECT: [&[u8]; 22] = [
    b"",
    b"defaults",
    b"rw",
    b"auto",
    b"noauto",
    b"nofail",
    b"_netdev",
    b"exec",
    b"async",
    b"atime",
    b"diratime",
    b"relatime",
    b"nolazytime",
    b"nostrictatime",
    b"user",
    b"nouser",
    b"users",
    b"owner",
    b"group",
    b"nogroup",
    b"silent",
    b"loud",
];

/// Mount a container or a snapshot of cowl
#[derive(Debug, clap::Parser)]
#[command(name = "mount.cowl", version)]
struct Args {
    /// The container or the snapshot
    #[arg(value_name = "NAME[@SNAP]")]
    address: OsString,
    /// The mount point
    dir: OsString,
    /// Ignore unknown options
    #[arg(short = 's')]
    is_sloppy: bool,
    /// Do not mount
    #[arg(short = 'f')]
    is_fake: bool,
    /// Do not write /etc/mtab, which this program never does
    #[arg(short = 'n')]
    _without_mtab: bool,
    /// Print informational messages
    #[arg(short = 'v')]
    is_verbose: bool,
    /// Options, separated by commas: ro, suid, dev, nosuid, nodev, store=DIR, config=FILE, driver=fuse|kernel
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// The type of the file system
    #[arg(short = 't', value_name = "TYPE")]
    _kind: Option<OsString>,
}

/// The caller of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    /// mount(8).
    Mount,
    /// mount.fuse(8), which adds `dev` and `suid` to the options that it gets.
    MountFuse,
}

/// The command of cowl that a call is translated to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// The command line.
    Command(Vec<OsString>),
    /// Nothing is to be done.
    Nothing,
}

/// Returns the command line of cowl for a call by mount(8); `None` for any other call.
pub(super) fn translate(args: &[OsString]) -> Option<Result<Call, clap::Error>> {
    let caller = caller(args)?;
    Some(Args::try_parse_from(args).and_then(|parsed| {
        parsed.into_call(caller).map_err(|error| {
            clap::Error::raw(clap::error::ErrorKind::InvalidValue, format!("{error}\n"))
        })
    }))
}

/// Returns the exit code of a mount helper for an error.
pub(super) fn exit_code(kind: Kind) -> u8 {
    match kind {
        Kind::Usage => USAGE,
        _ => FAILED,
    }
}

fn caller(args: &[OsString]) -> Option<Caller> {
    let name = args.first().and_then(|arg| Path::new(arg).file_name())?;
    if name == "mount.cowl" {
        return Some(Caller::Mount);
    }
    // mount.fuse(8) calls `cowl NAME DIR -o OPTIONS`. No command of cowl has this form.
    match args {
        [_, address, dir, option, _]
            if option == "-o"
                && !address.as_bytes().starts_with(b"-")
                && dir.as_bytes().starts_with(b"/") =>
        {
            Some(Caller::MountFuse)
        }
        _ => None,
    }
}

impl Args {
    fn into_call(self, caller: Caller) -> Result<Call> {
        let mut global = Vec::new();
        let mut flags = Vec::new();
        let (mut is_allowed, mut is_denied) = (false, false);
        for option in self
            .options
            .iter()
            .flat_map(|list| list.as_bytes().split(|byte| *byte == b','))
        {
            match option {
                b"ro" => flags.push("--ro".into()),
                b"suid" | b"dev" => is_allowed |= caller == Caller::Mount,
                b"nosuid" | b"nodev" => is_denied = true,
                _ if WITHOUT_EFFECT.contains(&option) || is_of_the_caller(option) => {}
                _ => match setting(option) {
                    Some(("--driver", value)) => {
                        flags.extend(["--driver".into(), value.to_owned()]);
                    }
                    Some((name, value)) => global.extend([name.into(), value.to_owned()]),
                    None if self.is_sloppy => {}
                    None => {
                        let shown = output::shown(option);
                        return Err(Error::usage(format!(
                            "the mount option \"{shown}\" is not supported"
                        )));
                    }
                },
            }
        }
        if self.is_fake {
            return Ok(Call::Nothing);
        }
        match (is_denied, is_allowed) {
            (true, _) => flags.push("--nosuid".into()),
            (false, true) => flags.push("--suid".into()),
            (false, false) => {}
        }
        if self.is_verbose {
            global.push("--verbose".into());
        }
        let mut command: Vec<OsString> = vec!["cowl".into()];
        command.extend(global);
        command.extend(["mount".into(), "--silent".into()]);
        command.extend(flags);
        command.extend(["--".into(), self.address, self.dir]);
        Ok(Call::Command(command))
    }
}

/// Whether an option is for programs that read /etc/fstab.
fn is_of_the_caller(option: &[u8]) -> bool {
    [&b"x-"[..], b"X-", b"comment="]
        .iter()
        .any(|start| option.starts_with(start))
}

/// Returns the option of cowl that a mount option stands for, with its value.
fn setting(option: &[u8]) -> Option<(&'static str, &OsStr)> {
    [
        ("--store", &b"store="[..]),
        ("--config", b"config="),
        ("--driver", b"driver="),
    ]
    .into_iter()
    .find_map(|(name, start)| Some((name, OsStr::from_bytes(option.strip_prefix(start)?))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(line: &str) -> Option<String> {
        let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        translate(&args).map(|call| match call {
            Ok(Call::Command(command)) => {
                let words: Vec<_> = command.iter().map(|word| word.to_str().unwrap()).collect();
                words.join(" ")
            }
            Ok(Call::Nothing) => "nothing".to_owned(),
            Err(error) => error.to_string(),
        })
    }

    #[test]
    fn calls_of_mount_are_translated() {
        let options = "rw,nofail,x-systemd.requires=a.mount,store=/srv/cowl,nodev";
        assert_eq!(
            call(&format!("/sbin/mount.cowl web@snap0 /mnt -o {options} -v")).unwrap(),
            "cowl --store /srv/cowl --verbose mount --silent --nosuid -- web@snap0 /mnt"
        );
        assert_eq!(
            call("mount.cowl web /mnt -o rw,suid -t cowl").unwrap(),
            "cowl mount --silent --suid -- web /mnt"
        );
        assert_eq!(
            call("mount.cowl web /mnt -o rw,driver=kernel").unwrap(),
            "cowl mount --silent --driver kernel -- web /mnt"
        );
        assert_eq!(call("mount.cowl web /mnt -f").unwrap(), "nothing");
        let refused = call("mount.cowl web /mnt -o rw,noexec").unwrap();
        assert!(refused.contains("\"noexec\" is not supported"), "{refused}");
        assert_eq!(
            call("mount.cowl web /mnt -s -o noexec").unwrap(),
            "cowl mount --silent -- web /mnt"
        );
    }

    #[test]
    fn calls_of_mount_fuse_are_recognized() {
        assert_eq!(
            call("cowl web /mnt -o ro,dev,suid").unwrap(),
            "cowl mount --silent --ro -- web /mnt"
        );
        for other in [
            "cowl mount web /mnt",
            "cowl list",
            "cowl export web out -o a",
            "cowl --store /a list -o a",
        ] {
            assert_eq!(call(other), None, "{other}");
        }
    }
}
