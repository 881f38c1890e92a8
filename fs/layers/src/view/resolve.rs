//! What a name means over the layers: the one place that says so. Pure.
//!
//! Lookup, listing, removal, rename and flattening all ask this. The rules are those of the kernel's
//! overlayfs: the first layer that has the name decides its kind; a whiteout or an opaque folder ends
//! the search; folders merge; a metacopy file goes on until the content is found; a redirect changes
//! under which name the layers further down are asked.

use crate::format::Redirect;
use crate::layer::Seen;
use crate::name::Name;

/// Under which name the next layer is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// This name in the folder that the parent is there.
    InParent(Name),
    /// This path from the layer's root, without a leading slash.
    Path(Box<[u8]>),
}

/// What has been found so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// No layer had the name yet.
    Nothing,
    /// The name is hidden.
    Whiteout,
    /// A folder; further layers' folders merge.
    Dir,
    /// A file whose content is still to be found.
    Metacopy,
    /// A complete file.
    File,
}

/// What a layer's answer means for the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The object found here is the top of the result.
    Top,
    /// A folder that merges below the top.
    Merge,
    /// A file that holds the content of the metacopy above.
    Data,
    /// A further metacopy on the way to the content: nothing of it shows.
    Pass,
    /// Nothing of it shows.
    Nothing,
}

/// The search for one name, layer by layer from the top.
#[derive(Clone, Debug)]
pub struct Fold {
    kind: Kind,
    stopped: bool,
    target: Target,
}

impl Fold {
    /// A search for `name`.
    pub fn new(name: Name) -> Self {
        Self {
            kind: Kind::Nothing,
            stopped: false,
            target: Target::InParent(name),
        }
    }

    /// What was found.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Under which name the next layer is to be asked; `None` when no further layer counts.
    pub fn target(&self) -> Option<&Target> {
        (!self.stopped).then_some(&self.target)
    }

    /// Takes one layer's answer.
    pub fn step(&mut self, seen: &Seen) -> Use {
        match (self.kind, seen) {
            (_, Seen::Absent) => Use::Nothing,
            (Kind::Nothing, Seen::Whiteout) => {
                self.kind = Kind::Whiteout;
                self.stopped = true;
                Use::Nothing
            }
            (Kind::Nothing | Kind::Dir, Seen::Dir { opaque, redirect }) => {
                let first = self.kind == Kind::Nothing;
                self.kind = Kind::Dir;
                self.stopped = *opaque;
                self.follow(redirect.as_ref());
                if first { Use::Top } else { Use::Merge }
            }
            (Kind::Nothing | Kind::Metacopy, Seen::File { metacopy, redirect }) => {
                let first = self.kind == Kind::Nothing;
                self.kind = if *metacopy {
                    Kind::Metacopy
                } else {
                    Kind::File
                };
                self.stopped = !*metacopy;
                self.follow(redirect.as_ref());
                match (first, metacopy) {
                    (true, _) => Use::Top,
                    (false, true) => Use::Pass,
                    (false, false) => Use::Data,
                }
            }
            // A file below a folder, a folder below a metacopy, a whiteout below either.
            _ => {
                self.stopped = true;
                Use::Nothing
            }
        }
    }

    /// Ends the search: something on the way to a redirect's target hides it.
    pub fn stop(&mut self) {
        if self.kind == Kind::Nothing {
            self.kind = Kind::Whiteout;
        }
        self.stopped = true;
    }

    /// Asks the layers further down under another path: a folder on the way has a redirect of its own.
    pub fn retarget(&mut self, path: Box<[u8]>) {
        self.target = Target::Path(path);
    }

    fn follow(&mut self, redirect: Option<&Redirect>) {
        match (redirect, &mut self.target) {
            (None, _) => {}
            (Some(Redirect::Path(path)), target) => *target = Target::Path(path.clone()),
            (Some(Redirect::Sibling(name)), Target::InParent(own)) => *own = name.clone(),
            (Some(Redirect::Sibling(name)), Target::Path(path)) => {
                *path = replace_last(path, name).into();
            }
        }
    }
}

