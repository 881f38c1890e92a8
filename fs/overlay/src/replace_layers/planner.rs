//! Finds the known objects of the removed layers in the new stack, by their names.

use std::sync::Arc;

use cowl_layers::error::Result;
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::Time;
use cowl_layers::view::{DirNode, FileNode, Found, Loc};
use rustc_hash::FxHashMap;

use super::StackChange;
use super::relocation::{Difference, DifferenceKind, DirMove, FileMove, NewObject, Plans};
use crate::inode::{Alias, DirState, FileState, Identity, Inode, is_in_any};

type Locations = Arc<[Arc<LayerDir>]>;

/// Plans the moves of inodes. A directory is planned before its entries.
pub(super) struct Planner<'c> {
    change: &'c StackChange,
    plans: Plans,
    /// Files of the removed layers none of whose recorded names leads to them.
    unnamed: Vec<Arc<Inode>>,
    /// The number of inodes that were planned, other than those in the plans that the planner began with.
    pub(super) planned: usize,
    /// The locations of directories before and after the change, by inode number; `None` for a removed directory.
    dirs: FxHashMap<u64, Option<(Locations, Locations)>>,
}

/// The outcome of the search for a file by one of its names.
enum FileAt {
    /// It is there in the new stack; with its ctime on disk in the old one.
    Here(Box<FileNode>, Time),
    /// The name leads to another object now.
    Elsewhere,
}

impl<'c> Planner<'c> {
    /// Creates a planner that continues with `plans`, all of which are valid.
    pub(super) fn new(change: &'c StackChange, plans: Plans) -> Self {
        Self {
            change,
            plans,
            unnamed: Vec::new(),
            planned: 0,
            dirs: FxHashMap::default(),
        }
    }

    /// Returns the plans, and the files that may have names that are not recorded.
    pub(super) fn finish(self) -> (Plans, Vec<Arc<Inode>>) {
        (self.plans, self.unnamed)
    }

    /// Plans the move of an inode, if any of its locations is in a removed layer.
    pub(super) fn plan(&mut self, inode: &Arc<Inode>) -> Result<(), Difference> {
        if self.plans.files.contains_key(&inode.ino())
            || !is_in_any(inode, |layer| self.change.removes(layer))
        {
            return Ok(());
        }
        if inode.is_dir() {
            return self.locations(inode).map(drop);
        }
        self.plan_file(inode)
            .map_err(|kind| difference(inode, kind))
    }

    /// Returns the locations of a directory before and after the change; `None` if it was removed.
    fn locations(
        &mut self,
        inode: &Arc<Inode>,
    ) -> Result<Option<(Locations, Locations)>, Difference> {
        // Without recursion, which would overflow the stack in a deep tree.
        let mut pending = Vec::new();
        let mut next = inode.clone();
        let mut known = loop {
            if let Some(known) = self.dirs.get(&next.ino()) {
                break known.clone();
            }
            let parent = match self.dir_state(&next)? {
                (_, Some(known)) => break known,
                (state, None) => {
                    let parent = state.alias.as_ref().map(|alias| alias.parent.clone());
                    pending.push((next, state));
                    parent
                }
            };
            match parent {
                Some(parent) => next = parent,
                // The root.
                None => break None,
            }
        };
        while let Some((inode, state)) = pending.pop() {
            self.planned += 1;
            let planned = self
                .plan_dir(&state, known.as_ref())
                .map_err(|kind| difference(&inode, kind))?;
            known = planned
                .as_ref()
                .map(|to| (state.locs.clone(), to.to.clone()));
            match planned {
                Some(planned) => {
                    self.plans
                        .dirs
                        .insert(inode.ino(), (inode.clone(), planned));
                }
                None => self.retain(state.locs.iter()),
            }
            self.dirs.insert(inode.ino(), known.clone());
        }
        Ok(known)
    }

