//! One number for a whole tree: equal exactly when two trees can't be told apart by what this counts.
//!
//! Counted are names with their depth, types, modes, owners, modification times to the nanosecond, link targets, device
//! numbers, contents, extended attributes, and which names are one file. Not counted are inode
//! numbers, last-read and change times, sizes of folders, and where holes lie.

use std::fmt;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;
use sha2::{Digest as _, Sha256};

use super::content::Blocks;
use super::digest_form::Form;
use super::error::{Context as _, OnProgress, Progress, Result};
use super::walk::{self, Item, Links};

/// A SHA-256 over a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TreeDigest([u8; 32], Form);

impl fmt::Display for TreeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1.mark())?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The digest of a state.
pub fn digest(view: &View, progress: OnProgress<'_>) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(Form::Names, progress);
    walk::state(view, &mut |item: &Item<'_>| hasher.add(item))?;
    Ok(hasher.finish())
}

/// The digest of a plain folder, a mount point for one: the same function over what is there.
pub fn digest_dir(root: &Path, progress: OnProgress<'_>) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(Form::Names, progress);
    walk::plain(root, &mut |item: &Item<'_>| hasher.add(item))?;
    Ok(hasher.finish())
}

/// The digest of a layer as it lies, marks included, in the form of the one that is `known` of it. Which whiteouts
/// are links to one another does not count.
pub fn digest_layer(
    root: &Path,
    known: Option<&str>,
    progress: OnProgress<'_>,
) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(known.map_or(Form::Names, Form::of), progress);
    hasher.marks = true;
    walk::plain(root, &mut |item: &Item<'_>| hasher.add(item))?;
    Ok(hasher.finish())
}

struct Hasher<'a> {
    form: Form,
    sha: Sha256,
    /// Whiteouts are marks.
    marks: bool,
    links: Links<u64>,
    done: Progress,
    progress: OnProgress<'a>,
}

impl<'a> Hasher<'a> {
    fn new(form: Form, progress: OnProgress<'a>) -> Self {
        Self {
            form,
            sha: Sha256::new_with_prefix(form.prefix("tree")),
            marks: false,
            links: Links::default(),
            done: Progress::default(),
            progress,
        }
    }

    fn number(&mut self, number: u64) {
        self.sha.update(number.to_le_bytes());
    }

    /// Adds bytes with their length, so that no two sequences of fields look the same.
    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.sha.update(bytes);
    }

    fn add(&mut self, item: &Item<'_>) -> Result<()> {
        let own = self.done.entries;
        self.done.entries += 1;
        self.form.add_name(item, &mut self.sha);
        if !(self.marks && item.is_whiteout()?)
            && let Some(&first) = self.links.first(&item.stat, || own)
        {
            self.bytes(b"link");
            self.number(first);
            return Ok(());
        }
        let stat = &item.stat;
        self.number(stat.mode.into());
        self.number(stat.uid.into());
        self.number(stat.gid.into());
        self.number(stat.mtime.secs.cast_unsigned());
        self.number(stat.mtime.nanos.into());
        let xattrs = item.xattrs()?;
        self.number(xattrs.len() as u64);
        for (name, value) in &xattrs {
            self.bytes(name);
            self.bytes(value);
        }
        match item.kind() {
            FileKind::Regular => self.content(item)?,
            FileKind::Symlink => self.bytes(&item.target()?),
            FileKind::CharDevice | FileKind::BlockDevice => self.number(stat.rdev),
            FileKind::Directory | FileKind::Fifo | FileKind::Socket => {}
        }
        (self.progress)(self.done);
        Ok(())
    }

    fn content(&mut self, item: &Item<'_>) -> Result<()> {
        let size = item.stat.size;
        self.number(size);
        if size > 0 {
            let mut blocks = Blocks::new(item.open()?, size);
            while let Some((at, block)) = blocks.next().context("can't read", item.path)? {
                self.sha.update(at.to_le_bytes());
                self.sha.update(block);
            }
        }
        self.number(u64::MAX);
        self.done.bytes += size;
        Ok(())
    }

    fn finish(self) -> TreeDigest {
        (self.progress)(self.done);
        TreeDigest(self.sha.finalize().into(), self.form)
    }
}
