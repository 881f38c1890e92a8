//! Reading ahead for a program that walks a tree.
//!
//! While such a program processes one listing, the thread that answered can prepare the next one: that of the first
//! subdirectory, or of the next sibling, in the order of the listing. docs/decisions/0041 has the reasons.

use std::collections::VecDeque;
use std::sync::Arc;

use cowl_layers::error::Result;
use cowl_layers::layer::LayerDir;
use cowl_layers::locks::Mutex;
use cowl_layers::name::Name;
use cowl_layers::sys;
use cowl_layers::sys::stat::FileKind;

use super::{DirEntry, Listing, ReadDir, without_cookies};
use crate::inode::Inode;

/// The maximum number of listed directories that are remembered.
const MAX_LISTED: usize = 16;
/// The maximum number of subdirectories of each of them that are remembered.
const MAX_SUBDIRS: usize = 1024;
/// The maximum number of expected directories.
const MAX_EXPECTED: usize = 4;
/// The number of wrong predictions in a row after which nothing is read ahead until a prediction is right.
const MAX_MISSES: u32 = 4;
/// The maximum size of a directory that is read ahead: the sum of the sizes that stat(2) reports in its layers.
/// Reading a directory cannot be interrupted, so a large one would delay the next request.
const MAX_SIZE: u64 = 64 << 10;
/// The maximum number of names of a directory that is read ahead, which the size does not limit on all file systems.
const MAX_NAMES: usize = 4096;
/// The number of names that are resolved between two checks for a request.
const STEP: usize = 6;

/// A directory: the inode number of its parent, and its name.
type DirName = (u64, Name);

/// A directory that was listed.
#[derive(Debug)]
struct ListedDir {
    ino: u64,
    /// `None` for the root.
    name: Option<DirName>,
    /// The names of its subdirectories, in the order of the listing.
    subdirs: Box<[Name]>,
    /// The index of the subdirectory that was found last.
    at: usize,
}

/// The next part of the work.
#[derive(Debug)]
enum Ahead {
    /// Read the directory.
    Dir(DirName),
    /// Resolve the names in the directory.
    Names(Arc<[Arc<LayerDir>]>, std::vec::IntoIter<Name>),
}

/// The order in which programs list directories, and the directory to be read ahead.
#[derive(Debug, Default)]
pub(crate) struct Walk(Mutex<WalkState>);

#[derive(Debug, Default)]
struct WalkState {
    /// The directories that were listed, the last one at the end.
    listed: VecDeque<ListedDir>,
    expected: VecDeque<DirName>,
    /// The number of expected directories in a row that were not listed.
    misses: u32,
    ahead: Option<Ahead>,
}

impl Walk {
    /// Drops everything.
    pub(crate) fn clear(&self) {
        *self.0.lock() = WalkState::default();
    }

    /// Continues with `ahead`, unless another directory is to be read ahead by now.
    fn resume(&self, ahead: Ahead) {
        self.0.lock().ahead.get_or_insert(ahead);
    }
}

impl WalkState {
    /// Notes that a directory was listed.
    fn note(&mut self, dir: ListedDir) {
        let expected = |other: &DirName| dir.name.as_ref() == Some(other);
        let is_expected = self.expected.iter().any(expected);
        let parent = dir.name.as_ref().map(|(parent, _)| *parent);
        let is_walk = is_expected || self.listed.iter().any(|other| Some(other.ino) == parent);
        if is_expected {
            self.misses = 0;
            self.expected
                .retain(|other| dir.name.as_ref() != Some(other));
        }
        self.listed.retain(|other| other.ino != dir.ino);
        if self.listed.len() >= MAX_LISTED {
            self.listed.pop_front();
        }
        self.push(dir);
        self.ahead = None;
        if is_walk && let Some(next) = self.next() {
            self.expect(next);
        }
    }

    /// Appends a directory, preceded by those above it, which are thus remembered longer than their other
    /// subdirectories.
    fn push(&mut self, dir: ListedDir) {
        let mut chain = vec![dir];
        while let Some(ListedDir {
            name: Some((parent, _)),
            ..
        }) = chain.last()
            && let Some(at) = self.listed.iter().position(|dir| dir.ino == *parent)
        {
            chain.extend(self.listed.remove(at));
        }
        self.listed.extend(chain.into_iter().rev());
    }

