//! The command `cowl copy`.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;

use super::send::{StreamCompression, parse_source};
use super::{CliCommand, Context, Namespace, output};
use crate::error::{Error, Result};
use crate::lifecycle::whole::Selection;
use crate::lifecycle::whole::ssh::{SshAddress, SshCommand};
use crate::store::name::ContainerName;
use cowl_layers::shown::Show as _;

/// Copy a container with its snapshots to or from another host, over ssh
///
/// Sends only the layers that the other store does not have, and continues an interrupted transfer. `cowl
/// copy web ssh://HOST` copies to the other host, `cowl copy --from ssh://HOST web` from it. `cowl send` and
/// `cowl receive`, which are started on both hosts, describe what is sent and what happens to a container
/// that exists there. A snapshot that was removed there is copied again only if it is named, NAME@SNAP, or
/// with --again.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, or NAME@SNAP, or NAME@A..B, where it is copied from
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The other host, and the store there: ssh://[USER@]HOST[:PORT][/STORE]
    #[arg(
        value_name = "URL",
        required_unless_present = "from",
        conflicts_with = "from"
    )]
    to: Option<OsString>,
    /// Copy from this host to the local store
    #[arg(long, value_name = "URL")]
    from: Option<OsString>,
    /// The container's name where it is copied to [default: its name]
    #[arg(long = "as", value_name = "NEW")]
    name: Option<OsString>,
    /// The ssh program with its options, as words of a shell [default: $COWL_SSH, else ssh]
    #[arg(long, value_name = "COMMAND")]
    ssh: Option<OsString>,
    /// The cowl program on the other host, as words of a shell there, for example "sudo cowl"
    #[arg(long, value_name = "COMMAND", default_value = "cowl")]
    remote: OsString,
    /// Also copy snapshots that were copied before and removed there
    #[arg(long)]
    again: bool,
    /// Register the container with LXC where it is copied to, as `cowl receive --lxc` does. Its config can name
    /// programs that LXC runs as root
    #[arg(long)]
    lxc: bool,
    /// The directory of LXC's containers there [default: the output of `lxc-config lxc.lxcpath`]
    #[arg(long, short = 'P', value_name = "DIR", requires = "lxc")]
    lxcpath: Option<PathBuf>,
    /// The compression
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "zstd")]
    compress: StreamCompression,
    /// Copy states even if a crash may have lost part of them
    #[arg(long)]
    force: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        // Checked here first, so that a usage error starts nothing.
        let (container, selection) = match &self.from {
            // The other host has the container.
            Some(_) => parse_source(&self.source, |name| ContainerName::parse(name))?,
            None => parse_source(&self.source, |name| context.container(name))?,
        };
        self.name.as_ref().map(ContainerName::parse).transpose()?;
        let mut sender = vec![
            OsStr::new("send"),
            OsStr::new("--negotiate"),
            OsStr::new("--compress"),
        ];
        sender.push(OsStr::new(self.compress.name()));
        if self.force {
            sender.push(OsStr::new("--force"));
        }
        sender.push(&self.source);
        let mut receiver = vec![OsStr::new("receive"), OsStr::new("--negotiate")];
        if self.again || matches!(selection, Selection::One(_)) {
            receiver.push(OsStr::new("--again"));
        }
        if self.lxc {
            receiver.push(OsStr::new("--lxc"));
        }
        if let Some(path) = &self.lxcpath {
            receiver.extend([OsStr::new("--lxcpath"), path.as_os_str()]);
        }
        // Without a name, the other host would choose the local container.
        let local = OsStr::new(container.as_str());
        let asked = self.from.is_some().then_some(local);
        receiver.extend(self.name.as_deref().or(asked));
        let (url, here, there) = match (&self.from, &self.to) {
            (Some(url), _) => (url, receiver, sender),
            (None, Some(url)) => (url, sender, receiver),
            (None, None) => return Err(Error::usage("the other host is missing")),
        };
        let address = SshAddress::parse(url)?;
        let configured = std::env::var_os("COWL_SSH").filter(|ssh| !ssh.is_empty());
        let ssh = self.ssh.clone().or(configured);
        let ssh = SshCommand {
            address: &address,
            ssh: ssh.as_deref().unwrap_or(OsStr::new(DEFAULT_SSH)),
            remote: &self.remote,
            words: &there,
        };
        connect(context, &ssh, &here)
    }

    /// ssh needs the user's own ids, to find the user's keys. The local command enters the namespace.
    fn namespace(&self) -> Namespace {
        Namespace::Unused
    }
}

