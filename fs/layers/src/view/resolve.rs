//! The merge rules: the meaning of a name in a stack of layers. Pure.
//!
//! Lookup, listing, removal, rename and flattening all use this implementation. The rules are those of kernel
//! overlayfs: the topmost layer that contains the name determines its type; a whiteout or an opaque directory ends the
//! search; directories are merged; a metacopy continues the search until its content is found; a redirect changes the
//! path that is looked up in the layers below.

use crate::format::Redirect;
use crate::layer::LayerObject;
use crate::name::Name;

/// The path to look up in the next layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextPath {
    /// A name in the parent directory, as far as that exists in the layer.
    InParent(Name),
    /// A path from the layer's root, without a leading slash.
    Path(Box<[u8]>),
}

/// The result of the search so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MergeKind {
    /// No layer contained the name yet.
    Nothing,
    /// The name is hidden.
    Whiteout,
    /// A directory; those of further layers are merged with it.
    Dir,
    /// A file whose content was not found yet.
    Metacopy,
    /// A complete file.
    File,
}

/// The contribution of one layer to the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The topmost object, which determines the type and the attributes.
    Top,
    /// A directory that is merged with the topmost one.
    Merge,
    /// A file that contains the content of the metacopy above.
    Data,
    /// A further metacopy between the topmost one and the content; not visible.
    Pass,
    /// No contribution.
    Nothing,
}

/// The search for one name, layer by layer from the top.
#[derive(Clone, Debug)]
pub struct Fold {
    kind: MergeKind,
    stopped: bool,
    target: NextPath,
}

impl Fold {
    /// Starts a search for `name`.
    pub fn new(name: Name) -> Self {
        Self {
            kind: MergeKind::Nothing,
            stopped: false,
            target: NextPath::InParent(name),
        }
    }

    /// Returns the result so far.
    pub fn kind(&self) -> MergeKind {
        self.kind
    }

    /// Returns the path to look up in the next layer; `None` if the search has ended.
    pub fn target(&self) -> Option<&NextPath> {
        (!self.stopped).then_some(&self.target)
    }

    /// Adds the result of the lookup in the next layer.
    pub fn step(&mut self, seen: &LayerObject) -> Use {
        match (self.kind, seen) {
            (_, LayerObject::Absent) => Use::Nothing,
            (MergeKind::Nothing, LayerObject::Whiteout) => {
                self.kind = MergeKind::Whiteout;
                self.stopped = true;
                Use::Nothing
            }
            (MergeKind::Nothing | MergeKind::Dir, LayerObject::Dir { opaque, redirect }) => {
                let first = self.kind == MergeKind::Nothing;
                self.kind = MergeKind::Dir;
                self.stopped = *opaque;
                self.follow(redirect.as_ref());
                if first { Use::Top } else { Use::Merge }
            }
            (
                MergeKind::Nothing | MergeKind::Metacopy,
                LayerObject::File { metacopy, redirect },
            ) => {
                let first = self.kind == MergeKind::Nothing;
                self.kind = if *metacopy {
                    MergeKind::Metacopy
                } else {
                    MergeKind::File
                };
                self.stopped = !*metacopy;
                self.follow(redirect.as_ref());
                match (first, metacopy) {
                    (true, _) => Use::Top,
                    (false, true) => Use::Pass,
                    (false, false) => Use::Data,
                }
            }
            // A file below a directory, a directory below a metacopy, or a whiteout below either ends the search.
            _ => {
                self.stopped = true;
                Use::Nothing
            }
        }
    }

    /// Ends the search, because an object on the path to a redirect's target hides the target.
    pub fn stop(&mut self) {
        if self.kind == MergeKind::Nothing {
            self.kind = MergeKind::Whiteout;
        }
        self.stopped = true;
    }

    /// Changes the path for further layers, because a directory on the path has a redirect itself.
    pub fn retarget(&mut self, path: Box<[u8]>) {
        self.target = NextPath::Path(path);
    }

    fn follow(&mut self, redirect: Option<&Redirect>) {
        match (redirect, &mut self.target) {
            (None, _) => {}
            (Some(Redirect::Path(path)), target) => *target = NextPath::Path(path.clone()),
            (Some(Redirect::Sibling(name)), NextPath::InParent(own)) => *own = name.clone(),
            (Some(Redirect::Sibling(name)), NextPath::Path(path)) => {
                *path = replace_last(path, name).into();
            }
        }
    }
}

/// Replaces the last component of a path.
pub fn replace_last(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => [path.get(..=slash).unwrap_or_default(), name].concat(),
        None => name.to_vec(),
    }
}

