//! A map from paths that shares common prefixes.
//!
//! Its size is linear in the names, where a map of whole paths would be quadratic in the depth of a tree. Paths are
//! bytes without a leading slash; that of the root is empty. No function recurses.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::path::common_prefix;

/// Values by path.
///
/// The path of the last lookup is cached. For paths in order, each lookup costs the components that differ from
/// the previous path.
#[derive(Debug)]
pub(crate) struct PathMap<T> {
    /// All nodes; the first one is the root.
    nodes: Vec<PathNode<T>>,
    /// The indexes of unused nodes.
    free: Vec<usize>,
    memo: RefCell<LookupCache>,
}

#[derive(Debug)]
struct PathNode<T> {
    value: Option<T>,
    below: BTreeMap<Box<[u8]>, usize>,
}

/// An existing path and the nodes along it.
#[derive(Debug, Default)]
struct LookupCache {
    path: Vec<u8>,
    /// For each component: its end in the path, its node, and whether it or one of its ancestors (except for the
    /// root) has a value.
    components: Vec<(usize, usize, bool)>,
}

impl LookupCache {
    /// Truncates the cached path to its common prefix with `path`.
    fn truncate_to(&mut self, path: &[u8]) {
        let same = common_prefix(&self.path, path);
        let length = self.components.partition_point(|(end, ..)| *end <= same);
        let ends_here = |end: usize| path.get(end).is_none_or(|&byte| byte == b'/');
        let length = match self.components.get(..length).and_then(<[_]>::last) {
            Some((end, ..)) if !ends_here(*end) => length - 1,
            _ => length,
        };
        self.components.truncate(length);
        let end = self.components.last().map_or(0, |(end, ..)| *end);
        self.path.truncate(end);
    }

    /// Appends a component.
    fn push(&mut self, name: &[u8], node: usize, has_value: bool) {
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name);
        let covered = self.is_covered() || has_value;
        self.components.push((self.path.len(), node, covered));
    }

    fn node(&self) -> usize {
        self.components.last().map_or(0, |(_, node, _)| *node)
    }

    /// Returns whether a component of the path has a value.
    fn is_covered(&self) -> bool {
        self.components.last().is_some_and(|(.., covered)| *covered)
    }
}

impl<T> Default for PathNode<T> {
    fn default() -> Self {
        Self {
            value: None,
            below: BTreeMap::new(),
        }
    }
}

impl<T> Default for PathMap<T> {
    fn default() -> Self {
        Self {
            nodes: vec![PathNode::default()],
            free: Vec::new(),
            memo: RefCell::default(),
        }
    }
}

/// A step of a walk through a [`PathMap`].
pub(crate) enum Visit<'a, T> {
    /// Enters this name in the node that was entered last; the name of the root is empty.
    Enter(&'a [u8], Option<&'a T>),
    /// Leaves the node that was entered last.
    Leave(Option<&'a T>),
}

/// Splits a path into its components.
fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty())
}

impl<T> PathMap<T> {
    fn node(&self, at: usize) -> Option<&PathNode<T>> {
        self.nodes.get(at)
    }

    /// Returns the child of a node with this name.
    fn step(&self, at: usize, name: &[u8]) -> Option<usize> {
        self.node(at)?.below.get(name).copied()
    }

