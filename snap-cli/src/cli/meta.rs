//! `cowl comment`, `cowl tag` and `cowl protect`: what people say about a snapshot

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::text::{self, edited, read_text};
use super::{Context, Verb, tags};
use crate::error::{Error, Result};
use crate::recover;
use crate::snapshot::meta;
use crate::store::name::{Address, ContainerName, SnapshotName};

/// The container and the snapshot that an address names; one without a snapshot is refused.
fn both(raw: &OsString) -> Result<(ContainerName, SnapshotName)> {
    let Address {
        container,
        snapshot,
    } = Address::parse(raw)?;
    match snapshot {
        Some(snapshot) => Ok((container, snapshot)),
        None => Err(
            Error::usage(format!("{container} names no snapshot")).hint(format!(
                "write {container}@SNAP; `cowl list {container}` shows its snapshots"
            )),
        ),
    }
}

/// Say something about a snapshot, or change what was said
///
/// Without a text an editor is opened ($VISUAL, $EDITOR, else vi) with what was said until now.
#[derive(Debug, clap::Args)]
pub(super) struct CommentArgs {
    /// The snapshot
    #[arg(value_name = "NAME@SNAP")]
    snapshot: OsString,
    /// The remark; an empty one takes it away
    #[arg(conflicts_with = "file")]
    text: Option<OsString>,
    /// Take the remark from a file, or from standard input
    #[arg(short = 'c', long, value_name = "FILE|-")]
    file: Option<PathBuf>,
}

impl Verb for CommentArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let (name, snapshot) = both(&self.snapshot)?;
        let store = context.store_of(&name)?;
        let said = match (&self.text, &self.file) {
            (Some(said), _) => text::plain(said)?,
            (None, Some(file)) => read_text(file)?,
            (None, None) => {
                // Not locked meanwhile: nobody is to wait for somebody's typing.
                let known = recover::open(&store, &name)?.snapshot(&snapshot)?.0;
                edited(&known.comment)?
            }
        };
        let mut container = recover::open(&store, &name)?;
        meta::set_comment(&mut container, &snapshot, &said)?;
        Ok(0)
    }
}

/// Put tags on a snapshot, or take them off
///
/// `cowl list --tag` and `cowl prune --keep-tag` go by them.
#[derive(Debug, clap::Args)]
pub(super) struct TagArgs {
    /// The snapshot
    #[arg(value_name = "NAME@SNAP")]
    snapshot: OsString,
    /// Tags to put on: a key with a value, or a key alone
    #[arg(value_name = "KEY[=VALUE]", required_unless_present = "remove")]
    tags: Vec<OsString>,
    /// Keys of tags to take off; may be given several times
    #[arg(short, long, value_name = "KEY")]
    remove: Vec<OsString>,
}

impl Verb for TagArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let (name, snapshot) = both(&self.snapshot)?;
        let with = tags(&self.tags)?;
        let without: Vec<String> = tags(&self.remove)?.into_keys().collect();
        let store = context.store_of(&name)?;
        let mut container = recover::open(&store, &name)?;
        let (known, _) = container.snapshot(&snapshot)?;
        if let Some(key) = without.iter().find(|key| !known.tags.contains_key(*key)) {
            let there: Vec<_> = known.tags.keys().map(String::as_str).collect();
            return Err(
                Error::failed(format!("{name}@{snapshot} has no tag {key}")).hint(
                    match there.is_empty() {
                        true => "it has no tags".to_owned(),
                        false => format!("it has: {}", there.join(", ")),
                    },
                ),
            );
        }
        meta::edit_tags(&mut container, &snapshot, &with, &without)?;
        Ok(0)
    }
}

/// Keep a snapshot from being removed
///
/// `cowl rm`, `cowl prune` and `cowl destroy` refuse to remove it until `cowl protect --off`.
#[derive(Debug, clap::Args)]
pub(super) struct ProtectArgs {
    /// The snapshots
    #[arg(value_name = "NAME@SNAP", required = true)]
    snapshots: Vec<OsString>,
    /// Allow its removal again
    #[arg(long)]
    off: bool,
}

impl Verb for ProtectArgs {
    fn run(&self, context: &Context) -> Result<u8> {
        let named = self
            .snapshots
            .iter()
            .map(both)
            .collect::<Result<Vec<_>>>()?;
        let protection = match self.off {
            true => meta::Protection::Off,
            false => meta::Protection::On,
        };
        for (name, snapshot) in named {
            let store = context.store_of(&name)?;
            let mut container = recover::open(&store, &name)?;
            meta::set_protection(&mut container, &snapshot, protection)?;
        }
        Ok(0)
    }
}

/// The remark of `cowl snapshot`: from the words, or from a file.
pub(super) fn remark(message: Option<&OsString>, file: Option<&Path>) -> Result<String> {
    match (message, file) {
        (Some(said), _) => text::plain(said),
        (None, Some(file)) => read_text(file),
        (None, None) => Ok(String::new()),
    }
}
