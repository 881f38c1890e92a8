//! The paths that an operation is restricted to. Paths are bytes without a leading slash; that of the root is empty.

use crate::tree::path::is_within;

/// The paths to which an operation is restricted, with everything below them; if empty, it is not restricted.
#[derive(Clone, Debug, Default)]
pub struct Scope(pub Vec<Vec<u8>>);

impl Scope {
    /// Returns whether the scope is not restricted.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a path is in the scope.
    pub fn contains(&self, path: &[u8]) -> bool {
        self.is_all() || self.0.iter().any(|top| is_within(path, top))
    }

    /// Returns whether a path, or anything below it, is in the scope.
    pub fn overlaps(&self, path: &[u8]) -> bool {
        self.contains(path) || self.below(path).next().is_some()
    }

    /// Returns the paths of the scope that are below a path.
    pub(super) fn below(&self, path: &[u8]) -> impl Iterator<Item = &Vec<u8>> {
        let inner = move |top: &&Vec<u8>| top.as_slice() != path && is_within(top, path);
        self.0.iter().filter(inner)
    }
}
