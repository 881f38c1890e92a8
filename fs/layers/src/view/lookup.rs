//! Lookup of names in the layers of a stack, by the rules of [`super::resolve`].

use std::sync::Arc;

use super::names::PartialIndex;
use super::resolve::{Fold, MergeKind, NextPath, Use, join, replace_last};
use super::{DirNode, FileNode, Found, LayerPath, Loc, View};
use crate::error::{Error, Result};
use crate::format::Redirect;
use crate::layer::{Layer, LayerDir, LayerObject, Markers, Probe, probe};
use crate::name::Name;
use crate::sys::stat::FileKind;

/// An object that was found in one layer.
struct LayerHit {
    dir: Arc<LayerDir>,
    name: Name,
    probe: Probe,
}

#[derive(Default)]
struct Gathered {
    dirs: Vec<Arc<LayerDir>>,
    top: Option<LayerHit>,
    data: Option<LayerHit>,
}

impl View {
    /// Looks up `name` in `dir`.
    pub fn lookup(&self, dir: &DirNode, name: &Name) -> Result<Found> {
        self.lookup_below(&dir.locs, dir.below.as_ref(), name, None)
    }

    /// Looks up `name` in a merged directory, given as its directories in the layers of a complete stack.
    ///
    /// The directories that `known` covers are accessed only if they contain the name.
    pub fn lookup_at(
        &self,
        locs: &[Arc<LayerDir>],
        name: &Name,
        known: Option<PartialIndex<'_>>,
    ) -> Result<Found> {
        self.lookup_below(locs, None, name, known)
    }

    fn lookup_below(
        &self,
        locs: &[Arc<LayerDir>],
        below: Option<&LayerPath>,
        name: &Name,
        known: Option<PartialIndex<'_>>,
    ) -> Result<Found> {
        let mut fold = Fold::new(name.clone());
        let mut got = Gathered::default();
        let mut next = 0;
        // A redirect with a path applies to all layers below, including those in which `dir` does not exist.
        let mut layer_at = 0;
        let mut last = None;
        while let Some(target) = fold.target() {
            match target {
                NextPath::InParent(name) => {
                    let at = known.map_or(Some(next), |known| known.next(next, name));
                    let Some((at, loc)) = at.and_then(|at| Some((at, locs.get(at)?))) else {
                        break;
                    };
                    next = at + 1;
                    last = Some(loc);
                    let hit = probe(loc, name, self.markers(loc.layer()))?;
                    let hit = hit.map(|probe| LayerHit {
                        dir: loc.clone(),
                        name: name.clone(),
                        probe,
                    });
                    got.take(&mut fold, hit);
                }
                NextPath::Path(path) => {
                    // Determine the position only here: with many layers, the search would dominate a lookup.
                    if let Some(loc) = last.take() {
                        layer_at = self.position(loc.layer())? + 1;
                    }
                    let Some(layer) = self.layers.get(layer_at) else {
                        break;
                    };
                    layer_at += 1;
                    let path = path.clone();
                    let hit = self.walk(layer, &path, &mut fold)?;
                    got.take(&mut fold, hit);
                }
            }
        }
        if let Some(NextPath::Path(path)) = fold.target().cloned()
            && fold.kind() == MergeKind::Metacopy
        {
            for layer in &self.data {
                if let Some(hit) = find_data(layer, &path)? {
                    got.take(&mut fold, Some(hit));
                    break;
                }
            }
        }
        self.finish(below, &fold, got)
    }

    fn position(&self, layer: &Arc<Layer>) -> Result<usize> {
        self.layers
            .iter()
            .position(|own| Arc::ptr_eq(own, layer))
            .ok_or(Error::Damaged(
                "a directory of a layer that is not in the stack",
            ))
    }

    /// Looks up `path` in one layer.
    ///
    /// If a directory on the path is opaque, the search ends with this layer. If one has a redirect, it changes the
    /// path for the layers below.
    fn walk(&self, layer: &Arc<Layer>, path: &[u8], fold: &mut Fold) -> Result<Option<LayerHit>> {
        let mut dir = layer.root_dir();
        let mut below = path.to_vec();
        let mut stop_after = false;
        let parts: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
        let Some((last, parents)) = parts.split_last() else {
            return Ok(None);
        };
        for (depth, part) in parents.iter().enumerate() {
            let Some(found) = probe(&dir, part, self.markers(layer))? else {
                if stop_after {
                    fold.stop();
                }
                return Ok(None);
            };
            let LayerObject::Dir { opaque, redirect } = &found.object else {
                fold.stop();
                return Ok(None);
            };
            // A redirect with a path also applies below an opaque directory, as in the kernel.
            stop_after = match redirect {
                Some(Redirect::Path(_)) => *opaque,
                Some(Redirect::Sibling(_)) | None => stop_after || *opaque,
            };
            if let Some(redirect) = redirect {
                below = redirected(&below, depth, parts.len(), redirect);
                fold.retarget(below.clone().into());
            }
            dir = LayerDir::child(&dir, Name::new(part)?, found.stat.ino);
        }
        let found = probe(&dir, last, self.markers(layer))?;
        if stop_after && found.is_none() {
            fold.stop();
        }
        let Some(found) = found else { return Ok(None) };
        let name = Name::new(last)?;
        let mut adjusted = found;
        if stop_after
            && let LayerObject::Dir { opaque, redirect } = &mut adjusted.object
            && !matches!(redirect, Some(Redirect::Path(_)))
        {
            *opaque = true;
        }
        Ok(Some(LayerHit {
            dir,
            name,
            probe: adjusted,
        }))
    }

