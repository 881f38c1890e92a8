//! From a name to an inode.

use std::sync::Arc;

use smallvec::smallvec;

use super::attr::UNCOUNTED;
use super::{Attr, Op};
use crate::inode::{Alias, DirState, FileState, Identity, Inode, State};
use cowl_layers::error::{Errno, Error, Result};
use cowl_layers::layer::LayerDir;
use cowl_layers::name::Name;
use cowl_layers::sys::stat::Stat;
use cowl_layers::view::{DirNode, FileNode, Found, Line};

/// What one look at a name gave.
enum Looked {
    Sure(Option<Hit>),
    Unsure,
}

/// An object that was found under a name.
pub(super) struct Hit {
    pub(super) inode: Arc<Inode>,
    /// What was read on the disk.
    pub(super) stat: Stat,
    /// The topmost layer has it under this name.
    pub(super) in_top: bool,
}

impl Op<'_> {
    /// The object `name` in `parent`, or `None`.
    pub fn lookup(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Arc<Inode>>> {
        Ok(self.find_in(parent, name)?.map(|hit| hit.inode))
    }

    /// The same with what stat shows of it.
    pub fn lookup_attr(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<(Arc<Inode>, Attr)>> {
        let Some(Hit { inode, stat, .. }) = self.find_in(parent, name)? else {
            return Ok(None);
        };
        let attr = self.attr_as_found(&inode, stat)?;
        Ok(Some((inode, attr)))
    }

    /// What stat shows of an object that was just found or made. What was read then is what shows, unless a
    /// copy-up moved or moves its times, or the names of a file that has several are to be counted.
    pub(super) fn attr_as_found(&self, inode: &Arc<Inode>, stat: Stat) -> Result<Attr> {
        let plain = inode.is_dir() || stat.nlink == 1 || self.cx.behaviour.static_nlink;
        if plain && !inode.held_ever() {
            Ok(self.shown(inode, stat))
        } else {
            self.attr(inode)
        }
    }

    /// With the attributes as they were found on the disk.
    fn find_in(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Hit>> {
        // A copy-up beside this may move the object between looking and taking it in: then what was
        // seen is out of date, and is looked at again. Each turn means that a copy-up has ended.
        loop {
            let turn = parent.turn();
            match self.look(parent, name, false)? {
                // The number belongs to an object that looks different: one that is just being copied
                // up, or really another. While the folder's names stand still it can be told.
                Looked::Unsure => {
                    let _names = parent.names.lock();
                    return self.find_locked(parent, name);
                }
                Looked::Sure(found) if parent.turn() == turn => return Ok(found),
                Looked::Sure(_) => {}
            }
        }
    }

    /// The same for who holds the folder's `names`.
    pub(super) fn lookup_locked(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
    ) -> Result<Option<Arc<Inode>>> {
        Ok(self.find_locked(parent, name)?.map(|hit| hit.inode))
    }

    /// The same with what was found.
    pub(super) fn find_locked(&self, parent: &Arc<Inode>, name: &Name) -> Result<Option<Hit>> {
        match self.look(parent, name, true)? {
            Looked::Sure(found) => Ok(found),
            Looked::Unsure => Err(Error::Errno(Errno::STALE)),
        }
    }

    fn look(&self, parent: &Arc<Inode>, name: &Name, sure: bool) -> Result<Looked> {
        let Some(locs) = parent.places()? else {
            return Ok(Looked::Sure(None));
        };
        let is_top = |dir: &Arc<LayerDir>| {
            locs.first()
                .is_some_and(|top| Arc::ptr_eq(top.layer(), dir.layer()))
        };
        let (taken, stat, in_top) = match self.resolve(&locs, name)? {
            Found::Absent | Found::Whiteout => {
                self.overlay.absent.note(&locs, name);
                return Ok(Looked::Sure(None));
            }
            Found::Dir(node) => {
                let mut stat = node.stat;
                if node.locs.len() > 1 {
                    stat.nlink = UNCOUNTED;
                }
                let in_top = node.locs.first().is_some_and(is_top);
                (self.take_dir(parent, name, node, sure), stat, in_top)
            }
            Found::File(node) => {
                let (loc, stat) = (node.loc.clone(), node.stat);
                let in_top = is_top(&loc.dir);
                let inode = self.take_file(parent, name, node, sure);
                if let Some(inode) = &inode {
                    // The first name that is known of a file whose known names all went.
                    inode.found_again(loc)?;
                }
                (inode, stat, in_top)
            }
        };
        let hit = |inode| {
            Looked::Sure(Some(Hit {
                inode,
                stat,
                in_top,
            }))
        };
        Ok(taken.map_or(Looked::Unsure, hit))
    }

    /// What `name` means in a folder that lies there.
    fn resolve(&self, locs: &[Arc<LayerDir>], name: &Name) -> Result<Found> {
        let names = self.deep_names(locs, false);
        let known = self.known(locs, names.as_ref());
        self.cx.stack.view().lookup_at(locs, name, known)
    }

    /// The names in a folder that lies there.
    pub(super) fn lines_of(&self, locs: &[Arc<LayerDir>]) -> Result<Vec<Line>> {
        let names = self.deep_names(locs, true);
        let known = self.known(locs, names.as_ref());
        let mut lines = self.cx.stack.view().lines(locs, known)?;
        lines.retain(|line| !line.whiteout);
        Ok(lines)
    }

    /// Whether a folder shows no name.
    pub(super) fn shows_nothing(&self, inode: &Inode) -> Result<bool> {
        match inode.places()? {
            Some(locs) => Ok(self.lines_of(&locs)?.is_empty()),
            None => Ok(true),
        }
    }

    /// What would show under `name` if the upper had nothing there.
    pub(super) fn below(&self, dir: &DirState, name: &Name) -> Result<Found> {
        self.resolve(self.cx.stack.below_upper(&dir.locs), name)
    }

    /// Takes a folder in; for `sure` see [`crate::inode::InodeTable`].
    pub(super) fn take_dir(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
        node: DirNode,
        sure: bool,
    ) -> Option<Arc<Inode>> {
        self.take(
            parent,
            name,
            node.ino,
            &node.stat,
            sure,
            |alias, identity| {
                State::Dir(DirState {
                    locs: node.locs.into(),
                    redirect: node.redirect,
                    alias: Some(alias),
                    removed: false,
                    identity,
                })
            },
        )
    }

    /// Takes in what is no folder.
    pub(super) fn take_file(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
        node: FileNode,
        sure: bool,
    ) -> Option<Arc<Inode>> {
        self.take(
            parent,
            name,
            node.ino,
            &node.stat,
            sure,
            |alias, identity| {
                State::File(FileState {
                    loc: node.loc,
                    data: node.data.map(Box::new),
                    redirect: node.redirect.map(Box::new),
                    aliases: smallvec![alias],
                    orphan: false,
                    anchor: None,
                    visible: None,
                    identity,
                })
            },
        )
    }

    fn take(
        &self,
        parent: &Arc<Inode>,
        name: &Name,
        number: u64,
        stat: &Stat,
        sure: bool,
        state: impl FnOnce(Alias, Identity) -> State,
    ) -> Option<Arc<Inode>> {
        let identity = Identity::of(stat);
        let alias = Alias {
            parent: parent.clone(),
            name: name.clone(),
        };
        let (inode, new) = self.overlay.inodes.intern(number, identity, sure, |ino| {
            Inode::new(ino, stat.kind(), state(alias.clone(), identity))
        })?;
        if !new {
            inode.add_alias(alias);
        }
        Some(inode)
    }

    /// The path of a folder as the layers below the upper know it, without a leading slash: what a
    /// redirect mark has to say. A folder that was moved in this upper has its mark already.
    pub(super) fn path_below(&self, inode: &Arc<Inode>) -> Result<Vec<u8>> {
        use cowl_layers::format::Redirect;
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let mut next = inode.clone();
        loop {
            let dir = next.dir()?;
            let redirect = dir
                .redirect
                .as_ref()
                .filter(|_| self.cx.stack.upper_dir(&dir).is_some());
            let Some(alias) = &dir.alias else {
                if dir.removed {
                    return Err(Error::Errno(Errno::NOENT));
                }
                break;
            };
            match redirect {
                Some(Redirect::Path(path)) => {
                    parts.push(path.to_vec());
                    break;
                }
                Some(Redirect::Sibling(name)) => parts.push(name.as_bytes().to_vec()),
                None => parts.push(alias.name.as_bytes().to_vec()),
            }
            next = alias.parent.clone();
        }
        parts.reverse();
        Ok(parts.join(&b'/'))
    }
}