    /// Returns the directory that a walk lists after the last one.
    fn next(&mut self) -> Option<DirName> {
        let last = self.listed.back()?;
        let is_listed = |parent: u64, name: &Name| {
            let is_name = |(ino, known): &DirName| *ino == parent && known == name;
            self.listed
                .iter()
                .any(|dir| dir.name.as_ref().is_some_and(is_name))
        };
        let first = last.subdirs.iter().find(|name| !is_listed(last.ino, name));
        if let Some(first) = first {
            return Some((last.ino, first.clone()));
        }
        let mut place = last.name.clone();
        let mut found = None;
        // Each listed directory is above the last one at most once, which bounds the loop.
        for _ in 0..self.listed.len() {
            let (ino, name) = place?;
            let above = self.listed.iter().position(|dir| dir.ino == ino)?;
            let dir = self.listed.get(above)?;
            let at = position(&dir.subdirs, &name, dir.at)?;
            let mut later = (dir.subdirs.iter()).enumerate().skip(at + 1);
            if let Some((at, next)) = later.find(|(_, name)| !is_listed(ino, name)) {
                found = Some((above, at, (ino, next.clone())));
                break;
            }
            place = dir.name.clone();
        }
        let (above, at, next) = found?;
        if let Some(dir) = self.listed.get_mut(above) {
            dir.at = at;
        }
        Some(next)
    }

    /// Notes that a directory will probably be listed, and reads it ahead.
    fn expect(&mut self, next: DirName) {
        if self.expected.contains(&next) {
            return;
        }
        if self.expected.len() >= MAX_EXPECTED {
            self.expected.pop_front();
            self.misses = self.misses.saturating_add(1);
        }
        if self.misses < MAX_MISSES {
            self.ahead = Some(Ahead::Dir(next.clone()));
        }
        self.expected.push_back(next);
    }
}

/// Returns the index of a name. It is usually near `from`.
fn position(names: &[Name], name: &Name, from: usize) -> Option<usize> {
    let mut order = (from..names.len()).chain(0..from);
    order.find(|at| names.get(*at) == Some(name))
}

