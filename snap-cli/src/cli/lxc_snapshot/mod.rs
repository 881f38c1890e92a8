//! cowl called as `lxc-snapshot`: the options, output and exit codes of LXC's own, over snapshots that cowl
//! keeps and those that LXC made. docs/lxc-snapshot.md has what is another.

mod args;
mod list;
mod said;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use super::text::read_text;
use super::{Context, output};
use crate::config::{Asked, Config};
use crate::container::Container;
use crate::container::lxc_snaps::{Place, no_container};
use crate::error::{Error, Result};
use crate::host::lxc;
use crate::host::lxc_snaps::{self, Tree};
use crate::host::users::quoted;
use crate::snapshot::lxc_import;
use crate::snapshot::remove::{plan, remove};
use crate::snapshot::restore::{clone, restore};
use crate::snapshot::take::{Wish, take};
use crate::store::manifest::{ContainerManifest, SnapshotRef};
use crate::store::name::{Address, ContainerName};
use crate::store::{Session, Store, disk};
use args::{Args, Task};
use list::One;
use said::Said;

/// Whether this is the name that we were called by.
pub(super) fn is_called(args: &[OsString]) -> bool {
    let name = args.first().and_then(|arg| Path::new(arg).file_name());
    name == Some(OsStr::new("lxc-snapshot"))
}

/// Runs the command line. Whatever goes wrong ends with 1, as there.
pub(super) fn main(args: &[OsString]) -> ExitCode {
    let parsed = match Args::try_parse_from(args) {
        Ok(parsed) => parsed,
        Err(error) => {
            output::usage(&error);
            return ExitCode::FAILURE;
        }
    };
    output::loudness(parsed.quiet, 0);
    let mut said = Said::new(parsed.quiet);
    match told(&parsed).unwrap_or_else(|| run(args, &parsed, &mut said)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            said.error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Help and the like, where that was asked for.
fn told(args: &Args) -> Option<Result<()>> {
    let mut command = Args::command();
    let text = if args.help {
        command.render_long_help().to_string()
    } else if args.usage {
        command.render_usage().to_string()
    } else if args.version {
        env!("CARGO_PKG_VERSION").to_owned()
    } else {
        return None;
    };
    Some(output::line(text.trim_end().as_bytes()))
}

/// A container that cowl keeps.
#[derive(Debug)]
struct Kept {
    store: Store,
    manifest: ContainerManifest,
}

/// What every task gets.
struct Front<'a> {
    context: &'a Context,
    container: lxc::Container,
    /// The folder of its snapshots, as the original would print it.
    shown_folder: PathBuf,
    said: &'a Said,
}

fn run(words: &[OsString], args: &Args, said: &mut Said) -> Result<()> {
    if let Some(file) = &args.logfile {
        let level = args.logpriority.as_ref().and_then(|level| level.to_str());
        said.keep(file, level.unwrap_or_default())?;
    }
    let meant = args.meant();
    let name = meant.name.ok_or_else(|| {
        Error::usage("no container is named").hint("name one: lxc-snapshot -n NAME")
    })?;
    if let Some(file) = &args.rcfile {
        std::fs::File::open(file).map_err(|error| Error::at("read", file, error))?;
        said.note("the container's own config is kept, not that of --rcfile");
    }
    if !meant.left_over.is_empty() {
        let words: Vec<_> = meant.left_over.iter().map(quoted).collect();
        let words = words.join(" ");
        // A name too many may have been meant for the new container.
        if matches!(meant.task, Task::Restore { .. }) {
            return Err(Error::usage(format!("what is {words} to mean?"))
                .hint("one new name at most: -r SNAP -N NEWNAME"));
        }
        said.note(&format!("ignored, as lxc-snapshot does: {words}"));
    }
    let context = context(words)?;
    let asked = args.lxcpath.as_deref();
    let front = front(&context, &name, asked, said)?;
    match meant.task {
        Task::Take => front.take(args.comment.as_deref()),
        Task::List => list::print(&front, front.kept()?.as_ref(), args.showcomments, said),
        Task::Restore { snapshot, new } => {
            let new = new.filter(|new| *new != name);
            front.restore(&snapshot, new.as_deref())
        }
        Task::DestroyAll => front.destroy_all(),
        Task::Destroy(snapshot) => front.destroy(&snapshot),
    }
}

fn context(words: &[OsString]) -> Result<Context> {
    let config = Config::load(Asked::default())?;
    output::colour(config.color);
    let typed = words.iter().skip(1).map(quoted);
    let who: Vec<_> = std::iter::once("lxc-snapshot".to_owned())
        .chain(typed)
        .collect();
    Ok(Context {
        root: Store::locate(config.store.clone())?,
        session: Session {
            who: who.join(" "),
            patience: Duration::from_secs(config.wait.min(24 * 3600)),
        },
        config,
    })
}

fn front<'a>(
    context: &'a Context,
    name: &OsStr,
    asked: Option<&Path>,
    said: &'a Said,
) -> Result<Front<'a>> {
    let lxcpath = lxc::lxcpath(asked)?;
    // Without a slash at its end, which would name another old folder.
    let lxcpath: PathBuf = lxcpath.components().collect();
    let plain = name.to_str().filter(|name| {
        !matches!(*name, "" | "." | "..")
            && !name.contains('/')
            && !name.chars().any(char::is_control)
    });
    let Some(name) = plain else {
        return Err(Error::usage(format!(
            "\"{}\" can't be a container's name",
            name.as_encoded_bytes().escape_ascii()
        )));
    };
    let container = lxc::Container {
        lxcpath,
        name: name.to_owned(),
    };
    if !disk::is_there(&container.config())? {
        return Err(no_container(&container));
    }
    let folder = lxc_snaps::folder(&container)?;
    let shown_folder = match (asked, folder.strip_prefix(&container.lxcpath)) {
        (Some(asked), Ok(inside)) => asked.join(inside),
        _ => folder,
    };
    Ok(Front {
        context,
        container,
        shown_folder,
        said,
    })
}