    /// Follows a path as far as it exists, and returns the rest.
    fn descend<'p>(&self, memo: &mut LookupCache, path: &'p [u8]) -> &'p [u8] {
        memo.truncate_to(path);
        let mut rest = path.get(memo.path.len()..).unwrap_or_default();
        loop {
            rest = rest.strip_prefix(b"/").unwrap_or(rest);
            let end = rest.iter().position(|&byte| byte == b'/');
            let name = rest.get(..end.unwrap_or(rest.len())).unwrap_or_default();
            let next = match name {
                b"" => None,
                name => self.step(memo.node(), name),
            };
            let Some(next) = next else { return rest };
            let has_value = self.node(next).is_some_and(|node| node.value.is_some());
            memo.push(name, next, has_value);
            rest = rest.get(name.len()..).unwrap_or_default();
        }
    }

    /// Returns the node of exactly this path.
    fn find(&self, path: &[u8]) -> Option<usize> {
        let mut memo = self.memo.borrow_mut();
        self.descend(&mut memo, path)
            .is_empty()
            .then(|| memo.node())
    }

    /// Inserts a value and returns the previous one.
    pub(crate) fn insert(&mut self, path: &[u8], value: T) -> Option<T> {
        let mut memo = std::mem::take(&mut *self.memo.borrow_mut());
        let rest = self.descend(&mut memo, path);
        for name in parts(rest) {
            let next = self.free.pop().unwrap_or_else(|| {
                self.nodes.push(PathNode::default());
                self.nodes.len() - 1
            });
            if let Some(node) = self.nodes.get_mut(memo.node()) {
                node.below.insert(name.into(), next);
            }
            memo.push(name, next, false);
        }
        let node = self.nodes.get_mut(memo.node());
        let old = node.and_then(|node| node.value.replace(value));
        if let Some((.., covered)) = memo.components.last_mut() {
            *covered = true;
        }
        *self.memo.borrow_mut() = memo;
        old
    }

    /// Returns the value of exactly this path.
    pub(crate) fn get(&self, path: &[u8]) -> Option<&T> {
        self.node(self.find(path)?)?.value.as_ref()
    }

    /// Returns whether exactly this path has a value.
    pub(crate) fn has(&self, path: &[u8]) -> bool {
        self.get(path).is_some()
    }

    /// Returns whether this path or one of its ancestors has a value. A value of the root counts for the root only.
    pub(crate) fn covers(&self, path: &[u8]) -> bool {
        let mut memo = self.memo.borrow_mut();
        self.descend(&mut memo, path);
        memo.is_covered()
    }

    /// Returns whether a descendant of this path has a value.
    pub(crate) fn has_below(&self, path: &[u8]) -> bool {
        // Sound because nodes without a value at or below them do not exist.
        let node = self.find(path).and_then(|at| self.node(at));
        node.is_some_and(|node| !node.below.is_empty())
    }

    /// Removes all values at or below this path.
    pub(crate) fn remove_all(&mut self, path: &[u8]) {
        if self.find(path).is_none() {
            return;
        }
        *self.memo.get_mut() = LookupCache::default();
        if parts(path).next().is_none() {
            *self = Self::default();
            return;
        }
        self.cut(path);
    }

    /// Removes the nodes at and below a path, and ancestors that no longer lead to a value.
    fn cut(&mut self, path: &[u8]) {
        // The last ancestor that has a value or another child, and the position of the name below it.
        let (mut lowest_needed, mut at) = ((0, None), 0);
        for name in parts(path) {
            let Some(node) = self.node(at) else { return };
            if at == 0 || node.value.is_some() || node.below.len() > 1 {
                lowest_needed = (at, Some(name));
            }
            let Some(next) = self.step(at, name) else {
                return;
            };
            at = next;
        }
        let (from, Some(name)) = lowest_needed else {
            return;
        };
        let below = self.nodes.get_mut(from).and_then(|n| n.below.remove(name));
        let mut pending: Vec<usize> = below.into_iter().collect();
        while let Some(at) = pending.pop() {
            if let Some(node) = self.nodes.get_mut(at) {
                let node = std::mem::take(node);
                pending.extend(node.below.into_values());
                self.free.push(at);
            }
        }
    }

    /// Visits all nodes depth-first.
    pub(crate) fn visit<E>(
        &self,
        mut visit: impl FnMut(Visit<'_, T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(root) = self.node(0) else {
            return Ok(());
        };
        visit(Visit::Enter(b"", root.value.as_ref()))?;
        let mut levels = vec![(root, root.below.iter())];
        while let Some((node, below)) = levels.last_mut() {
            match below.next() {
                Some((name, at)) => {
                    if let Some(next) = self.node(*at) {
                        visit(Visit::Enter(name, next.value.as_ref()))?;
                        levels.push((next, next.below.iter()));
                    }
                }
                None => {
                    visit(Visit::Leave(node.value.as_ref()))?;
                    levels.pop();
                }
            }
        }
        Ok(())
    }

    /// Calls `each` with every path, its value, and the value of the same path in another map.
    pub(crate) fn each_with<U, E>(
        &self,
        other: &PathMap<U>,
        mut each: impl FnMut(&[u8], &T, Option<&U>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.each(|path, value| each(path, value, other.get(path)))
    }

    /// Calls `each` with every path and its value, parents before children.
    pub(crate) fn each<E>(
        &self,
        mut each: impl FnMut(&[u8], &T) -> Result<(), E>,
    ) -> Result<(), E> {
        self.each_step(|path, visit| match visit {
            Visit::Enter(_, Some(value)) => each(path, value),
            Visit::Enter(..) | Visit::Leave(_) => Ok(()),
        })
    }

    /// Calls `each` with every path and its value, children before parents.
    pub(crate) fn each_upward<E>(
        &self,
        mut each: impl FnMut(&[u8], &T) -> Result<(), E>,
    ) -> Result<(), E> {
        self.each_step(|path, visit| match visit {
            Visit::Leave(Some(value)) => each(path, value),
            Visit::Enter(..) | Visit::Leave(_) => Ok(()),
        })
    }

    /// Visits all nodes depth-first, with their paths.
    pub(crate) fn each_step<E>(
        &self,
        mut each: impl FnMut(&[u8], Visit<'_, T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut path = Vec::new();
        let mut lengths = Vec::new();
        self.visit(|visit| match visit {
            Visit::Enter(name, value) => {
                lengths.push(path.len());
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                each(&path, Visit::Enter(name, value))
            }
            Visit::Leave(value) => {
                let done = each(&path, Visit::Leave(value));
                path.truncate(lengths.pop().unwrap_or_default());
                done
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn all(map: &PathMap<u32>) -> BTreeMap<Vec<u8>, u32> {
        let mut found = BTreeMap::new();
        let Ok(()) = map.each(|path, value| {
            found.insert(path.to_vec(), *value);
            Ok::<_, Infallible>(())
        });
        found
    }

    fn within(path: &[u8], top: &[u8]) -> bool {
        top.is_empty() || path == top || path.starts_with(&[top, b"/"].concat())
    }

    proptest! {
        /// A `PathMap` behaves like a map whose keys are whole paths.
        #[test]
        fn behaves_like_a_map_of_whole_paths(steps in prop::collection::vec((0..3_u8, "[ab](/[ab]){0,3}|"), 1..60)) {
            let (mut map, mut plain) = (PathMap::default(), BTreeMap::new());
            for (number, (operation, path)) in (0..).zip(steps) {
                let path = path.into_bytes();
                match operation {
                    0 | 1 => prop_assert_eq!(map.insert(&path, number), plain.insert(path, number)),
                    _ => {
                        map.remove_all(&path);
                        plain.retain(|other, _| !within(other, &path));
                    }
                }
                prop_assert_eq!(&all(&map), &plain);
                for path in [&b""[..], b"a", b"a/b", b"b/a/b", b"a/b/a/b"] {
                    prop_assert_eq!(map.get(path), plain.get(path));
                    let mut keys = plain.keys();
                    let covered = keys.any(|top| !top.is_empty() && within(path, top));
                    prop_assert_eq!(map.covers(path), covered);
                    let below = plain.keys().any(|other| other != path && within(other, path));
                    prop_assert_eq!(map.has_below(path), below);
                }
            }
        }
    }
}