/// Appends a component to a path; an empty path is the root.
pub fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() {
        name.to_vec()
    } else {
        [path, b"/", name].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_result() -> Vec<LayerObject> {
        let redirects = [
            None,
            Some(Redirect::Sibling(Name::new("s").unwrap())),
            Some(Redirect::Path(b"p/q"[..].into())),
        ];
        let mut all = vec![LayerObject::Absent, LayerObject::Whiteout];
        for redirect in redirects {
            for flag in [false, true] {
                all.push(LayerObject::Dir {
                    opaque: flag,
                    redirect: redirect.clone(),
                });
                all.push(LayerObject::File {
                    metacopy: flag,
                    redirect: redirect.clone(),
                });
            }
        }
        all
    }

    /// An independent implementation of the rules, over the whole sequence instead of step by step.
    fn expected(layers: &[LayerObject]) -> (MergeKind, Vec<usize>) {
        let Some(first) = layers.iter().position(|seen| *seen != LayerObject::Absent) else {
            return (MergeKind::Nothing, vec![]);
        };
        match &layers[first] {
            LayerObject::Absent => unreachable!(),
            LayerObject::Whiteout => (MergeKind::Whiteout, vec![]),
            LayerObject::File {
                metacopy: false, ..
            } => (MergeKind::File, vec![first]),
            LayerObject::File { metacopy: true, .. } => {
                for (at, seen) in layers.iter().enumerate().skip(first + 1) {
                    match seen {
                        LayerObject::Absent | LayerObject::File { metacopy: true, .. } => {}
                        LayerObject::File {
                            metacopy: false, ..
                        } => return (MergeKind::File, vec![first, at]),
                        LayerObject::Whiteout | LayerObject::Dir { .. } => break,
                    }
                }
                (MergeKind::Metacopy, vec![first])
            }
            LayerObject::Dir { .. } => {
                let mut merged = vec![];
                for (at, seen) in layers.iter().enumerate().skip(first) {
                    match seen {
                        LayerObject::Absent => {}
                        LayerObject::Dir { opaque, .. } => {
                            merged.push(at);
                            if *opaque {
                                break;
                            }
                        }
                        LayerObject::Whiteout | LayerObject::File { .. } => break,
                    }
                }
                (MergeKind::Dir, merged)
            }
        }
    }

    #[test]
    fn every_marker_sequence_in_three_layers_is_resolved() {
        let results = every_result();
        let mut sequences: Vec<Vec<LayerObject>> = vec![vec![]];
        let mut tried = 0;
        for _ in 0..3 {
            sequences = sequences
                .iter()
                .flat_map(|sequence| {
                    results.iter().map(|seen| {
                        let mut longer = sequence.clone();
                        longer.push(seen.clone());
                        longer
                    })
                })
                .collect();
            for sequence in &sequences {
                let mut fold = Fold::new(Name::new("n").unwrap());
                let mut used = vec![];
                for (at, seen) in sequence.iter().enumerate() {
                    if fold.target().is_none() {
                        break;
                    }
                    match fold.step(seen) {
                        Use::Top | Use::Merge | Use::Data => used.push(at),
                        Use::Pass | Use::Nothing => {}
                    }
                }
                assert_eq!((fold.kind(), used), expected(sequence), "{sequence:?}");
                tried += 1;
            }
        }
        assert_eq!(tried, 14 + 14 * 14 + 14 * 14 * 14);
    }

    #[test]
    fn redirects_change_the_next_path() {
        let dir = |redirect| LayerObject::Dir {
            opaque: false,
            redirect,
        };
        let sibling = |name: &str| Some(Redirect::Sibling(Name::new(name).unwrap()));
        let path = |path: &[u8]| Some(Redirect::Path(path.into()));
        let mut fold = Fold::new(Name::new("n").unwrap());
        fold.step(&dir(sibling("m")));
        assert_eq!(
            fold.target(),
            Some(&NextPath::InParent(Name::new("m").unwrap()))
        );
        fold.step(&dir(path(b"a/b")));
        assert_eq!(fold.target(), Some(&NextPath::Path(b"a/b"[..].into())));
        fold.step(&dir(sibling("c")));
        assert_eq!(fold.target(), Some(&NextPath::Path(b"a/c"[..].into())));
        fold.step(&LayerObject::Absent);
        assert_eq!(fold.target(), Some(&NextPath::Path(b"a/c"[..].into())));
        fold.step(&LayerObject::Whiteout);
        assert_eq!(fold.target(), None);
        assert_eq!(fold.kind(), MergeKind::Dir);
    }

    #[test]
    fn paths_are_resolved() {
        assert_eq!(replace_last(b"a", b"x"), b"x");
        assert_eq!(replace_last(b"a/b", b"x"), b"a/x");
        assert_eq!(join(b"", b"x"), b"x");
        assert_eq!(join(b"a/b", b"x"), b"a/b/x");
    }
}
