//! The model: a tree in memory that behaves like a plain directory.
#![allow(dead_code, reason = "every test file uses a part")]
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test"
)]

use std::collections::{BTreeMap, BTreeSet};

use cowl_layers::error::Errno;
use cowl_layers::sys::stat::FileKind;
use cowl_overlay::RenameFlags;

use super::common::Tree;

pub type R<T> = Result<T, Errno>;

/// The tree. Nodes are referenced by index and never removed, so that open files remain valid.
#[derive(Clone, Debug)]
pub struct Model {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub kind: FileKind,
    pub content: Vec<u8>,
    perm: u32,
    xattr: Option<u8>,
    names: BTreeMap<String, usize>,
    /// The inode number that the overlay reported for it.
    number: Option<u64>,
}

/// The kind of a rename.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rename {
    Replace,
    NoReplace,
    Exchange,
}

impl Rename {
    pub fn flags(self) -> RenameFlags {
        RenameFlags {
            no_replace: self == Self::NoReplace,
            exchange: self == Self::Exchange,
            ..RenameFlags::default()
        }
    }
}

/// The properties at one path: path, kind, mode, content, xattr, all paths of the same file.
pub type Line = (String, FileKind, u32, Vec<u8>, Option<u8>, Vec<String>);

impl Node {
    pub fn with_kind(kind: FileKind) -> Self {
        Self {
            kind,
            content: Vec::new(),
            perm: match kind {
                FileKind::Directory => 0o755,
                FileKind::Symlink => 0,
                _ => 0o644,
            },
            xattr: None,
            names: BTreeMap::new(),
            number: None,
        }
    }

    pub fn file(content: Vec<u8>) -> Self {
        Self {
            content,
            ..Self::with_kind(FileKind::Regular)
        }
    }

    pub fn dir() -> Self {
        Self::with_kind(FileKind::Directory)
    }
}

impl Model {
    pub fn new() -> Self {
        Self {
            nodes: vec![Node::dir()],
        }
    }

    pub fn node(&self, node: usize) -> &Node {
        &self.nodes[node]
    }

    fn child(&self, dir: usize, name: &str) -> R<Option<usize>> {
        if self.nodes[dir].kind != FileKind::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok(self.nodes[dir].names.get(name).copied())
    }

