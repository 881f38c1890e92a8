//! Location of the objects of a predecessor's inodes by their recorded names (docs/decisions/0035).

use std::sync::Arc;

use cowl_layers::error::Result;
use cowl_layers::name::Name;
use cowl_layers::view::{DirNode, FileNode, Found};
use smallvec::smallvec;

use super::resolve::Resolver;
use crate::inode::{
    Alias, DirState, FileState, FoundState, Identity, Inode, InodeBlock, InodeState, InodeTable,
    Unlocated, Whereabouts,
};

/// The search for objects whose inodes are only in the ledger.
#[derive(Clone, Copy)]
pub(crate) struct Locator<'o> {
    pub(crate) inodes: &'o InodeTable,
    pub(crate) resolver: Resolver<'o>,
}

impl Locator<'_> {
    /// Returns the inode with the number `ino`, whose object is located if it was not yet. `None` if the inode is not
    /// known or its object does not exist any more.
    ///
    /// Two threads may locate an object at once: the first one that inserts it prevails. The other cannot have found
    /// anything older, because a change of the object needs its inode.
    pub(crate) fn locate(&self, ino: u64) -> Result<Option<Arc<Inode>>> {
        if !self.unlocated().may_exist() {
            return Ok(self.inodes.get(ino));
        }
        let mut located = None;
        // Without recursion, which would overflow the stack in a deep tree.
        let mut pending = vec![ino];
        // The directories that were located for those in them. Without a reference, they would be dropped before.
        let mut held = Vec::new();
        while let Some(ino) = pending.last().copied() {
            let block = match self.unlocated().whereabouts(ino)? {
                Whereabouts::Recorded(block) => block,
                Whereabouts::Inode(inode) => {
                    pending.pop();
                    located = Some(inode.clone());
                    held.push(inode);
                    continue;
                }
                Whereabouts::Unknown => {
                    pending.pop();
                    located = None;
                    continue;
                }
            };
            let mut parents = block.place.names().iter().map(|(parent, _)| *parent);
            let is_unlocated = |parent: u64| {
                let whereabouts = self.unlocated().whereabouts(parent);
                matches!(whereabouts, Ok(Whereabouts::Recorded(_)) | Err(_))
            };
            // A directory that is inside itself, in a damaged ledger, is not found.
            let unlocated =
                parents.find(|parent| !pending.contains(parent) && is_unlocated(*parent));
            if let Some(parent) = unlocated {
                pending.push(parent);
                continue;
            }
            located = match self.find(ino, &block) {
                Ok(Some(found)) => {
                    let inode = self.unlocated().recovered(ino, &block, found, None);
                    self.unlocated().insert_located(&inode)
                }
                Ok(None) => self.unlocated().drop_lost(ino),
                // Another thread may have located the object meanwhile, and moved it during this search.
                Err(error) => match self.unlocated().whereabouts(ino)? {
                    Whereabouts::Recorded(_) => return Err(error),
                    Whereabouts::Inode(inode) => Some(inode),
                    Whereabouts::Unknown => None,
                },
            };
            pending.pop();
            held.extend(located.clone());
        }
        Ok(located)
    }

    /// Locates the object of the inode that has the number of an object that a lookup found.
    ///
    /// It is usually the same object. The caller must hold the result until the object is in the table.
    pub(super) fn locate_number(&self, identity: Identity, own: u64) -> Result<Option<Arc<Inode>>> {
        if !self.unlocated().may_exist() {
            return Ok(None);
        }
        match self.unlocated().number(identity, own) {
            Some(ino) => self.locate(ino),
            None => Ok(None),
        }
    }

    fn unlocated(&self) -> Unlocated<'_> {
        Unlocated::of(self.inodes)
    }

    /// Searches an object at all of its recorded names, whose directories are located.
    fn find(&self, ino: u64, block: &InodeBlock) -> Result<Option<FoundState>> {
        let mut found: Option<FoundState> = None;
        for (parent, name) in block.place.names() {
            let Whereabouts::Inode(parent) = self.unlocated().whereabouts(*parent)? else {
                continue;
            };
            let alias = Alias {
                parent,
                name: Name::new(name)?,
            };
            let Some(at) = self.at_name(ino, alias.clone())? else {
                continue;
            };
            match &mut found {
                None => found = Some(at),
                Some(FoundState {
                    state: InodeState::File(file),
                    ..
                }) => file.aliases.push(alias),
                Some(_) => {}
            }
        }
        Ok(found)
    }

    /// Returns the object with the number `ino` at this name.
    fn at_name(&self, ino: u64, alias: Alias) -> Result<Option<FoundState>> {
        if !alias.parent.is_dir() {
            return Ok(None);
        }
        let Some(locations) = alias.parent.locations()? else {
            return Ok(None);
        };
        let found = self.resolver.resolve(&locations, &alias.name)?;
        let found = found_state(found, alias);
        Ok(found.filter(|found| self.unlocated().may_be(found.identity, found.own, ino)))
    }
}

/// Returns the state of an object that was found at a name.
pub(crate) fn found_state(found: Found, alias: Alias) -> Option<FoundState> {
    let (own, stat, state) = match found {
        Found::Absent | Found::Whiteout => return None,
        Found::Dir(node) => (node.ino, node.stat, dir_state(node, alias)),
        Found::File(node) => (node.ino, node.stat, file_state(node, alias)),
    };
    Some(FoundState {
        own,
        identity: Identity::from_stat(&stat),
        kind: stat.kind(),
        ctime: stat.ctime,
        state,
    })
}

/// Returns the state of a directory that was found at a name.
pub(crate) fn dir_state(node: DirNode, alias: Alias) -> InodeState {
    InodeState::Dir(DirState {
        locs: node.locs.into(),
        redirect: node.redirect,
        alias: Some(alias),
        removed: false,
        identity: Identity::from_stat(&node.stat),
    })
}

/// Returns the state of any other object that was found at a name.
pub(super) fn file_state(node: FileNode, alias: Alias) -> InodeState {
    InodeState::File(FileState {
        loc: node.loc,
        data: node.data.map(Box::new),
        redirect: node.redirect.map(Box::new),
        aliases: smallvec![alias],
        orphan: false,
        anchor: None,
        visible: None,
        identity: Identity::from_stat(&node.stat),
    })
}
