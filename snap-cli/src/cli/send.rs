//! The command `cowl send`.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufReader, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;

use super::export::refuse_losses;
use super::losses::losses;
use super::snapshot::{Sync, take_with_hooks};
use super::{CliCommand, Context, output};
use crate::archive::Compression;
use crate::container::durability::{make_durable, open_filesystem};
use crate::error::{Error, Result};
use crate::lifecycle::whole::negotiation::{self, HaveList};
use crate::lifecycle::whole::{ChosenStates, KnownToReceiver, Outgoing, Selection, needs_snapshot};
use crate::snapshot::take::SnapshotRequest;
use crate::store::Store;
use crate::store::name::{Address, ContainerName, Range, SnapshotName};
use crate::tree::error::Progress;

/// Send a container with its snapshots, or a part of them, to another store
///
/// Writes to standard output what `cowl receive` reads: `cowl send web | ssh HOST cowl receive`. The
/// snapshots retain their names, comments, tags, times and protection. The other store verifies each
/// layer. `cowl copy` also finds out which layers the other store has, and sends only the others.
///
/// NAME sends all snapshots and the current state. If no snapshot contains that, one is taken first.
/// NAME@SNAP sends one snapshot. NAME@A..B sends the snapshots that `cowl list` shows after A, up to B,
/// and only the layers that A does not have: the other store must have A. A or B can be omitted.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container, or NAME@SNAP, or NAME@A..B
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// Omit the layers in this list, which `cowl receive --have` printed in the other store; - for
    /// standard input
    #[arg(long, value_name = "FILE")]
    have: Option<PathBuf>,
    /// The compression
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "zstd")]
    compress: StreamCompression,
    /// Send states even if a crash may have lost part of them
    #[arg(long)]
    force: bool,
    /// Ask the receiver on standard input, and expect its confirmation there
    #[arg(long, hide = true, conflicts_with = "have")]
    negotiate: bool,
}

/// The compression of a stream.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum StreamCompression {
    Zstd,
    None,
}

impl StreamCompression {
    /// Returns the value of the option.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::None => "none",
        }
    }

    fn to_archive(self) -> Compression {
        match self {
            Self::Zstd => Compression::Zstd,
            Self::None => Compression::None,
        }
    }
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let (name, selection) = parse_source(&self.source, |name| context.container(name))?;
        if !self.negotiate && std::io::stdout().is_terminal() {
            return Err(
                Error::usage("cannot write the layers of a container to a terminal").hint(format!(
                    "send it to another store: cowl send {name} | ssh HOST cowl receive"
                )),
            );
        }
        // Read before anything is done for the transfer.
        let known = self.read_have()?;
        let store = context.store_for(&name)?;
        let chosen = self.choose(context, &store, &name, &selection)?;
        let mut bar = output::Bar::new("sending");
        let compression = self.compress.to_archive();
        let out = stdout()?;
        if self.negotiate {
            let mut input = BufReader::new(std::io::stdin().lock());
            let progress = &mut |done: Progress| bar.update(done);
            let streams = (&mut input, out);
            let options = (compression, progress as _);
            let (confirmed, sent) = negotiation::send(&store, chosen, &name, streams, options)?;
            drop(bar);
            describe(&name, &sent);
            if confirmed.container != name {
                output::print_note(&format!("{name} is {} there", confirmed.container));
            }
            for (sent, there) in &confirmed.snapshots {
                if sent != there {
                    output::print_note(&format!(
                        "{name}@{sent} is {}@{there} there",
                        confirmed.container
                    ));
                }
            }
            if confirmed.present > 0 {
                output::print_note(&format!(
                    "snapshots that were there already: {}",
                    confirmed.present
                ));
            }
            if confirmed.changed > 0 {
                output::print_note(&format!(
                    "of these, comments, tags or protection were changed there: {}",
                    confirmed.changed
                ));
            }
            return Ok(0);
        }
        let mut progress = |done| bar.update(done);
        let sent = Outgoing::prepare_transfer(&store, chosen, &known, &mut progress)?;
        let total = sent.total;
        let mut progress = |done| bar.update(Progress { total, ..done });
        sent.write(&store, out, compression, &mut progress)?;
        drop(bar);
        describe(&name, &sent);
        Ok(0)
    }
}

impl Args {
    fn read_have(&self) -> Result<KnownToReceiver> {
        let list = match &self.have {
            None => return Ok(KnownToReceiver::default()),
            Some(path) if path.as_os_str() == "-" => HaveList::read(&mut std::io::stdin().lock()),
            Some(path) => {
                let file = File::open(path).map_err(|error| Error::at("read", path, error))?;
                HaveList::read(&mut BufReader::new(file))
            }
        };
        Ok(list?.known())
    }

    /// Takes a snapshot of the current state if none contains it, makes the states durable, and reads their manifests.
    fn choose(
        &self,
        context: &Context,
        store: &Store,
        name: &ContainerName,
        selection: &Selection,
    ) -> Result<ChosenStates> {
        let source = Address {
            container: name.clone(),
            snapshot: None,
        };
        refuse_losses(store, &source, losses(self.force))?;
        if *selection == Selection::Everything && needs_snapshot(store, name)? {
            let request = SnapshotRequest {
                comment: "sent to another store".to_owned(),
                // Pruning may remove it: each transfer of a container that is used takes one.
                scheduled: true,
                ..SnapshotRequest::default()
            };
            take_with_hooks(context, store, name, (&request, Sync::Wait), |taken| {
                output::print_note(&format!("took {name}@{taken}, to send it"));
                Ok(())
            })?;
        }
        let id = store.find_id(name)?;
        make_durable(store, id, &open_filesystem(store)?)?;
        ChosenStates::read(store, name, selection)
    }
}

/// Parses NAME, NAME@SNAP or NAME@A..B. `container` parses the name.
pub(super) fn parse_source(
    source: &OsStr,
    container: impl Fn(&OsStr) -> Result<ContainerName>,
) -> Result<(ContainerName, Selection)> {
    let Some((name, states)) = source.to_str().and_then(|text| text.split_once('@')) else {
        return Ok((container(source)?, Selection::Everything));
    };
    let selection = match states.contains("..") {
        true => {
            let Range { from, to } = Range::parse(states)?;
            Selection::Range(from, to)
        }
        false => Selection::One(SnapshotName::parse(states)?),
    };
    Ok((container(OsStr::new(name))?, selection))
}

/// Returns standard output without a buffer of lines.
fn stdout() -> Result<File> {
    let stdout = std::io::stdout();
    let fd = stdout.as_fd().try_clone_to_owned();
    fd.map(File::from)
        .map_err(|error| Error::failed("cannot use standard output").because(error))
}

fn describe(name: &ContainerName, sent: &Outgoing) {
    let (layers, known) = sent.layer_counts();
    output::print_note(&format!(
        "sent {name}: {}, {} ({known} more were there already)",
        output::counted(sent.snapshots, "snapshot"),
        output::counted(layers, "layer")
    ));
    if !sent.omitted.is_empty() {
        let names: Vec<_> = sent.omitted.iter().map(ToString::to_string).collect();
        output::print_note(&format!(
            "not sent, because they were removed there: {}; to receive them again: --again",
            names.join(", ")
        ));
    }
}