    fn find(&self, path: &str) -> R<usize> {
        let mut node = 0;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            node = self.child(node, part)?.ok_or(Errno::NOENT)?;
        }
        Ok(node)
    }

    /// Returns the parent and the last component.
    fn split<'p>(&self, path: &'p str) -> R<(usize, &'p str)> {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok((self.find(above)?, name))
    }

    pub fn make(&mut self, path: &str, node: Node) -> R<()> {
        let (dir, name) = self.split(path)?;
        if self.child(dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        self.nodes.push(node);
        let new = self.nodes.len() - 1;
        self.nodes[dir].names.insert(name.to_owned(), new);
        Ok(())
    }

    pub fn unlink(&mut self, path: &str) -> R<()> {
        let (dir, name) = self.split(path)?;
        let node = self.child(dir, name)?.ok_or(Errno::NOENT)?;
        if self.nodes[node].kind == FileKind::Directory {
            return Err(Errno::ISDIR);
        }
        self.nodes[dir].names.remove(name);
        Ok(())
    }

    pub fn rmdir(&mut self, path: &str) -> R<()> {
        let (dir, name) = self.split(path)?;
        let node = self.child(dir, name)?.ok_or(Errno::NOENT)?;
        if self.nodes[node].kind != FileKind::Directory {
            return Err(Errno::NOTDIR);
        }
        if !self.nodes[node].names.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        self.nodes[dir].names.remove(name);
        Ok(())
    }

    /// Whether `from` is a descendant of `to`.
    pub fn is_inside(&self, from: &str, to: &str) -> bool {
        from.strip_prefix(to)
            .is_some_and(|rest| rest.starts_with('/'))
    }

    pub fn rename(&mut self, from: &str, to: &str, how: Rename) -> R<()> {
        let (old, name) = self.split(from)?;
        let (new, new_name) = self.split(to)?;
        let node = self.child(old, name)?.ok_or(Errno::NOENT)?;
        let target = self.child(new, new_name)?;
        let is_dir = |node: usize| self.nodes[node].kind == FileKind::Directory;
        if is_dir(node) && self.is_inside(to, from) {
            return Err(Errno::INVAL);
        }
        match (target, how) {
            (None, Rename::Exchange) => return Err(Errno::NOENT),
            (Some(_), Rename::NoReplace) => return Err(Errno::EXIST),
            (Some(target), _) if target == node => return Ok(()),
            (Some(target), Rename::Replace) => match (is_dir(node), is_dir(target)) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !self.nodes[target].names.is_empty() => {
                    return Err(Errno::NOTEMPTY);
                }
                _ => {}
            },
            _ => {}
        }
        self.nodes[old].names.remove(name);
        self.nodes[new].names.insert(new_name.to_owned(), node);
        if let (Some(target), Rename::Exchange) = (target, how) {
            self.nodes[old].names.insert(name.to_owned(), target);
        }
        Ok(())
    }

    pub fn link(&mut self, old: &str, new: &str) -> R<()> {
        let node = self.find(old)?;
        let (dir, name) = self.split(new)?;
        if self.nodes[node].kind == FileKind::Directory {
            return Err(Errno::PERM);
        }
        if self.child(dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        self.nodes[dir].names.insert(name.to_owned(), node);
        Ok(())
    }

    /// Opens a regular file, and returns its node.
    pub fn open(&self, path: &str) -> R<usize> {
        let node = self.find(path)?;
        match self.nodes[node].kind {
            FileKind::Regular => Ok(node),
            FileKind::Directory => Err(Errno::ISDIR),
            // The kernel opens these itself.
            _ => Err(Errno::NXIO),
        }
    }

    pub fn set_content(&mut self, path: &str, change: impl FnOnce(&mut Vec<u8>)) -> R<()> {
        let node = self.open(path)?;
        change(&mut self.nodes[node].content);
        Ok(())
    }

    pub fn append(&mut self, path: &str, byte: u8) -> R<()> {
        self.set_content(path, |content| content.push(byte))
    }

    pub fn write(&mut self, node: usize, at: usize, byte: u8) {
        let content = &mut self.nodes[node].content;
        content.resize(content.len().max(at + 1), 0);
        content[at] = byte;
    }

    pub fn truncate(&mut self, path: &str, size: usize) -> R<()> {
        match self.open(path) {
            // The kernel never sends this request for a FIFO or a symbolic link.
            Err(Errno::NXIO) => Err(Errno::INVAL),
            other => {
                self.nodes[other?].content.resize(size, 0);
                Ok(())
            }
        }
    }

    pub fn chmod(&mut self, path: &str, mode: u32) -> R<()> {
        let node = self.find(path)?;
        if self.nodes[node].kind == FileKind::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        self.nodes[node].perm = mode;
        Ok(())
    }

    pub fn set_xattr(&mut self, path: &str, value: Option<u8>) -> R<()> {
        let node = self.find(path)?;
        let node = &mut self.nodes[node];
        if value.is_none() && node.xattr.is_none() {
            return Err(Errno::NODATA);
        }
        if !matches!(node.kind, FileKind::Regular | FileKind::Directory) {
            // Only these types can have user.* xattrs.
            return Err(Errno::PERM);
        }
        node.xattr = value;
        Ok(())
    }

    /// Returns all paths, each directory before its content.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        let mut open = vec![(String::new(), 0)];
        while let Some((path, node)) = open.pop() {
            for (name, child) in &self.nodes[node].names {
                let path = format!("{path}/{name}").trim_start_matches('/').to_owned();
                open.push((path.clone(), *child));
                paths.push(path);
            }
        }
        paths.sort();
        paths
    }

    /// Returns all directories, including the root.
    pub fn dirs(&self) -> Vec<String> {
        let is_dir = |path: &String| {
            self.find(path)
                .is_ok_and(|node| self.nodes[node].kind == FileKind::Directory)
        };
        let below = self.paths().into_iter().filter(is_dir);
        std::iter::once(String::new()).chain(below).collect()
    }

    /// Returns one of the paths of a node.
    pub fn path_to_node(&self, node: usize) -> Option<String> {
        let mut paths = self.paths().into_iter();
        paths.find(|path| self.find(path) == Ok(node))
    }

    pub fn links(&self, node: usize) -> usize {
        let paths = self.paths();
        paths
            .iter()
            .filter(|path| self.find(path) == Ok(node))
            .count()
    }

    pub fn shown(&self) -> Vec<Line> {
        let paths = self.paths();
        let mut names: BTreeMap<usize, Vec<String>> = BTreeMap::new();
        for path in &paths {
            let node = self.find(path).unwrap();
            names.entry(node).or_default().push(path.clone());
        }
        paths
            .into_iter()
            .map(|path| {
                let node = self.find(&path).unwrap();
                let Node {
                    kind,
                    perm,
                    content,
                    xattr,
                    ..
                } = self.nodes[node].clone();
                (path, kind, perm, content, xattr, names[&node].clone())
            })
            .collect()
    }

    /// Forgets the inode numbers of objects of these kinds.
    pub fn forget_numbers(&mut self, is_affected: impl Fn(FileKind) -> bool) {
        for node in &mut self.nodes {
            if is_affected(node.kind) {
                node.number = None;
            }
        }
    }

    /// Verifies that an object's inode number has not changed, and that no other object in the tree has it.
    pub fn check_number(&mut self, path: &str, number: u64) {
        let node = self.find(path).unwrap();
        let before = *self.nodes[node].number.get_or_insert(number);
        assert_eq!(before, number, "the number of {path}");
        let live: BTreeSet<usize> = self.paths().iter().map(|p| self.find(p).unwrap()).collect();
        for other in live {
            let clash = other != node && self.nodes[other].number == Some(number);
            assert!(!clash, "{path} and another object have the number {number}");
        }
    }
}

/// Verifies that a merged tree equals the model.
#[track_caller]
pub fn assert_same(shown: &Tree, model: &Model) {
    let got: Vec<_> = shown
        .iter()
        .map(|(path, shown)| {
            let content = match shown.kind {
                FileKind::Regular => shown.content.clone(),
                _ => Vec::new(),
            };
            let perm = match shown.kind {
                FileKind::Symlink => 0,
                _ => shown.perm,
            };
            let xattr = shown.xattrs.iter().find(|(name, _)| name == b"user.x");
            let names = match shown.kind {
                FileKind::Directory => vec![path.clone()],
                _ => shown.names.clone(),
            };
            let xattr = xattr.map(|(_, value)| value[0]);
            (path.clone(), shown.kind, perm, content, xattr, names)
        })
        .collect();
    assert_eq!(got, model.shown());
}
