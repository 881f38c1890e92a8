//! The command `cowl export`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::losses::losses;
use super::{CliCommand, Context, Namespace, output, read_state};
use crate::archive::oci::{self, LayerCompression};
use crate::archive::unfinished::{UnfinishedDir, UnfinishedFile};
use crate::archive::{Compression, Holes, TransferReport, changeset, export, export_dir};
use crate::error::{Error, Result};
use crate::lifecycle::whole::Outgoing;
use crate::snapshot::image_plan::ImagePlan;
use crate::snapshot::{Losses, ResolvedState, resolve};
use crate::store::Store;
use crate::store::lock::Lock;
use crate::store::manifest::LayerId;
use crate::store::measure;
use crate::store::name::{Address, Range};
use crate::tree::error::{OnProgress, Progress};
use cowl_layers::shown::Show as _;

/// Export a state as a tar archive, directory or image, or a whole container
///
/// Without an option, writes a tar archive with hard links, extended attributes and ACLs; unpack it
/// with `tar --numeric-owner --acls --xattrs --xattrs-include='*' -xpf FILE`. If the container is in
/// use, export a snapshot.
///
/// A file TARGET that exists is replaced, but only when the new file is complete and synced: if the
/// export fails, the old file remains. A directory TARGET (--dir, or --oci without .tar) must be empty
/// or not exist.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The state; with --delta also NAME@A..B
    #[arg(value_name = "NAME[@SNAP]")]
    source: OsString,
    /// A file that ends in .tar, .tar.gz, .tar.zst or .tar.xz; or - for a plain tar on standard output;
    /// or a directory
    #[arg(value_name = "TARGET")]
    target: OsString,
    /// Export only the changes since the state's parent, or from A to B, as a layer of a container image,
    /// with deletions as .wh.NAME
    #[arg(long, group = "form")]
    delta: bool,
    /// Write a plain directory
    #[arg(long, group = "form")]
    dir: bool,
    /// Write a container image: an OCI image layout, as a directory or, if TARGET ends in .tar, as a file
    /// for `podman load -i`. It has the layers of the image that the container was created from, or one
    /// for its base, and one for each snapshot since. The same state results in the same image
    #[arg(long, group = "form")]
    oci: bool,
    /// The compression of the image's layers [default: gzip]
    #[arg(long, value_enum, value_name = "FORMAT", requires = "oci")]
    compression: Option<ImageCompression>,
    /// Export the container with all its snapshots, for `cowl import`
    #[arg(long, group = "form")]
    with_snapshots: bool,
    /// Write holes of sparse files as zeros, for `docker import`, `podman import` and programs that do not know
    /// sparse entries
    #[arg(long, conflicts_with = "form")]
    no_sparse: bool,
    /// Export a state even if a crash may have lost part of it
    #[arg(long)]
    force: bool,
}

/// The compression of an image's layers.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub(super) enum ImageCompression {
    #[default]
    Gzip,
    Zstd,
}

impl ImageCompression {
    /// Returns the compression of layers.
    pub(super) fn to_archive(self) -> LayerCompression {
        match self {
            Self::Gzip => LayerCompression::Gzip,
            Self::Zstd => LayerCompression::Zstd,
        }
    }
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        if self.with_snapshots {
            return self.whole(context);
        }
        if self.dir {
            return self.directory(context);
        }
        if self.oci {
            return self.image(context);
        }
        let sink = Sink::from_target(&self.target)?;
        let report = if self.delta {
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
            let holes = match self.no_sparse {
                true => Holes::Zeros,
                false => Holes::Skipped,
            };
            sink.write(
                measure::known_size(&store, &state.stack)?,
                |out, compression, progress| {
                    let loss = loss.as_deref();
                    Ok(export::write_tar(
                        &view,
                        loss,
                        holes,
                        out,
                        compression,
                        progress,
                    )?)
                },
            )?
        };
        print_notes(&report);
        Ok(0)
    }

    fn namespace(&self) -> Namespace {
        Namespace::Preferred
    }
}

/// The two states of a delta: their stacks of layers in one store.
struct States {
    store: Store,
    old: Vec<LayerId>,
    new: Vec<LayerId>,
}

impl Args {
    fn directory(&self, context: &Context) -> Result<u8> {
        write_directory(
            context,
            &context.address(&self.source)?,
            Path::new(&self.target),
            ("exporting", losses(self.force)),
        )?;
        Ok(0)
    }

    /// Resolves the state to export; fails if part of it may be lost, unless `--force` is given.
    fn state(&self, context: &Context) -> Result<(Store, ResolvedState, Lock)> {
        let found = read_state(context, &context.address(&self.source)?)?;
        found.1.refuse_loss(&found.0, losses(self.force))?;
        Ok(found)
    }

