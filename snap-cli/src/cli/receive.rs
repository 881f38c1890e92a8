//! The command `cowl receive`.

use std::ffi::OsString;
use std::io::{BufReader, IsTerminal};
use std::path::PathBuf;

use serde_json::json;

use super::import::{convert, lxc_copy, sent_configs, write_config};
use super::{CliCommand, Context, output};
use crate::archive::bundle::BundleReader;
use crate::container::lxc::LxcCopy;
use crate::error::{Error, Kind, Result};
use crate::lifecycle::whole::negotiation::{Accepted, HaveList, open_archive};
use crate::lifecycle::whole::{
    self, ChangedSnapshot, ReceiveOptions, ReceiveTarget, Received, RemovedSnapshots,
    removed_snapshots,
};
use crate::store::Store;
use crate::store::manifest::SnapshotId;
use crate::store::name::ContainerName;

/// Receive a container, or snapshots for a container, that `cowl send` sends
///
/// Reads standard input. A container that does not exist is created, with the snapshots and the current
/// state that were sent. If it exists, the snapshots are added to its own, which remain, and its current
/// state does not change: `cowl restore` changes it. A snapshot whose name is used gets another one, which
/// is printed. The container must be the one that was sent, or a copy of it.
///
/// Snapshots that were received before and removed here are not received again, except with --again. Later
/// changes of comments and protection are applied to the snapshots that the container has, unless they were
/// changed here as well, and new tags are added.
///
/// Each layer is verified after it is stored. If the transfer is interrupted, nothing changes, and complete
/// layers are retained for 7 days, for the next attempt (`cowl gc --empty-transfers` removes them).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The container's name here [default: its name where it was sent from]
    name: Option<OsString>,
    /// Print the list of layers in the store of this container, or in the default store, for `cowl send
    /// --have`, and receive nothing. With NAME, the snapshots that were removed from the container are
    /// listed, too, and are not sent
    #[arg(long, conflicts_with_all = ["negotiate", "lxc_config", "lxc", "json"])]
    have: bool,
    /// Write the config of an LXC container, if it is new, to this file
    #[arg(long, value_name = "FILE")]
    lxc_config: Option<PathBuf>,
    /// Also receive snapshots that were received before and removed here
    #[arg(long)]
    again: bool,
    /// Register the container with LXC, as with `cowl import --lxc`, unless it is an LXC container
    #[arg(long)]
    lxc: bool,
    /// The directory of LXC's containers [default: the output of `lxc-config lxc.lxcpath`]
    #[arg(long, short = 'P', value_name = "DIR", requires = "lxc")]
    lxcpath: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Reply to the sender on standard output
    #[arg(long, hide = true, conflicts_with = "json")]
    negotiate: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let name = self.name.as_ref().map(ContainerName::parse).transpose()?;
        if self.have {
            return self.print_have(context, name.as_ref());
        }
        let stdin = std::io::stdin();
        if stdin.is_terminal() {
            return Err(Error::usage("cannot receive a container from a terminal")
                .hint("connect a sender: ssh HOST cowl send NAME | cowl receive"));
        }
        let mut input = BufReader::new(stdin.lock());
        if self.negotiate {
            let accepted = Accepted::read(&mut input)?;
            let name = name.unwrap_or_else(|| accepted.offer.container.clone());
            let (store, target) = open_target(context, &name)?;
            let mut out = std::io::stdout().lock();
            let streams = (&mut input, &mut out);
            let removed = self.omitted(&store, (&name, target))?;
            // Everything is done before the confirmation: the connection can be cut after the commit.
            accepted.serve((&store, removed), streams, |archive| {
                self.receive(&store, (&name, target), archive)
            })?;
            return Ok(0);
        }
        let archive = open_archive(input)?;
        let name = match name {
            Some(name) => name,
            None => whole::describe(&archive)?.name,
        };
        let (store, target) = open_target(context, &name)?;
        self.receive(&store, (&name, target), archive)?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn receive(
        &self,
        store: &Store,
        (name, target): (&ContainerName, ReceiveTarget),
        archive: BundleReader<'_>,
    ) -> Result<Received> {
        // An interrupted transfer may have created the container without registering it.
        let is_registered =
            target == ReceiveTarget::Existing && store.find(name)?.1.body.lxc.is_some();
        let lxc = match self.lxc && !is_registered {
            true => Some(lxc_copy(self.lxcpath.as_deref(), Some(name), &archive)?),
            false => None,
        };
        let mut bar = output::Bar::new("receiving");
        let progress = &mut |done| bar.update(done);
        let options = ReceiveOptions {
            removed: match self.again {
                true => RemovedSnapshots::AddedAgain,
                false => RemovedSnapshots::Omitted,
            },
            configs: sent_configs(self.lxc),
        };
        let received = whole::receive(store, (name, target), options, archive, progress)?;
        drop(bar);
        self.finish(store, &received, lxc)?;
        if self.lxc && is_registered {
            output::print_note(&format!(
                "{name} is an LXC container already; its config is unchanged"
            ));
        }
        Ok(received)
    }

    /// Returns the snapshots that the sender should omit, because they were removed here.
    fn omitted(
        &self,
        store: &Store,
        (name, target): (&ContainerName, ReceiveTarget),
    ) -> Result<Vec<SnapshotId>> {
        match (self.again, target) {
            (false, ReceiveTarget::Existing) => removed_snapshots(store, name),
            (true, _) | (_, ReceiveTarget::New) => Ok(Vec::new()),
        }
    }

    /// Prints the layers of the store that would receive a container.
    fn print_have(&self, context: &Context, name: Option<&ContainerName>) -> Result<u8> {
        let absent = |error: Error| match error.kind {
            Kind::NotFound => Ok(None),
            _ => Err(error),
        };
        let holding = match name {
            Some(name) => context.store_for(name).map(Some).or_else(absent)?,
            None => None,
        };
        let removed = match (&holding, name) {
            (Some(store), Some(name)) => self.omitted(store, (name, ReceiveTarget::Existing))?,
            _ => Vec::new(),
        };
        let store = match holding {
            Some(store) => Some(store),
            None => {
                let home = Store::open(&context.root, context.session.clone());
                home.map(Some).or_else(absent)?
            }
        };
        let list = match store {
            Some(store) => HaveList::of_store(&store, removed)?,
            // A container that is received creates the store.
            None => HaveList::default(),
        };
        output::print_line(&list.to_line()?)?;
        Ok(0)
    }

    /// Prints the result, and registers the container with LXC.
    fn finish(&self, store: &Store, received: &Received, lxc: Option<LxcCopy>) -> Result<()> {
        received
            .notes
            .iter()
            .for_each(|note| output::print_note(note));
        let config = (&received.name, received.config.as_ref());
        write_config(config, self.lxc_config.as_deref(), lxc.is_some())?;
        match self.json {
            true => print_json(received)?,
            false => print_received(received),
        }
        match lxc {
            Some(lxc) => convert(store, &received.name, lxc).map(drop),
            None => Ok(()),
        }
    }
}

