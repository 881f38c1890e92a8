//! The command `cowl pull`.

use std::ffi::OsString;

use serde_json::json;

use super::create::policy;
use super::images::ImageArgs;
use super::registry::parse_reference;
use super::{CliCommand, Context, output};
use crate::error::{Error, Kind, Result};
use crate::lifecycle::image::Imported;
use crate::lifecycle::update::Current;
use crate::registry::{RegistryImage, RegistryRef};
use crate::store::family;
use crate::store::name::ContainerName;

/// Create a container from an image in a registry, or update one
///
/// Layers that the store has are not downloaded, and an interrupted download continues. If `cowl push` wrote
/// the image, the container has the same snapshots.
///
/// With --update, the snapshots of the image that the container lacks are added on top of the last state that
/// both have. No snapshot of the container is removed. Its current state becomes that of the image only if
/// nothing was written since that state and the container is not mounted; otherwise, `cowl restore` switches
/// to it. The names of the new snapshots are printed.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image: REGISTRY/REPOSITORY[:TAG][@DIGEST], with the host of the registry [default tag: latest]
    #[arg(value_name = "REFERENCE")]
    reference: OsString,
    /// The container's name [default: the last part of the repository]
    name: Option<OsString>,
    /// Add the snapshots of the image to the container, which exists
    #[arg(long, conflicts_with = "keep_blobs")]
    update: bool,
    #[command(flatten)]
    image: ImageArgs,
    /// Skip files and attributes that the store's file system cannot store
    #[arg(long)]
    skip_unsupported: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl CliCommand for Args {
    fn run(&self, context: &Context) -> Result<u8> {
        let reference = parse_reference(&self.reference)?;
        let name = match &self.name {
            Some(name) => ContainerName::parse(name)?,
            None => ContainerName::parse(reference.last_name())
                .map_err(|error| error.hint("name the container: cowl pull REFERENCE NAME"))?,
        };
        let unsupported = policy(false, self.skip_unsupported).unsupported;
        if self.update {
            let store = context.store_for(&name)?;
            let image = self
                .image
                .open_registry(&reference, &store.paths().transfers())?;
            let (imported, current) = self.image.update(&store, &name, &image, unsupported)?;
            self.report(&name, (&reference, &image), (&imported, Some(&current)))?;
            return Ok(0);
        }
        let store = context.open_or_create_store()?;
        // Before the network is used.
        match family::holding(&context.root, &context.session, &name) {
            Ok(_) => {
                return Err(Error::failed(format!("a container named {name} already exists"))
                    .hint("choose another name: cowl pull REFERENCE NAME; or update this one: --update"));
            }
            Err(error) if error.kind == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
        let image = self
            .image
            .open_registry(&reference, &store.paths().transfers())?;
        let imported = self.image.create(&store, &name, &image, unsupported)?;
        self.report(&name, (&reference, &image), (&imported, None))?;
        Ok(0)
    }

    fn is_json(&self) -> bool {
        self.json
    }
}

impl Args {
    fn report(
        &self,
        name: &ContainerName,
        (reference, image): (&RegistryRef, &RegistryImage),
        (imported, current): (&Imported, Option<&Current>),
    ) -> Result<()> {
        let downloaded = image.downloaded();
        if self.json {
            let state = match current {
                None => "created",
                Some(Current::UpToDate) => "up-to-date",
                Some(Current::Replaced(_)) => "replaced",
                Some(Current::Retained(..)) => "retained",
            };
            let auto = match current {
                Some(Current::Replaced(auto)) => auto.as_ref(),
                _ => None,
            };
            return output::print_json(&json!({
                "container": name,
                "image": reference.to_string(),
                "digest": imported.digest,
                "layers": imported.layers,
                "new_layers": imported.unpacked,
                "downloaded": { "layers": downloaded.layers, "bytes": downloaded.bytes },
                "snapshots": imported.snapshots,
                "state": state,
                "auto_snapshot": auto,
            }));
        }
        let size = output::format_size(downloaded.bytes);
        let work = format!(
            "{} of {} layers are new, downloaded {size}",
            imported.unpacked, imported.layers
        );
        match current {
            None => output::print_note(&format!("created {name} from {reference}: {work}")),
            Some(Current::UpToDate) => output::print_note(&format!("{name} is up to date")),
            Some(current) => {
                for snapshot in &imported.snapshots {
                    output::print_line(snapshot.as_str())?;
                }
                output::print_note(&format!("updated {name} from {reference}: {work}"));
                if let Current::Replaced(Some(auto)) = current {
                    output::print_note(&format!(
                        "the previous state of {name} is retained as {auto}; to undo: cowl restore {name} --undo"
                    ));
                }
                if let Current::Retained(reason, snapshot) = current {
                    output::print_note(&format!(
                        "the current state of {name} was retained, because {reason}; to switch to that of the \
                         image: cowl restore {name} {snapshot}"
                    ));
                }
            }
        }
        Ok(())
    }
}