/// The ssh program, which ends if the other host does not reply for a minute.
const DEFAULT_SSH: &str = "ssh -o ServerAliveInterval=15 -o ServerAliveCountMax=4";

/// Runs the local command, passes the data between it and the connection, and waits for both.
///
/// The data passes through this process, so that both notice the end of their pipes if it is killed.
fn connect(context: &Context, ssh: &SshCommand<'_>, here: &[&OsStr]) -> Result<u8> {
    let mut other = ssh.spawn()?;
    let started = start_local(context, here);
    let errors = other.stderr.take();
    let errors = errors.map(|errors| thread::spawn(move || print_errors(errors)));
    let (from_other, to_other) = (other.stdout.take(), other.stdin.take());
    let local = started.and_then(|mut child| {
        relay(from_other, child.stdin.take());
        relay(child.stdout.take(), to_other);
        wait(&mut child)
    });
    // If the local command was not started, the streams are closed now, which ends the connection.
    let remote = wait(&mut other);
    if errors.is_some_and(|thread| thread.join().is_err()) {
        return Err(Error::failed("cannot print the messages of the other host"));
    }
    let (local, remote) = (local?, remote?);
    match (local.code(), remote.code()) {
        (Some(0), Some(0)) => Ok(0),
        // Both have reported their errors.
        (Some(code @ 1..=255), _) => Ok(u8::try_from(code).unwrap_or(1)),
        // The local command has received everything, or the confirmation of that.
        (Some(0), other) => {
            let why = match other {
                Some(255) => "the connection failed at its end".to_owned(),
                Some(code) => format!("cowl on the other host ended with exit code {code}"),
                None => "ssh was killed".to_owned(),
            };
            let what = format!("the copy is complete, but {why}");
            Err(Error::failed(what).hint("nothing has to be repeated"))
        }
        (None | Some(_), _) => Err(Error::failed("the local cowl command was killed")),
    }
}

/// Passes data from one pipe to another in a thread, up to the end of one of them, and closes both. What is missing after
/// an error is noticed by the reader.
fn relay<R, W>(from: Option<R>, to: Option<W>)
where
    R: Read + Send + 'static,
    W: Write + Send + 'static,
{
    let Some((mut from, mut to)) = from.zip(to) else {
        return;
    };
    thread::spawn(move || match io::copy(&mut from, &mut to) {
        // The reader has ended, and reports the reason.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            log::warn!("cannot pass on the data of the transfer: {error}");
        }
        _ => {}
    });
}

/// Starts cowl with pipes for its input and output.
fn start_local(context: &Context, here: &[&OsStr]) -> Result<Child> {
    let failed = |error: io::Error| Error::failed("cannot start cowl").because(error);
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg("--store").arg(&context.root);
    command
        .arg("--wait")
        .arg(context.session.patience.as_secs().to_string());
    if let Some(file) = context.config.file() {
        command.arg("--config").arg(file);
    }
    command.args(output::verbosity_options());
    command
        .args(here)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    child
        .wait()
        .map_err(|error| Error::failed("cannot wait for the transfer").because(error))
}

/// The longest line of the other host that is printed at once, in bytes.
const MAX_LINE: u64 = 4096;

/// Prints the messages of the other host, escaped: the host may not be trusted with this terminal.
fn print_errors(errors: impl Read) {
    let mut errors = BufReader::new(errors);
    loop {
        let mut line = Vec::new();
        match errors.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => output::print_remote(&line.trim_ascii_end().shown().to_string()),
            Err(error) => {
                log::warn!("cannot read the messages of the other host: {error}");
                return;
            }
        }
    }
}
