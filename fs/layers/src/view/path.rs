//! A path in a layer that shares its parent with other paths.
//!
//! A walk down a tree of any depth makes one small allocation for each directory, instead of one as long as the path.

use crate::shown::Show as _;
use std::fmt;
use std::sync::Arc;

/// A path relative to the root of a layer. The path of the root is empty.
#[derive(Clone, Default)]
pub struct LayerPath(Option<Arc<Link>>);

struct Link {
    above: LayerPath,
    name: Box<[u8]>,
}

impl LayerPath {
    /// Returns the path extended by a name.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> Self {
        Self(Some(Arc::new(Link {
            above: self.clone(),
            name: name.into(),
        })))
    }

    /// Iterates over the names, the last one first.
    fn names_upward(&self) -> impl Iterator<Item = &[u8]> {
        let mut at = self;
        std::iter::from_fn(move || {
            let link = at.0.as_ref()?;
            at = &link.above;
            Some(&*link.name)
        })
    }

    /// Returns the names, from the root down.
    pub fn names(&self) -> Vec<&[u8]> {
        let mut names: Vec<_> = self.names_upward().collect();
        names.reverse();
        names
    }

    /// Returns the parent path and the last name; `None` for the root.
    pub fn split_last(&self) -> Option<(&Self, &[u8])> {
        let link = self.0.as_ref()?;
        Some((&link.above, &link.name))
    }

    /// Returns the path as bytes, without a leading slash.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.names().join(&b'/')
    }
}

impl From<&[u8]> for LayerPath {
    fn from(path: &[u8]) -> Self {
        path.split(|&byte| byte == b'/')
            .filter(|name| !name.is_empty())
            .fold(Self::default(), |path, name| path.join(name))
    }
}

impl PartialEq for LayerPath {
    fn eq(&self, other: &Self) -> bool {
        let (mut one, mut two) = (self, other);
        loop {
            match (&one.0, &two.0) {
                (None, None) => return true,
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => return true,
                (Some(a), Some(b)) if a.name == b.name => (one, two) = (&a.above, &b.above),
                _ => return false,
            }
        }
    }
}

impl Eq for LayerPath {}

impl Drop for Link {
    fn drop(&mut self) {
        // Dropping a long chain would recurse, with one stack frame for each name.
        let mut above = self.above.0.take();
        while let Some(mut link) = above.and_then(Arc::into_inner) {
            above = link.above.0.take();
        }
    }
}

impl fmt::Debug for LayerPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_bytes().shown())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_equal_as_their_bytes_are() {
        let path = |bytes: &str| LayerPath::from(bytes.as_bytes());
        assert_eq!(path("").to_bytes(), b"");
        assert_eq!(path("a/b").to_bytes(), b"a/b");
        assert_eq!(path("a").join(b"b"), path("a/b"));
        let a = path("a");
        assert_eq!(a.join(b"b"), a.join(b"b"));
        for other in ["", "a", "b", "a/c", "c/b", "x/a/b"] {
            assert_ne!(path(other), path("a/b"), "{other}");
        }
    }

    #[test]
    fn long_chain_is_dropped_without_recursion() {
        let mut path = LayerPath::default();
        for _ in 0..500_000 {
            path = path.join(b"d");
        }
        let shared = path.clone();
        drop(path);
        assert_eq!(shared.names().len(), 500_000);
    }
}
