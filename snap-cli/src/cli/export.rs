//! `cowl export`

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::losses::losses;
use super::{Context, Verb, output, read_state};
use crate::archive::oci::{self, ImageState};
use crate::archive::unfinished::{UnfinishedDir, UnfinishedFile, pack_dir};
use crate::archive::{Compression, TransferReport, changeset, export, export_dir};
use crate::container::durability::epoch;
use crate::error::{Error, Result};
use crate::lifecycle::whole::Outgoing;
use crate::snapshot::{Losses, ResolvedState, describe_loss, resolve};
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::manifest::LayerId;
use crate::store::measure;
use crate::store::name::{Address, Range, SnapshotName};
use crate::tree::error::{OnProgress, Progress};
use cowl_layers::shown::Show as _;

/// Write a state as a tar archive, a folder, an image, or a whole container as one file
///
/// Without an option a plain tar: hard links, extended attributes and ACLs are kept; GNU tar unpacks it
/// with `tar --numeric-owner --acls --xattrs --xattrs-include='*' -xpf FILE`. For a container that is
/// being written to, export a snapshot.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state; with --delta also NAME@A..B
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// The archive: .tar, .tar.gz, .tar.zst or .tar.xz; or - for a plain one on standard output; or
    /// with --dir a folder. What is there is replaced when the new one is complete.
    #[arg(value_name = "TARGET")]
    target: OsString,
    /// Only what changed since the state's parent, or from A to B: a layer as container images have
    /// them, with deletions as .wh.NAME
    #[arg(long, group = "form")]
    delta: bool,
    /// Make a plain folder
    #[arg(long, group = "form")]
    dir: bool,
    /// Make a container image of the state: an OCI image layout, as a folder or (for a TARGET that ends
    /// in .tar) in a file, as `podman load -i` takes it. It has a layer for what the container began
    /// with and one for each snapshot since
    #[arg(long, group = "form")]
    oci: bool,
    /// The whole container with all its snapshots, for `cowl import`
    #[arg(long, group = "form")]
    with_snapshots: bool,
    /// Export a state of which a part may be lost, as it is
    #[arg(long)]
    force: bool,
}

impl Verb for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        if self.with_snapshots {
            return self.whole(context);
        }
        if self.dir {
            return self.folder(context);
        }
        if self.oci {
            return self.image(context);
        }
        let sink = Sink::of(&self.target)?;
        let done = if self.delta {
            let (states, _reading) = self.states(context)?;
            let old = states.store.view(&states.old)?;
            let new = states.store.view(&states.new)?;
            sink.write(None, |out, compression, progress| {
                Ok(changeset::tar(
                    Some(&old),
                    &new,
                    out,
                    compression,
                    progress,
                )?)
            })?
        } else {
            let (store, state, _reading) = self.state(context)?;
            let loss = state.describe_loss(&store)?;
            let view = store.view(&state.stack)?;
            sink.write(
                measure::known_size(&store, &state.stack)?,
                |out, compression, progress| {
                    let loss = loss.as_deref();
                    Ok(export::tar(&view, loss, out, compression, progress)?)
                },
            )?
        };
        tell(&done);
        Ok(0)
    }
}

/// The two states of a delta.
struct States {
    store: Store,
    old: Vec<LayerId>,
    new: Vec<LayerId>,
}

impl Args {
    fn folder(&self, context: &Context) -> Result<u8> {
        write_folder(
            context,
            &Address::parse(&self.source)?,
            Path::new(&self.target),
            ("exporting", losses(self.force)),
        )?;
        Ok(0)
    }

    /// The state to export, refused if a part of it may be lost.
    fn state(&self, context: &Context) -> Result<(Store, ResolvedState, Lock)> {
        let found = read_state(context, &Address::parse(&self.source)?)?;
        found.1.refuse_loss(&found.0, losses(self.force))?;
        Ok(found)
    }