    fn image(&self, context: &Context) -> Result<u8> {
        let (store, state, _reading) = self.state(context)?;
        let ImagePlan { steps, description } = state.image_plan(&store)?;
        let compression = self.compression.unwrap_or_default().to_archive();
        let fill = |target: &Path, progress: OnProgress<'_>| {
            let open = |stack: &Vec<LayerId>| store.view(stack);
            oci::fill::<_, Error>((&steps, open), &description, compression, target, progress)
        };
        let total = measure::known_size(&store, &state.stack)?;
        let target = Path::new(&self.target);
        let mut bar = output::Bar::new("exporting");
        let mut progress = |done| bar.update(Progress { total, ..done });
        let form = Compression::from_file_name(target.as_os_str().as_bytes());
        let report = match form {
            Some(Compression::None) => {
                let unfinished = UnfinishedFile::new(target)?;
                let parent = match target.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    Some(_) | None => Path::new("."),
                };
                let layout = tempfile::Builder::new()
                    .prefix(".cowl-image-")
                    .tempdir_in(parent)
                    .map_err(|error| Error::at("create a directory in", parent, error))?;
                let report = fill(layout.path(), &mut progress)?;
                oci::pack(layout.path(), unfinished.file())?;
                unfinished.finish()?;
                report
            }
            Some(_) => {
                return Err(Error::usage(format!(
                    "cannot write an image to {}: a compressed archive",
                    target.shown()
                ))
                .hint("specify a directory or a .tar file; the layers in it are compressed"));
            }
            None => {
                let unfinished = UnfinishedDir::new(target)?;
                let report = fill(unfinished.path(), &mut progress)?;
                unfinished.finish()?;
                report
            }
        };
        drop(bar);
        print_notes(&report);
        Ok(0)
    }

    fn whole(&self, context: &Context) -> Result<u8> {
        let source = context.address(&self.source)?;
        if source.snapshot.is_some() {
            return Err(Error::usage(
                "--with-snapshots exports a whole container, not one snapshot",
            )
            .hint(format!("specify only the container: {}", source.container)));
        }
        let sink = Sink::from_target(&self.target)?;
        let store = context.store_for(&source.container)?;
        refuse_losses(&store, &source, losses(self.force))?;
        let outgoing = Outgoing::prepare(&store, &source.container)?;
        context.settle(&store, &source.container);
        sink.write(outgoing.total, |out, compression, progress| {
            let done = outgoing.write(&store, out, compression, progress)?;
            Ok(TransferReport {
                done,
                ..TransferReport::default()
            })
        })?;
        Ok(0)
    }

    /// Resolves `NAME@A..B`, or a state and its parent.
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
                ..context.address(name)?
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

/// Fails if part of the container's current state or of one of its snapshots may be lost.
pub(super) fn refuse_losses(store: &Store, source: &Address, losses: Losses) -> Result<()> {
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

/// Writes a state to a plain directory, which gets its name when it is complete.
///
/// `activity` is the label of the progress bar.
pub(super) fn write_directory(
    context: &Context,
    source: &Address,
    target: &Path,
    (activity, losses): (&'static str, Losses),
) -> Result<()> {
    let (store, state, _reading) = read_state(context, source)?;
    state.refuse_loss(&store, losses)?;
    let view = store.view(&state.stack)?;
    let total = measure::known_size(&store, &state.stack)?;
    let mut bar = output::Bar::new(activity);
    let unfinished = UnfinishedDir::new(target)?;
    let mut progress = |done| bar.update(Progress { total, ..done });
    let report = export_dir::fill(&view, unfinished.path(), &mut progress)?;
    unfinished.finish()?;
    drop(bar);
    print_notes(&report);
    Ok(())
}

fn print_notes(report: &TransferReport) {
    for note in report.notes.lines() {
        output::print_note(&note);
    }
}

/// The destination of an archive.
enum Sink<'p> {
    Stdout,
    File(&'p Path, Compression),
}

impl<'p> Sink<'p> {
    fn from_target(target: &'p OsString) -> Result<Self> {
        if target == "-" {
            return Ok(Self::Stdout);
        }
        let path = Path::new(target);
        let compression =
            Compression::from_file_name(path.as_os_str().as_bytes()).ok_or_else(|| {
                Error::usage(format!(
                    "unknown kind of archive: {}",
                    path.shown()
                ))
                .hint(
                    "use a name that ends in .tar, .tar.gz, .tar.zst or .tar.xz, or - for standard output",
            )
            })?;
        Ok(Self::File(path, compression))
    }

    /// Calls `write` to write the archive; a file gets its name when it is complete.
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
        let mut progress = |done| bar.update(Progress { total, ..done });
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
