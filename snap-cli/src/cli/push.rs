//! The command `cowl push`.

use std::ffi::OsString;

use serde_json::json;

use super::export::ImageCompression;
use super::losses::losses;
use super::registry::{RegistryArgs, parse_reference};
use super::snapshot::{Sync, take_with_hooks};
use super::{CliCommand, Context, output, read_state};
use crate::container::durability::{make_durable, open_filesystem};
use crate::error::{Error, Result};
use crate::lifecycle::push::{Destination, Pushed, push};
use crate::recover;
use crate::registry::{Access, Overwrite, RegistryRef};
use crate::snapshot::resolve;
use crate::snapshot::restore::find_current;
use crate::snapshot::take::SnapshotRequest;
use crate::store::Store;
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Write a state to a registry, and print its reference with the digest
///
/// The state becomes an image. It has the layers of the image that the container was created from, or one for its base, and one
/// for each snapshot since, with the name, time, comment and tags of the snapshot. Layers that the registry
/// has are not sent, so that a second push sends the changes.
///
/// Without @SNAP, takes a snapshot if something was written since the last one. A snapshot that is pushed is
/// durable first. The tag refers to the new image only when the registry has all of it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The destination: REGISTRY/REPOSITORY[:TAG], with the host of the registry [default tag: latest]
    #[arg(value_name = "REFERENCE")]
    reference: OsString,
    /// Set the comment of the snapshot, if one is taken
    #[arg(short, long, value_name = "TEXT")]
    message: Option<OsString>,
    /// The compression of the layers [default: gzip]. A layer that the registry has in another one is sent
    #[arg(long, value_enum, value_name = "FORMAT")]
    compression: Option<ImageCompression>,
    /// Mount layers that this repository of the same registry has, instead of sending them [default: that of
    /// the image that the container was created from]
    #[arg(long, value_name = "REPOSITORY")]
    mount_from: Option<String>,
    /// Push a state even if a crash may have lost part of it, and replace a tag that has layers which the state lacks
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let source = context.address(&self.source)?;
        let reference = parse_reference(&self.reference)?;
        if reference.digest.is_some() {
            return Err(Error::usage("an image is pushed to a tag, not to a digest")
                .hint("write REGISTRY/REPOSITORY:TAG"));
        }
        if self.message.is_some() && source.snapshot.is_some() {
            return Err(
                Error::usage("--message is for a new snapshot, and NAME@SNAP exists").hint(
                    format!("to take and push a new snapshot: {}", source.container),
                ),
            );
        }
        let store = context.store_for(&source.container)?;
        let from = self.mounted_repository(&store, &source.container, &reference)?;
        let access = Access::Push { from: from.clone() };
        // Before a snapshot is taken.
        let client = self.registry.connect(&reference, &access)?;
        let snapshot = match &source.snapshot {
            Some(snapshot) => snapshot.clone(),
            None => self.current(context, &store, &source.container)?,
        };
        let address = Address {
            container: source.container.clone(),
            snapshot: Some(snapshot.clone()),
        };
        make_state_durable(&store, &address)?;
        let (store, state, reading) = read_state(context, &address)?;
        state.refuse_loss(&store, losses(self.force))?;
        let destination = Destination {
            client: &client,
            reference: &reference,
            from: from.as_deref(),
            overwrite: match self.force {
                true => Overwrite::Permit,
                false => Overwrite::Refuse,
            },
            compression: self.compression.unwrap_or_default().to_archive(),
        };
        let (mut writing, mut sending) = (output::Bar::new("packing"), None);
        let pushed = push(
            &store,
            (&state, reading),
            &destination,
            (&mut |done| writing.update(done), &mut |done| {
                sending
                    .get_or_insert_with(|| output::Bar::new("sending"))
                    .update(done);
            }),
        )?;
        drop((writing, sending));
        self.report((&source.container, &snapshot), &reference, &pushed)?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    /// Returns the repository of the same registry whose layers are mounted.
    fn mounted_repository(
        &self,
        store: &Store,
        name: &ContainerName,
        reference: &RegistryRef,
    ) -> Result<Option<String>> {
        if let Some(from) = &self.mount_from {
            let other = format!("{}/{from}", reference.registry);
            return RegistryRef::parse(&other).map(|other| Some(other.repository));
        }
        let manifest = store.find(name)?.1.body;
        let image = manifest.image.and_then(|image| image.name);
        let image = image.and_then(|name| RegistryRef::parse(&name).ok());
        let image = image.filter(|image| {
            image.registry == reference.registry && image.repository != reference.repository
        });
        Ok(image.map(|image| image.repository))
    }

    /// Returns the snapshot with the current state; takes one if there is none.
    fn current(
        &self,
        context: &Context,
        store: &Store,
        name: &ContainerName,
    ) -> Result<SnapshotName> {
        {
            let container = recover::open(store, name)?;
            let address = Address {
                container: name.clone(),
                snapshot: None,
            };
            resolve(store, &address)?.flush(store)?;
            if let Some(snapshot) = find_current(&container)? {
                return Ok(snapshot);
            }
        }
        let request = SnapshotRequest {
            comment: match &self.message {
                Some(message) => super::text::parse(message)?,
                None => String::new(),
            },
            ..SnapshotRequest::default()
        };
        let mut taken = None;
        take_with_hooks(context, store, name, (&request, Sync::Wait), |snapshot| {
            taken = Some(snapshot.clone());
            Ok(())
        })?;
        taken.ok_or_else(|| Error::failed(format!("no snapshot of {name} was taken")))
    }

    fn report(
        &self,
        (name, snapshot): (&ContainerName, &SnapshotName),
        reference: &RegistryRef,
        pushed: &Pushed,
    ) -> Result<()> {
        for note in &pushed.notes {
            output::print_note(note);
        }
        let report = &pushed.report;
        if self.json {
            return output::print_json(&json!({
                "container": name,
                "snapshot": snapshot,
                "image": reference.to_string(),
                "digest": pushed.digest,
                "layers": pushed.layers,
                "packed": pushed.packed,
                "sent": { "blobs": report.sent, "bytes": report.bytes },
                "mounted": report.mounted,
                "present": report.present,
                "replaced": report.replaced,
            }));
        }
        output::print_line(&reference.with_digest(&pushed.digest))?;
        output::print_note(&format!(
            "pushed {name}@{snapshot} to {reference}: sent {} in {} blobs; the registry had {}",
            output::format_size(report.bytes),
            report.sent,
            report.present + report.mounted,
        ));
        if let Some(replaced) = &report.replaced {
            output::print_note(&format!("the tag referred to {replaced} before"));
        }
        Ok(())
    }
}

/// Syncs a snapshot that is not durable yet.
fn make_state_durable(store: &Store, address: &Address) -> Result<()> {
    let state = resolve(store, address)?;
    match state.settling() {
        None => Ok(()),
        Some(_) => make_durable(store, state.container, &open_filesystem(store)?),
    }
}