impl ReadDir<'_> {
    /// Notes that a directory is being listed from its beginning.
    pub(super) fn note_listing(&self, inode: &Arc<Inode>, listing: &Listing) -> Result<()> {
        if self.names.cx.options.live_layers {
            return Ok(());
        }
        let alias = inode.dir()?.alias;
        let is_subdir = |entry: &&DirEntry| entry.kind() == FileKind::Directory && !entry.is_dots();
        let subdirs = listing.iter().filter(is_subdir).take(MAX_SUBDIRS);
        self.walk.0.lock().note(ListedDir {
            ino: inode.ino(),
            name: alias.map(|alias| (alias.parent.ino(), alias.name)),
            subdirs: subdirs.map(|entry| entry.name().clone()).collect(),
            at: 0,
        });
        Ok(())
    }

    /// Prepares a part of the listing that a walk requests next. Returns whether there is more to prepare.
    pub(crate) fn read_ahead(&self) -> Result<bool> {
        let Some(ahead) = self.walk.0.lock().ahead.take() else {
            return Ok(false);
        };
        let next = match ahead {
            Ahead::Dir((parent, name)) => self.read_dir_ahead(parent, &name)?,
            Ahead::Names(locs, names) => self.resolve_ahead(locs, names)?,
        };
        let has_more = next.is_some();
        if let Some(next) = next {
            self.walk.resume(next);
        }
        Ok(has_more)
    }

    /// Reads a directory that is only in lower layers.
    fn read_dir_ahead(&self, parent: u64, name: &Name) -> Result<Option<Ahead>> {
        let Some(parent) = self.names.inodes.get(parent) else {
            return Ok(None);
        };
        let Some(hit) = self.names.lookup_with_stat(&parent, name)? else {
            return Ok(None);
        };
        if !hit.inode.is_dir() {
            return Ok(None);
        }
        let Some(locs) = hit.inode.locations()? else {
            return Ok(None);
        };
        if self.names.cx.stack.below_upper(&locs).len() < locs.len() {
            return Ok(None);
        }
        let mut size = 0_u64;
        for loc in locs.iter() {
            let stat = sys::stat::stat_fd(&*loc.fd()?)?;
            size = size.saturating_add(stat.size);
        }
        if size > MAX_SIZE {
            return Ok(None);
        }
        let merged = self.names.list_names(&locs)?;
        if merged.len() > MAX_NAMES {
            return Ok(None);
        }
        let mut entries: Vec<DirEntry> = without_cookies(merged).collect();
        self.cookies.arrange(hit.inode.ino(), &mut entries);
        let names: Vec<Name> = entries.iter().map(|entry| entry.name().clone()).collect();
        let entries = entries.into_iter().map(|entry| entry.merged);
        self.names.prefetched.add_dir(&locs, entries.collect());
        Ok(Some(Ahead::Names(locs, names.into_iter())))
    }

    /// Resolves some names in a directory.
    fn resolve_ahead(
        &self,
        locs: Arc<[Arc<LayerDir>]>,
        mut names: std::vec::IntoIter<Name>,
    ) -> Result<Option<Ahead>> {
        for _ in 0..STEP {
            let Some(name) = names.next() else {
                return Ok(None);
            };
            if !self.names.prefetch(&locs, name)? {
                return Ok(None);
            }
        }
        Ok(Some(Ahead::Names(locs, names)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn dir(ino: u64, above: Option<(u64, &str)>, subdirs: &[&str]) -> ListedDir {
        ListedDir {
            ino,
            name: above.map(|(parent, text)| (parent, name(text))),
            subdirs: subdirs.iter().map(|text| name(text)).collect(),
            at: 0,
        }
    }

    fn ahead(walk: &WalkState) -> Option<(u64, String)> {
        match walk.ahead.as_ref()? {
            Ahead::Dir((parent, name)) => {
                Some((*parent, String::from_utf8(name.to_vec()).unwrap()))
            }
            Ahead::Names(..) => None,
        }
    }

    #[test]
    fn a_walk_goes_to_the_first_subdirectory_or_to_the_next_sibling() {
        let mut walk = WalkState::default();
        walk.note(dir(1, None, &["a", "b"]));
        assert_eq!(ahead(&walk), None, "it is no walk yet");
        for (listed, next) in [
            (dir(2, Some((1, "a")), &["c", "d"]), Some((2, "c"))),
            (dir(3, Some((2, "c")), &[]), Some((2, "d"))),
            (dir(4, Some((2, "d")), &[]), Some((1, "b"))),
            (dir(5, Some((1, "b")), &[]), None),
        ] {
            walk.note(listed);
            assert_eq!(ahead(&walk), next.map(|(ino, name)| (ino, name.to_owned())));
        }
    }

    #[test]
    fn directories_that_another_thread_has_listed_are_skipped() {
        let mut walk = WalkState::default();
        walk.note(dir(1, None, &["a", "b", "c", "d"]));
        walk.note(dir(3, Some((1, "b")), &[]));
        walk.note(dir(4, Some((1, "c")), &[]));
        walk.note(dir(2, Some((1, "a")), &[]));
        assert!(walk.expected.contains(&(1, name("d"))));
    }

    #[test]
    fn a_parent_is_remembered_longer_than_its_subdirectories() {
        let names: Vec<String> = (0..200).map(|number| format!("{number:03}")).collect();
        let subdirs: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut walk = WalkState::default();
        walk.note(dir(1, None, &subdirs));
        for (ino, pair) in (2..).zip(names.windows(2)) {
            walk.note(dir(ino, Some((1, &pair[0])), &[]));
            assert_eq!(ahead(&walk), Some((1, pair[1].clone())));
        }
        assert!(walk.listed.len() <= MAX_LISTED);
    }

    #[test]
    fn other_orders_end_the_reading_until_an_expected_directory_is_listed() {
        let names: Vec<String> = (0..100).map(|number| format!("{number:03}")).collect();
        let subdirs: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut walk = WalkState::default();
        walk.note(dir(1, None, &subdirs));
        let backwards = (2..).zip(names.iter().rev().step_by(2));
        for (ino, listed) in backwards.take(20) {
            walk.note(dir(ino, Some((1, listed)), &[]));
        }
        assert_eq!(ahead(&walk), None);
        let (parent, expected) = walk.expected.back().cloned().unwrap();
        let text = String::from_utf8(expected.to_vec()).unwrap();
        walk.note(dir(50, Some((parent, &text)), &["new"]));
        assert_eq!(ahead(&walk), Some((50, "new".to_owned())));
    }
}