/// Opens the store of the container `name`, or the home store if there is no such container.
fn open_target(context: &Context, name: &ContainerName) -> Result<(Store, ReceiveTarget)> {
    match context.store_for(name) {
        Ok(store) => Ok((store, ReceiveTarget::Existing)),
        Err(error) if error.kind == Kind::NotFound => {
            Ok((context.open_or_create_store()?, ReceiveTarget::New))
        }
        Err(error) => Err(error),
    }
}

fn print_received(received: &Received) {
    let Received { name, target, .. } = received;
    for added in received
        .added
        .iter()
        .filter(|added| added.sent_as != added.name)
    {
        output::print_note(&format!(
            "{name}@{} was sent as {}",
            added.name, added.sent_as
        ));
    }
    for changed in &received.changed {
        let parts = [
            ("was changed where it was sent from", &changed.changes),
            (
                "was changed where it was sent from, but remains as it is here",
                &changed.retained,
            ),
        ];
        for (what, words) in parts.iter().filter(|(_, words)| !words.is_empty()) {
            let (snapshot, words) = (&changed.name, words.join(", "));
            output::print_note(&format!("{name}@{snapshot} {what}: {words}"));
        }
    }
    if !received.removed.is_empty() {
        let names: Vec<_> = received.removed.iter().map(ToString::to_string).collect();
        output::print_note(&format!(
            "not added, because they were removed here: {}; to receive them again: --again",
            names.join(", ")
        ));
    }
    let what = match target {
        ReceiveTarget::New => "received",
        ReceiveTarget::Existing => "received snapshots for",
    };
    let present = match received.present {
        0 => String::new(),
        n => format!(" ({n} more were here already)"),
    };
    output::print_note(&format!(
        "{what} {name}: {}{present}, {} ({} more were here already)",
        output::counted(received.added.len(), "snapshot"),
        output::counted(received.layers, "layer"),
        received.shared
    ));
    if let (ReceiveTarget::Existing, Some(newest)) = (target, received.added.last()) {
        output::print_note(&format!(
            "the current state of {name} is unchanged; to replace it: cowl restore {name} {}",
            newest.name
        ));
    }
}

fn print_json(received: &Received) -> Result<()> {
    let added = received.added.iter();
    let with = |words: fn(&ChangedSnapshot) -> &Vec<&'static str>| {
        let changed = received.changed.iter();
        let changed = changed.filter(|changed| !words(changed).is_empty());
        changed.map(|changed| &changed.name).collect::<Vec<_>>()
    };
    output::print_json(&json!({
        "container": received.name,
        "created": received.target == ReceiveTarget::New,
        "snapshots": added
            .map(|added| json!({ "name": added.name, "sent_as": added.sent_as }))
            .collect::<Vec<_>>(),
        "present_snapshots": received.present,
        "changed_snapshots": with(|changed| &changed.changes),
        "retained_snapshots": with(|changed| &changed.retained),
        "removed_snapshots": received.removed,
        "layers": received.layers,
        "present_layers": received.shared,
    }))
}
