//! What the front lists: cowl's snapshots of a container and LXC's own, together.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use jiff::tz::TimeZone;

use super::front::Front;
use super::kept::Kept;
use super::said::Said;
use crate::cli::output;
use crate::error::{Error, Result};
use crate::lxc::layout;
use crate::lxc::locked::find_snapshot;
use crate::lxc::snapshots::{self, LxcSnapshot};
use crate::snapshot::lxc_import;
use crate::store::manifest::{ContainerManifest, SnapshotRef};

/// A snapshot of either kind.
#[derive(Clone, Debug)]
pub(super) enum One {
    Cowls(SnapshotRef),
    Lxcs(LxcSnapshot),
}

impl One {
    fn name(&self) -> &OsStr {
        match self {
            Self::Cowls(snapshot) => OsStr::new(snapshot.name.as_str()),
            Self::Lxcs(tree) => &tree.name,
        }
    }
}

/// All snapshots, by number; cowl's come first where a name is there twice.
pub(super) fn all(front: &Front<'_>, manifest: Option<&ContainerManifest>) -> Result<Vec<One>> {
    let mut found = Vec::new();
    if let Some(manifest) = manifest {
        found.extend(manifest.snapshots.iter().cloned().map(One::Cowls));
    }
    for tree in snapshots::list(&snapshots::snapshots_dir(&front.container)?)? {
        let became = match manifest {
            Some(manifest) => lxc_import::find_imported(manifest, &tree)?.is_some(),
            None => false,
        };
        if !became {
            found.push(One::Lxcs(tree));
        }
    }
    found.sort_by_key(|one| layout::sort_key(one.name()));
    Ok(found)
}

/// The one of exactly this name. Nothing is guessed where there are two.
pub(super) fn find(front: &Front<'_>, kept: Option<&Kept>, name: &OsStr) -> Result<One> {
    let manifest = kept.map(|kept| &kept.manifest);
    let all = all(front, manifest)?;
    let same: Vec<_> = all.iter().filter(|one| one.name() == name).collect();
    match (same.as_slice(), kept) {
        ([one], _) => Ok((*one).clone()),
        ([], Some(kept)) if all.iter().all(|one| matches!(one, One::Cowls(_))) => {
            let shown = name.as_encoded_bytes().escape_ascii();
            let what = format!("{} has no snapshot named \"{shown}\"", kept.manifest.name);
            Err(Error::not_found(what).hint(format!(
                "`cowl list {}` shows its snapshots",
                kept.manifest.name
            )))
        }
        ([], _) => {
            let trees: Vec<_> = all
                .into_iter()
                .filter_map(|one| match one {
                    One::Lxcs(tree) => Some(tree),
                    One::Cowls(_) => None,
                })
                .collect();
            find_snapshot(&front.container, &trees, name)
                .cloned()
                .map(One::Lxcs)
        }
        (_, kept) => {
            let shown = name.as_encoded_bytes().escape_ascii();
            let of = kept.map_or_else(String::new, |kept| kept.manifest.name.to_string());
            Err(Error::failed(format!(
                "two snapshots are named {shown}: one that cowl took and one that LXC took"
            ))
            .hint(format!(
                "nothing was changed; `cowl import-lxc-snapshots {of}` gives LXC's another name"
            )))
        }
    }
}

/// Prints the list.
pub(super) fn print(
    front: &Front<'_>,
    kept: Option<&Kept>,
    comments: bool,
    said: &Said,
) -> Result<()> {
    let all = all(front, kept.map(|kept| &kept.manifest))?;
    let zone = TimeZone::system();
    let mut printed = false;
    for one in &all {
        let (time, comment) = match one {
            One::Cowls(snapshot) => {
                let time = snapshot.created.parse::<jiff::Timestamp>();
                let time = time.map_or_else(
                    |_| snapshot.created.clone(),
                    |time| layout::format_time(time, &zone),
                );
                (time, snapshot.comment.clone().into_bytes())
            }
            One::Lxcs(tree) => {
                let Some(taken) = &tree.taken else {
                    let name = output::shown(tree.name.as_bytes());
                    said.note(&format!(
                        "{name} is not whole: its making was cut off, or is under way; -d {name} \
                         removes it"
                    ));
                    continue;
                };
                let comment = if comments {
                    tree.comment()?
                } else {
                    Vec::new()
                };
                (taken.clone(), comment)
            }
        };
        printed = true;
        let name = output::shown(one.name().as_bytes());
        let folder = output::shown(front.shown_folder.as_os_str().as_bytes());
        output::line(&format!("{name} ({folder}) {time}"))?;
        if comments && !comment.is_empty() {
            // Line by line as it is; what comes next begins on a line of its own.
            let comment = comment.strip_suffix(b"\n").unwrap_or(&comment);
            match std::str::from_utf8(comment) {
                Ok(text) => output::text(text)?,
                Err(_) => output::line(&output::shown(comment))?,
            }
        }
    }
    match printed {
        true => Ok(()),
        false => output::line("No snapshots"),
    }
}