    fn image(&self, context: &Context) -> Result<u8> {
        let source = Address::parse(&self.source)?;
        let (store, state, _reading) = self.state(context)?;
        let mut steps = Vec::new();
        let epoch = epoch(&store)?;
        for (snapshot, stack) in state.ancestry(&store)? {
            let address = |name| format!("{}@{name}", source.container);
            let lost = snapshot
                .as_ref()
                .and_then(|s| describe_loss(&address(&s.name), s.settling.as_ref(), &epoch));
            steps.push(ImageState {
                view: store.view(&stack)?,
                created: snapshot
                    .as_ref()
                    .map_or_else(crate::store::now, |s| s.created.clone()),
                comment: match lost {
                    Some(why) => why,
                    None => snapshot.map_or_else(String::new, |s| s.comment),
                },
            });
        }
        let snapshot = source
            .snapshot
            .as_ref()
            .map_or("latest", SnapshotName::as_str);
        // What images are called is in small letters.
        let name = format!(
            "{}:{snapshot}",
            source.container.as_str().to_ascii_lowercase()
        );
        let total = measure::known_size(&store, &state.stack)?;
        let target = Path::new(&self.target);
        let mut bar = output::Bar::new("exporting");
        let mut progress = |done| bar.tell(Progress { total, ..done });
        let packed = Compression::from_file_name(target.as_os_str().as_bytes());
        let done = match packed {
            Some(Compression::None) => {
                let unfinished = UnfinishedFile::new(target)?;
                let beside = match target.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    Some(_) | None => Path::new("."),
                };
                let folder = tempfile::Builder::new()
                    .prefix(".cowl-image-")
                    .tempdir_in(beside)
                    .map_err(|error| Error::at("make a folder in", beside, error))?;
                let done = oci::fill(&steps, &name, folder.path(), &mut progress)?;
                pack_dir(folder.path(), unfinished.file())?;
                unfinished.finish()?;
                done
            }
            Some(_) => {
                return Err(Error::usage("an image is a folder, or a plain .tar")
                    .hint("its layers are compressed as they are"));
            }
            None => {
                let unfinished = UnfinishedDir::new(target)?;
                let done = oci::fill(&steps, &name, unfinished.path(), &mut progress)?;
                unfinished.finish()?;
                done
            }
        };
        drop(bar);
        tell(&done);
        Ok(0)
    }

    fn whole(&self, context: &Context) -> Result<u8> {
        let source = Address::parse(&self.source)?;
        if source.snapshot.is_some() {
            return Err(Error::usage(
                "--with-snapshots exports a container with all its snapshots",
            )
            .hint(format!("name the container alone: {}", source.container)));
        }
        let sink = Sink::of(&self.target)?;
        let store = context.store_of(&source.container)?;
        whole_losses(&store, &source, losses(self.force))?;
        let outgoing = Outgoing::prepare(&store, &source.container)?;
        context.settle(&store, &source.container);
        sink.write(outgoing.total, |out, compression, progress| {
            let done = outgoing.write(out, compression, progress)?;
            Ok(TransferReport {
                done,
                notes: Vec::new(),
            })
        })?;
        Ok(0)
    }

    /// The states that `NAME@A..B` or a state and its parent are.
    fn states(&self, context: &Context) -> Result<(States, Lock)> {
        let text = self.source.to_str().and_then(|text| text.split_once('@'));
        let range = match text {
            Some((name, range)) if range.contains("..") => Some((name, Range::parse(range)?)),
            _ => None,
        };
        let Some((name, range)) = range else {
            let (store, state, reading) = self.state(context)?;
            let old = state.parent_stack(&store)?;
            let new = state.stack;
            return Ok((States { store, old, new }, reading));
        };
        let at = |snapshot| -> Result<Address> {
            Ok(Address {
                snapshot,
                ..Address::parse(name)?
            })
        };
        let (store, new, reading) = read_state(context, &at(range.to)?)?;
        new.refuse_loss(&store, losses(self.force))?;
        let old = match range.from {
            Some(from) => crate::snapshot::resolve(&store, &at(Some(from))?)?.stack,
            None => new.origin_stack(),
        };
        let new = new.stack;
        Ok((States { store, old, new }, reading))
    }
}

/// Refuses a container with any state of which a part may be lost.
fn whole_losses(store: &Store, source: &Address, losses: Losses) -> Result<()> {
    let state = resolve(store, source)?;
    state.refuse_loss(store, losses)?;
    for snapshot in &state.manifest.snapshots {
        if snapshot.settling.is_some() {
            let address = Address {
                container: source.container.clone(),
                snapshot: Some(snapshot.name.clone()),
            };
            resolve(store, &address)?.refuse_loss(store, losses)?;
        }
    }
    Ok(())
}

/// Writes a state as a plain folder, which gets its name when it is complete.
pub(super) fn write_folder(
    context: &Context,
    source: &Address,
    target: &Path,
    (doing, losses): (&'static str, Losses),
) -> Result<()> {
    let (store, state, _reading) = read_state(context, source)?;
    state.refuse_loss(&store, losses)?;
    let view = store.view(&state.stack)?;
    let total = measure::known_size(&store, &state.stack)?;
    let mut bar = output::Bar::new(doing);
    let unfinished = UnfinishedDir::new(target)?;
    let mut progress = |done| bar.tell(Progress { total, ..done });
    let done = export_dir::fill(&view, unfinished.path(), &mut progress)?;
    unfinished.finish()?;
    drop(bar);
    tell(&done);
    Ok(())
}

fn tell(done: &TransferReport) {
    for (path, why) in &done.notes {
        output::note(&format!("{}: {why}", output::shown(path)));
    }
}

/// Where an archive goes.
enum Sink<'p> {
    Stdout,
    File(&'p Path, Compression),
}

impl<'p> Sink<'p> {
    fn of(target: &'p OsString) -> Result<Self> {
        if target == "-" {
            return Ok(Self::Stdout);
        }
        let path = Path::new(target);
        let compression =
            Compression::from_file_name(path.as_os_str().as_bytes()).ok_or_else(|| {
                Error::usage(format!(
                    "the end of the name {} tells no kind of archive",
                    path.shown()
                ))
                .hint(
                    "end it in .tar, .tar.gz, .tar.zst or .tar.xz, or write - for standard output",
                )
            })?;
        Ok(Self::File(path, compression))
    }

    /// Has the archive written; it gets its name when it is complete.
    fn write(
        &self,
        total: Option<u64>,
        write: impl FnOnce(
            &mut dyn std::io::Write,
            Compression,
            OnProgress<'_>,
        ) -> Result<TransferReport>,
    ) -> Result<TransferReport> {
        let mut bar = output::Bar::new("exporting");
        let mut progress = |done| bar.tell(Progress { total, ..done });
        match self {
            Self::Stdout => {
                let mut out = std::io::stdout().lock();
                write(&mut out, Compression::None, &mut progress)
            }
            Self::File(path, compression) => {
                let unfinished = UnfinishedFile::new(path)?;
                let done = write(&mut unfinished.file(), *compression, &mut progress)?;
                unfinished.finish()?;
                Ok(done)
            }
        }
    }
}
