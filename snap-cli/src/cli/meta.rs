//! The commands `cowl comment`, `cowl tag` and `cowl protect`, which change a snapshot's metadata.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::text::{self, edit, read_text};
use super::{CliCommand, Context, parse_tags};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::meta;
use crate::store::name::{Address, ContainerName, SnapshotName};

/// Parses `NAME@SNAP`; fails if there is no snapshot in it.
fn parse_snapshot_address(
    context: &Context,
    raw: &OsString,
) -> Result<(ContainerName, SnapshotName)> {
    let Address {
        container,
        snapshot,
    } = context.address(raw)?;
    match snapshot {
        Some(snapshot) => Ok((container, snapshot)),
        None => Err(
            Error::usage(format!("no snapshot specified in {container}")).hint(format!(
                "write {container}@SNAP; to list its snapshots: cowl list {container}"
            )),
        ),
    }
}

/// Set or edit the comment of a snapshot
///
/// Without TEXT, opens the current comment in an editor ($VISUAL, $EDITOR, else vi).
#[derive(Debug, clap::Args)]
pub(super) struct CommentArgs {
    /// The snapshot
    #[arg(value_name = "NAME@SNAP")]
    snapshot: OsString,
    /// The comment; an empty text removes it
    #[arg(conflicts_with = "file")]
    text: Option<OsString>,
    /// Read the comment from a file, or from standard input
    #[arg(short = 'c', long, value_name = "FILE|-")]
    file: Option<PathBuf>,
}

impl CliCommand for CommentArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let (name, snapshot) = parse_snapshot_address(context, &self.snapshot)?;
        let store = context.store_for(&name)?;
        let comment = match (&self.text, &self.file) {
            (Some(word), _) => text::parse(word)?,
            (None, Some(file)) => read_text(file)?,
            (None, None) => {
                // The container is not locked here: other commands must not wait for the editor.
                let current = recover::open(&store, &name)?.snapshot(&snapshot)?.0;
                edit(&current.comment)?
            }
        };
        let mut container = recover::open(&store, &name)?;
        meta::set_comment(&mut container, &snapshot, &comment)?;
        Ok(0)
    }
}

/// Add or remove tags of a snapshot
///
/// `cowl list --tag` and `cowl prune --keep-tag` select snapshots by tags.
#[derive(Debug, clap::Args)]
pub(super) struct TagArgs {
    /// The snapshot
    #[arg(value_name = "NAME@SNAP")]
    snapshot: OsString,
    /// The tags to add: a key with a value, or a key alone
    #[arg(value_name = "KEY[=VALUE]", required_unless_present = "remove")]
    tags: Vec<OsString>,
    /// Remove the tag with this key; may be given several times
    #[arg(short, long, value_name = "KEY")]
    remove: Vec<OsString>,
}

impl CliCommand for TagArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let (name, snapshot) = parse_snapshot_address(context, &self.snapshot)?;
        let added = parse_tags(&self.tags)?;
        let removed: Vec<String> = parse_tags(&self.remove)?.into_keys().collect();
        let store = context.store_for(&name)?;
        let mut container = recover::open(&store, &name)?;
        let (current, _) = container.snapshot(&snapshot)?;
        if let Some(key) = removed.iter().find(|key| !current.tags.contains_key(*key)) {
            let keys: Vec<_> = current.tags.keys().map(String::as_str).collect();
            return Err(
                Error::failed(format!("{name}@{snapshot} has no tag {key}")).hint(
                    match keys.is_empty() {
                        true => "it has no tags".to_owned(),
                        false => format!("its tags are: {}", keys.join(", ")),
                    },
                ),
            );
        }
        meta::edit_tags(&mut container, &snapshot, &added, &removed)?;
        Ok(0)
    }
}

/// Protect snapshots from removal
///
/// `cowl rm`, `cowl prune` and `cowl destroy` refuse to remove them until `cowl protect --off`.
#[derive(Debug, clap::Args)]
pub(super) struct ProtectArgs {
    /// The snapshots
    #[arg(value_name = "NAME@SNAP", required = true)]
    snapshots: Vec<OsString>,
    /// Allow their removal again
    #[arg(long)]
    off: bool,
}

impl CliCommand for ProtectArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let named = self
            .snapshots
            .iter()
            .map(|raw| parse_snapshot_address(context, raw))
            .collect::<Result<Vec<_>>>()?;
        let protection = match self.off {
            true => meta::Protection::Off,
            false => meta::Protection::On,
        };
        for (name, snapshot) in named {
            let store = context.store_for(&name)?;
            let mut container = recover::open(&store, &name)?;
            meta::set_protection(&mut container, &snapshot, protection)?;
        }
        Ok(0)
    }
}

/// Returns the comment for `cowl snapshot`, from the option `--message` or from a file.
pub(super) fn read_comment(message: Option<&OsString>, file: Option<&Path>) -> Result<String> {
    match (message, file) {
        (Some(word), _) => text::parse(word),
        (None, Some(file)) => read_text(file),
        (None, None) => Ok(String::new()),
    }
}
