//! Which paths are meant. Pure: paths are bytes without a leading slash, the root's is empty.

use crate::tree::path::is_within;

/// What is put back: these paths with all below them; everything where there are none.
#[derive(Clone, Debug, Default)]
pub struct Scope(pub Vec<Vec<u8>>);

impl Scope {
    /// Whether it takes in everything.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the path is in it.
    pub fn holds(&self, path: &[u8]) -> bool {
        self.is_all() || self.0.iter().any(|top| is_within(path, top))
    }
}

impl Scope {
    /// Whether the path is in it, or something of it is below the path.
    pub fn touches(&self, path: &[u8]) -> bool {
        self.holds(path) || self.below(path).next().is_some()
    }

    /// What of it lies below the path.
    pub(super) fn below(&self, path: &[u8]) -> impl Iterator<Item = &Vec<u8>> {
        let inner = move |top: &&Vec<u8>| top.as_slice() != path && is_within(top, path);
        self.0.iter().filter(inner)
    }
}