impl Front<'_> {
    /// The container as cowl keeps it, if it does.
    fn kept(&self) -> Result<Option<Kept>> {
        if !disk::is_there(&self.context.root)? {
            return Ok(None);
        }
        for store in self.context.stores()? {
            for (_, record) in store.containers()? {
                let manifest = record?.body;
                let is_it = manifest.lxc.as_ref().is_some_and(|lxc| {
                    lxc.name == self.container.name && same(&lxc.lxcpath, &self.container.lxcpath)
                });
                if is_it {
                    return Ok(Some(Kept { store, manifest }));
                }
            }
        }
        Ok(None)
    }

    fn place(&self) -> Result<Place> {
        Place::open(self.container.clone(), self.context.session.patience)
    }

    fn notes(&self, notes: Vec<String>) {
        for note in notes {
            self.said.note(&note);
        }
    }

    fn take(&self, comment: Option<&Path>) -> Result<()> {
        // Before anything is made.
        let comment = comment.map(read_text).transpose()?.unwrap_or_default();
        let kept = match self.kept()? {
            Some(kept) => kept,
            None => self.adopt()?,
        };
        let mut container = Container::open(&kept.store, &kept.manifest.name)?;
        let wish = Wish {
            comment,
            ..Wish::default()
        };
        take(&mut container, &wish).map(drop)
    }

    /// Has cowl keep the container, so that there is something to snapshot.
    fn adopt(&self) -> Result<Kept> {
        let name = quoted(&self.container.name);
        Err(Error::failed(format!("cowl does not keep {name} yet"))
            .hint(format!("cowl adopt {name}")))
    }

    fn restore(&self, snapshot: &OsStr, new: Option<&OsStr>) -> Result<()> {
        let kept = self.kept()?;
        match (list::find(self, kept.as_ref(), snapshot)?, kept, new) {
            (One::Cowls(found), Some(kept), None) => self.go_back(&kept, &found),
            (One::Cowls(found), Some(kept), Some(new)) => {
                let source = Address {
                    container: kept.manifest.name.clone(),
                    snapshot: Some(found.name),
                };
                for note in clone(&kept.store, &source, &ContainerName::parse(new)?)? {
                    output::note(&note);
                }
                Ok(())
            }
            (One::Lxcs(tree), Some(kept), None) => {
                // It becomes cowl's first: then what is there now stays too.
                let mut container = Container::open(&kept.store, &kept.manifest.name)?;
                let brought = self.bring(&mut container, &self.place()?, &tree)?;
                drop(container);
                self.go_back(&kept, &brought)
            }
            (One::Lxcs(tree), _, Some(new)) => {
                let new = new
                    .to_str()
                    .ok_or_else(|| Error::usage("the new name is not valid UTF-8"))?;
                let mut bar = output::Bar::new("restoring");
                let place = self.place()?;
                let notes = place.restore_as(&tree, new, &mut |done| bar.tell(done))?;
                drop(bar);
                self.notes(notes);
                Ok(())
            }
            (One::Lxcs(tree), None, None) => {
                let place = self.place()?;
                // It may have changed while we waited.
                let tree = place.tree(&tree.name)?;
                let mut bar = output::Bar::new("restoring");
                let notes = place.restore(&tree, &mut |done| bar.tell(done))?;
                drop(bar);
                self.notes(notes);
                Ok(())
            }
            (One::Cowls(_), None, _) => Err(Error::damaged("a snapshot of no container")),
        }
    }

    fn bring(
        &self,
        container: &mut Container<'_>,
        place: &Place,
        tree: &Tree,
    ) -> Result<SnapshotRef> {
        let mut bar = output::Bar::new("importing");
        let brought = lxc_import::bring(container, place, tree, &mut |done| bar.tell(done))?;
        drop(bar);
        self.notes(brought.notes);
        container.snapshot(&brought.name).map(|(found, _)| found)
    }

    fn go_back(&self, kept: &Kept, found: &SnapshotRef) -> Result<()> {
        let mut container = Container::open(&kept.store, &kept.manifest.name)?;
        if let Some(auto) = restore(&mut container, &found.name)?.kept_as {
            let name = &kept.manifest.name;
            self.said.note(&format!(
                "what {name} was until now stays as {auto}: cowl restore {name} --undo takes this back"
            ));
        }
        Ok(())
    }

    fn destroy(&self, snapshot: &OsStr) -> Result<()> {
        let kept = self.kept()?;
        match (list::find(self, kept.as_ref(), snapshot)?, kept) {
            (One::Cowls(found), Some(kept)) => self.remove(&kept, &[found]),
            (One::Lxcs(tree), _) => {
                let place = self.place()?;
                let tree = place.tree(&tree.name)?;
                place.remove(&[tree])
            }
            (One::Cowls(_), None) => Err(Error::damaged("a snapshot of no container")),
        }
    }

    fn destroy_all(&self) -> Result<()> {
        let kept = self.kept()?;
        let trees = lxc_snaps::list(&lxc_snaps::folder(&self.container)?)?;
        if !trees.is_empty() {
            let place = self.place()?;
            place.remove(&place.trees()?)?;
        }
        match kept {
            Some(kept) => self.remove(&kept, &kept.manifest.snapshots),
            None => Ok(()),
        }
    }

    fn remove(&self, kept: &Kept, snapshots: &[SnapshotRef]) -> Result<()> {
        let mut container = Container::open(&kept.store, &kept.manifest.name)?;
        let ids: Vec<_> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        let removal = plan(&container, &ids, false)?;
        remove(&mut container, &removal.going)?;
        match removal.refused.first() {
            None => Ok(()),
            Some(refused) => Err(refused.error()),
        }
    }
}

/// Whether two paths lead to one folder.
fn same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path);
    one == other
        || real(one)
            .ok()
            .zip(real(other).ok())
            .is_some_and(|(a, b)| a == b)
}