    /// Returns the state of a directory, and its locations before and after the change if they are known without those
    /// of its parent.
    #[allow(
        clippy::type_complexity,
        reason = "the inner option is the value in `dirs`"
    )]
    fn dir_state(
        &mut self,
        inode: &Arc<Inode>,
    ) -> Result<(DirState, Option<Option<(Locations, Locations)>>), Difference> {
        let state = inode
            .dir()
            .map_err(|error| difference(inode, DifferenceKind::Error(error)))?;
        let is_affected = state
            .locs
            .iter()
            .any(|loc| self.change.removes(loc.layer()));
        let known = if state.removed {
            self.retain(state.locs.iter());
            Some(None)
        } else if let Some((_, planned)) = self.plans.dirs.get(&inode.ino()) {
            Some(Some((planned.from.clone(), planned.to.clone())))
        } else if !is_affected {
            Some(Some((state.locs.clone(), state.locs.clone())))
        } else {
            None
        };
        if let Some(known) = &known {
            self.dirs.insert(inode.ino(), known.clone());
        }
        Ok((state, known))
    }

    /// Retains the removed layers among those of these directories.
    fn retain<'d>(&mut self, dirs: impl Iterator<Item = &'d Arc<LayerDir>>) {
        let removed = dirs
            .map(|dir| dir.layer())
            .filter(|layer| self.change.removes(layer));
        self.plans.retained.extend(removed.map(|layer| layer.id()));
    }

    /// Plans the move of a directory; `parent` has the locations of its parent, `None` for the root. Returns `None` if
    /// its name leads to another object.
    fn plan_dir(
        &self,
        state: &DirState,
        parent: Option<&(Locations, Locations)>,
    ) -> Result<Option<DirMove>, DifferenceKind> {
        let node = match (&state.alias, parent) {
            (None, _) => self.change.after.root()?,
            // The parent was removed.
            (Some(_), None) => return Ok(None),
            (Some(alias), Some((_, parent))) => match self.look_up(parent, &alias.name)? {
                Found::Dir(node) => node,
                Found::Absent | Found::Whiteout => return Err(DifferenceKind::Absent),
                Found::File(_) => return Err(DifferenceKind::Object),
            },
        };
        let to = self.reuse_locations(&state.locs, &node)?;
        let top = |locs: &Locations| locs.first().cloned();
        let object = match (top(&state.locs), top(&to)) {
            (Some(before), Some(after)) if !Arc::ptr_eq(&before, &after) => Some(NewObject {
                identity: Identity::from_stat(&node.stat),
                ctimes: (sys::stat::stat_fd(&*before.fd()?)?.ctime, node.stat.ctime),
            }),
            _ => None,
        };
        Ok(Some(DirMove {
            from: state.locs.clone(),
            to,
            redirect: node.redirect,
            object,
        }))
    }

    /// Returns the new locations of a directory, with the existing objects for those in the layers that remain: a
    /// rename updates these.
    fn reuse_locations(
        &self,
        before: &Locations,
        node: &DirNode,
    ) -> Result<Locations, DifferenceKind> {
        let mut remaining = before
            .iter()
            .filter(|loc| !self.change.removes(loc.layer()));
        let mut after = Vec::with_capacity(node.locs.len());
        for loc in &node.locs {
            if self.change.added.contains(&loc.layer().id()) {
                after.push(loc.clone());
                continue;
            }
            match remaining.next() {
                Some(known) if known.is_same_location(loc) => after.push(known.clone()),
                _ => return Err(DifferenceKind::Layers),
            }
        }
        match remaining.next() {
            None => Ok(after.into()),
            Some(_) => Err(DifferenceKind::Layers),
        }
    }

    fn plan_file(&mut self, inode: &Arc<Inode>) -> Result<(), DifferenceKind> {
        let file = inode.file()?;
        let is_removed = |loc: &Loc| self.change.removes(loc.dir.layer());
        let (moves, moves_data) = (
            is_removed(&file.loc),
            file.data.as_deref().is_some_and(is_removed),
        );
        if !moves && !moves_data {
            return Ok(());
        }
        self.planned += 1;
        let mut found = FileAt::Elsewhere;
        if !file.orphan {
            for alias in &file.aliases {
                found = self.find_file(&file, alias)?;
                if matches!(found, FileAt::Here(..)) {
                    break;
                }
            }
        }
        let FileAt::Here(node, ctime) = found else {
            if !file.orphan && self.plans.hidden.get(&inode.ino()) != Some(&file.identity) {
                // Its other names must be found first: otherwise they would lead to a second inode.
                self.unnamed.push(inode.clone());
                return Ok(());
            }
            let data = file.data.iter().map(|data| &data.dir);
            self.retain(std::iter::once(&file.loc.dir).chain(data));
            return Ok(());
        };
        let identity = Identity::from_stat(&node.stat);
        let is_same = match moves {
            // A rename may have happened between the lookups in both stacks.
            false => identity == file.identity,
            true => self.change.added.contains(&node.loc.dir.layer().id()),
        };
        if node.stat.kind() != inode.kind() || !is_same {
            return Err(DifferenceKind::Object);
        }
        let ctimes = (ctime, node.stat.ctime);
        let object = NewObject { identity, ctimes };
        let planned = FileMove {
            from: file.identity,
            had_data: file.data.is_some(),
            data: (moves || moves_data).then_some(node.data),
            loc: moves.then_some((node.loc, node.redirect, object)),
        };
        self.plans
            .files
            .insert(inode.ino(), (inode.clone(), planned));
        Ok(())
    }

    /// Looks up a file by one of its names in the new stack, if the name leads to the file in the old one.
    fn find_file(&mut self, file: &FileState, alias: &Alias) -> Result<FileAt, DifferenceKind> {
        let parent = self.locations(&alias.parent).map_err(|other| other.kind)?;
        let Some((before, after)) = parent else {
            return Ok(FileAt::Elsewhere);
        };
        let old = match self.change.before.lookup_at(&before, &alias.name, None)? {
            Found::File(old) if Identity::from_stat(&old.stat) == file.identity => old,
            _ => return Ok(FileAt::Elsewhere),
        };
        match self.look_up(&after, &alias.name)? {
            Found::File(new) if new.stat.size == old.stat.size => {
                Ok(FileAt::Here(Box::new(new), old.stat.ctime))
            }
            Found::File(_) | Found::Dir(_) => Err(DifferenceKind::Object),
            Found::Absent | Found::Whiteout => Err(DifferenceKind::Absent),
        }
    }

    fn look_up(&self, locs: &Locations, name: &Name) -> Result<Found> {
        self.change.after.lookup_at(locs, name, None)
    }
}

impl From<cowl_layers::Error> for DifferenceKind {
    fn from(error: cowl_layers::Error) -> Self {
        Self::Error(error)
    }
}

fn difference(inode: &Arc<Inode>, kind: DifferenceKind) -> Difference {
    Difference {
        path: visible_path(inode),
        kind,
    }
}

/// Returns a visible path of an object relative to the root, for a message.
fn visible_path(inode: &Arc<Inode>) -> Vec<u8> {
    let mut parts = Vec::new();
    let mut next = Some(inode.clone());
    while let Some(inode) = next {
        let alias = match (inode.dir(), inode.file()) {
            (Ok(dir), _) => dir.alias,
            (_, Ok(file)) => file.aliases.first().cloned(),
            (Err(_), Err(_)) => None,
        };
        next = alias.map(|alias| {
            parts.push(alias.name.as_bytes().to_vec());
            alias.parent
        });
    }
    parts.reverse();
    parts.join(&b'/')
}