/// `path` with another last component.
pub fn replace_last(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(slash) => [path.get(..=slash).unwrap_or_default(), name].concat(),
        None => name.to_vec(),
    }
}

/// `path` with one more component; an empty path is the root.
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

    fn every_mark() -> Vec<Seen> {
        let redirects = [
            None,
            Some(Redirect::Sibling(Name::new("s").unwrap())),
            Some(Redirect::Path(b"p/q"[..].into())),
        ];
        let mut all = vec![Seen::Absent, Seen::Whiteout];
        for redirect in redirects {
            for flag in [false, true] {
                all.push(Seen::Dir {
                    opaque: flag,
                    redirect: redirect.clone(),
                });
                all.push(Seen::File {
                    metacopy: flag,
                    redirect: redirect.clone(),
                });
            }
        }
        all
    }

    /// The rules once more, said differently: over the whole sequence at once instead of step by step.
    fn expected(marks: &[Seen]) -> (Kind, Vec<usize>) {
        let Some(first) = marks.iter().position(|seen| *seen != Seen::Absent) else {
            return (Kind::Nothing, vec![]);
        };
        match &marks[first] {
            Seen::Absent => unreachable!(),
            Seen::Whiteout => (Kind::Whiteout, vec![]),
            Seen::File {
                metacopy: false, ..
            } => (Kind::File, vec![first]),
            Seen::File { metacopy: true, .. } => {
                for (at, seen) in marks.iter().enumerate().skip(first + 1) {
                    match seen {
                        Seen::Absent | Seen::File { metacopy: true, .. } => {}
                        Seen::File {
                            metacopy: false, ..
                        } => return (Kind::File, vec![first, at]),
                        Seen::Whiteout | Seen::Dir { .. } => break,
                    }
                }
                (Kind::Metacopy, vec![first])
            }
            Seen::Dir { .. } => {
                let mut merged = vec![];
                for (at, seen) in marks.iter().enumerate().skip(first) {
                    match seen {
                        Seen::Absent => {}
                        Seen::Dir { opaque, .. } => {
                            merged.push(at);
                            if *opaque {
                                break;
                            }
                        }
                        Seen::Whiteout | Seen::File { .. } => break,
                    }
                }
                (Kind::Dir, merged)
            }
        }
    }

    #[test]
    fn every_sequence_of_marks_in_up_to_three_layers() {
        let marks = every_mark();
        let mut sequences: Vec<Vec<Seen>> = vec![vec![]];
        let mut tried = 0;
        for _ in 0..3 {
            sequences = sequences
                .iter()
                .flat_map(|sequence| {
                    marks.iter().map(|mark| {
                        let mut longer = sequence.clone();
                        longer.push(mark.clone());
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
    fn redirects_change_what_is_asked_next() {
        let dir = |redirect| Seen::Dir {
            opaque: false,
            redirect,
        };
        let sibling = |name: &str| Some(Redirect::Sibling(Name::new(name).unwrap()));
        let path = |path: &[u8]| Some(Redirect::Path(path.into()));
        let mut fold = Fold::new(Name::new("n").unwrap());
        fold.step(&dir(sibling("m")));
        assert_eq!(
            fold.target(),
            Some(&Target::InParent(Name::new("m").unwrap()))
        );
        fold.step(&dir(path(b"a/b")));
        assert_eq!(fold.target(), Some(&Target::Path(b"a/b"[..].into())));
        fold.step(&dir(sibling("c")));
        assert_eq!(fold.target(), Some(&Target::Path(b"a/c"[..].into())));
        fold.step(&Seen::Absent);
        assert_eq!(fold.target(), Some(&Target::Path(b"a/c"[..].into())));
        fold.step(&Seen::Whiteout);
        assert_eq!(fold.target(), None);
        assert_eq!(fold.kind(), Kind::Dir);
    }

    #[test]
    fn paths() {
        assert_eq!(replace_last(b"a", b"x"), b"x");
        assert_eq!(replace_last(b"a/b", b"x"), b"a/x");
        assert_eq!(join(b"", b"x"), b"x");
        assert_eq!(join(b"a/b", b"x"), b"a/b/x");
    }
}