    fn finish(&self, parent: Option<&LayerPath>, fold: &Fold, got: Gathered) -> Result<Found> {
        let below = fold.target().filter(|_| self.is_part());
        let below = below.and_then(|target| match target {
            NextPath::InParent(name) => {
                let above = parent?;
                Some(above.join(name))
            }
            NextPath::Path(path) => Some(LayerPath::from(&path[..])),
        });

        let Some(top) = got.top else {
            return Ok(match fold.kind() {
                MergeKind::Whiteout => Found::Whiteout,
                _ => Found::Absent,
            });
        };
        let layer = top.dir.layer().clone();
        let ino = self.number(&layer, &top.probe.stat, top.probe.number);
        let mut stat = top.probe.stat;
        let redirect = match &top.probe.object {
            LayerObject::Dir { redirect, .. } | LayerObject::File { redirect, .. } => {
                redirect.clone()
            }
            LayerObject::Absent | LayerObject::Whiteout => None,
        };
        if fold.kind() == MergeKind::Dir {
            return Ok(Found::Dir(DirNode {
                locs: got.dirs,
                below,
                redirect,
                stat,
                ino,
            }));
        }
        if let Some(data) = &got.data {
            // A metacopy has the size of the content, but not its blocks.
            stat.blocks = data.probe.stat.blocks;
        }
        if let Some(data) = &got.data
            && data.probe.stat.kind() != FileKind::Regular
        {
            // An untrusted redirect can lead to any object in its layer, for example a device node of the host.
            return Err(Error::Damaged(
                "a metacopy whose content is not a regular file",
            ));
        }
        let data_missing = fold.kind() == MergeKind::Metacopy;
        if data_missing && !self.is_part() {
            return Err(Error::Damaged("a metacopy whose content is in no layer"));
        }
        Ok(Found::File(FileNode {
            loc: top.loc(),
            data: got.data.map(|hit| hit.loc()),
            data_missing,
            below: below.filter(|_| data_missing),
            redirect,
            stat,
            ino,
        }))
    }
}

impl Gathered {
    fn take(&mut self, fold: &mut Fold, hit: Option<LayerHit>) {
        let Some(hit) = hit else { return };
        let is_dir = matches!(hit.probe.object, LayerObject::Dir { .. });
        match fold.step(&hit.probe.object) {
            Use::Top => {
                if is_dir {
                    self.dirs.push(hit.as_dir());
                }
                self.top = Some(hit);
            }
            Use::Merge => self.dirs.push(hit.as_dir()),
            Use::Data => self.data = Some(hit),
            Use::Pass | Use::Nothing => {}
        }
    }
}

impl LayerHit {
    fn as_dir(&self) -> Arc<LayerDir> {
        LayerDir::child(&self.dir, self.name.clone(), self.probe.stat.ino)
    }

    fn loc(&self) -> Loc {
        Loc {
            dir: self.dir.clone(),
            name: self.name.clone(),
        }
    }
}

/// Looks up the regular file `path` in a data-only layer. Ignores markers, and does not follow links.
fn find_data(layer: &Arc<Layer>, path: &[u8]) -> Result<Option<LayerHit>> {
    let mut dir = layer.root_dir();
    let mut parts = path.split(|&byte| byte == b'/').peekable();
    while let Some(part) = parts.next() {
        let name = Name::new(part)?;
        let Some(found) = probe(&dir, &name, Markers::Ignored)? else {
            return Ok(None);
        };
        match (parts.peek().is_some(), found.stat.kind()) {
            (true, FileKind::Directory) => dir = LayerDir::child(&dir, name, found.stat.ino),
            (false, FileKind::Regular) => {
                return Ok(Some(LayerHit {
                    dir,
                    name,
                    probe: found,
                }));
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// Applies the redirect of the component at `depth` to `path`, which originally had `total` components.
///
/// Earlier redirects may have changed the number of components before it, so the position is counted from the end.
fn redirected(path: &[u8], depth: usize, total: usize, redirect: &Redirect) -> Vec<u8> {
    let parts: Vec<&[u8]> = path.split(|&byte| byte == b'/').collect();
    let after = total - depth - 1;
    let cut = parts.len().saturating_sub(after);
    let (front, back) = parts.split_at(cut);
    let front = match redirect {
        Redirect::Path(path) => path.to_vec(),
        Redirect::Sibling(name) => replace_last(&front.join(&b'/'), name),
    };
    back.iter().fold(front, |path, part| join(&path, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirect_of_a_parent_changes_only_the_prefix() {
        let sibling = Redirect::Sibling(Name::new("x").unwrap());
        let path = Redirect::Path(b"q/r/s"[..].into());
        assert_eq!(redirected(b"a/b/c", 0, 3, &sibling), b"x/b/c");
        assert_eq!(redirected(b"a/b/c", 1, 3, &sibling), b"a/x/c");
        assert_eq!(redirected(b"a/b/c", 1, 3, &path), b"q/r/s/c");
        // The first redirect added components. The second one is that of the original second component.
        assert_eq!(redirected(b"q/r/s/b/c", 1, 3, &sibling), b"q/r/s/x/c");
    }
}
