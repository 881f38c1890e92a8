//! The list of a container's snapshots: those of cowl and those of LXC together.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use jiff::tz::TimeZone;

use super::front::Front;
use super::managed::ManagedContainer;
use crate::cli::output;
use crate::error::{Error, Result};
use crate::lxc::layout;
use crate::lxc::locked::find_snapshot;
use crate::lxc::snapshots::{self, LxcSnapshot};
use crate::snapshot::lxc_import;
use crate::store::manifest::{ContainerManifest, SnapshotRef};
use cowl_layers::shown::Show as _;

/// A snapshot that cowl or LXC took.
#[derive(Clone, Debug)]
pub(super) enum AnySnapshot {
    Cowl(SnapshotRef),
    Lxc(LxcSnapshot),
}

impl AnySnapshot {
    fn name(&self) -> &OsStr {
        match self {
            Self::Cowl(snapshot) => OsStr::new(snapshot.name.as_str()),
            Self::Lxc(tree) => &tree.name,
        }
    }
}

/// Whether a list contains the snapshots' comments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comments {
    Shown,
    Hidden,
}

/// Returns all snapshots, sorted by number. Of two with the same name, that of cowl comes first.
fn list_all(front: &Front<'_>, manifest: Option<&ContainerManifest>) -> Result<Vec<AnySnapshot>> {
    let mut found = Vec::new();
    if let Some(manifest) = manifest {
        found.extend(manifest.snapshots.iter().cloned().map(AnySnapshot::Cowl));
    }
    for tree in snapshots::list(&snapshots::snapshots_dir(&front.container)?)? {
        let became = match manifest {
            Some(manifest) => lxc_import::find_imported(manifest, &tree)?.is_some(),
            None => false,
        };
        if !became {
            found.push(AnySnapshot::Lxc(tree));
        }
    }
    found.sort_by_key(|one| layout::sort_key(one.name()));
    Ok(found)
}

/// Returns the snapshot with this name; fails if both cowl and LXC have one.
pub(super) fn find(
    front: &Front<'_>,
    managed: Option<&ManagedContainer>,
    name: &OsStr,
) -> Result<AnySnapshot> {
    let manifest = managed.map(|managed| &managed.manifest);
    let all = list_all(front, manifest)?;
    let same: Vec<_> = all.iter().filter(|one| one.name() == name).collect();
    match (same.as_slice(), managed) {
        ([one], _) => Ok((*one).clone()),
        ([], Some(managed)) if all.iter().all(|one| matches!(one, AnySnapshot::Cowl(_))) => {
            let shown = name.shown();
            let what = format!(
                "{} has no snapshot named \"{shown}\"",
                managed.manifest.name
            );
            Err(Error::not_found(what).hint(format!(
                "list its snapshots: cowl list {}",
                managed.manifest.name
            )))
        }
        ([], _) => {
            let trees: Vec<_> = all
                .into_iter()
                .filter_map(|one| match one {
                    AnySnapshot::Lxc(tree) => Some(tree),
                    AnySnapshot::Cowl(_) => None,
                })
                .collect();
            find_snapshot(&front.container, &trees, name)
                .cloned()
                .map(AnySnapshot::Lxc)
        }
        (_, managed) => {
            let shown = name.as_encoded_bytes().escape_ascii();
            let container = managed.map(|managed| managed.manifest.name.to_string());
            Err(Error::failed(format!(
                "two snapshots are named {shown}: one that cowl took and one that LXC took"
            ))
            .hint(format!(
                "nothing was changed; to import LXC's under another name: cowl import-lxc-snapshots {}",
                container.unwrap_or_default()
            )))
        }
    }
}

/// Prints the list in the format of LXC's own program.
pub(super) fn print(
    front: &Front<'_>,
    managed: Option<&ManagedContainer>,
    comments: Comments,
) -> Result<()> {
    let all = list_all(front, managed.map(|managed| &managed.manifest))?;
    let zone = TimeZone::system();
    let mut printed = false;
    for one in &all {
        let (time, comment) = match one {
            AnySnapshot::Cowl(snapshot) => {
                let time = snapshot.created.parse::<jiff::Timestamp>();
                let time = time.map_or_else(
                    |_| snapshot.created.clone(),
                    |time| layout::format_time(time, &zone),
                );
                (time, snapshot.comment.clone().into_bytes())
            }
            AnySnapshot::Lxc(tree) => {
                let Some(taken) = &tree.taken else {
                    let name = output::shown(tree.name.as_bytes());
                    front.messages.note(&format!(
                        "{name} is incomplete: lxc-snapshot was interrupted or is still running; \
                         to remove it: -d {name}"
                    ));
                    continue;
                };
                let comment = match comments {
                    Comments::Shown => tree.comment()?,
                    Comments::Hidden => Vec::new(),
                };
                (taken.clone(), comment)
            }
        };
        printed = true;
        let name = output::shown(one.name().as_bytes());
        let dir = output::shown(front.listed_dir.as_os_str().as_bytes());
        output::print_line(&format!("{name} ({dir}) {time}"))?;
        if comments == Comments::Shown && !comment.is_empty() {
            // Without its last line break: printing adds one.
            let comment = comment.strip_suffix(b"\n").unwrap_or(&comment);
            match std::str::from_utf8(comment) {
                Ok(text) => output::print_text(text)?,
                Err(_) => output::print_line(&output::shown(comment))?,
            }
        }
    }
    match printed {
        true => Ok(()),
        false => output::print_line("No snapshots"),
    }
}
