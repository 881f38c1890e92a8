//! Digests of trees.
//!
//! A digest covers names and their depth, types, modes, owners, modification times, link targets, device numbers,
//! contents, xattrs, and hard links. It does not cover inode numbers, access and change times, sizes of directories,
//! and holes.

use std::fmt;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;
use sha2::{Digest as _, Sha256};

use super::content::Blocks;
use super::digest_form::Form;
use super::error::{Context as _, OnProgress, Progress, Result};
use super::walk::{self, Item, Links};

/// A SHA-256 digest of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TreeDigest([u8; 32], Form);

impl fmt::Display for TreeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1.mark())?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Returns the digest of a state.
pub fn digest(view: &View, progress: OnProgress<'_>) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(Form::Names, progress);
    walk::state(view, &mut |item: &Item<'_>| hasher.add(item))?;
    Ok(hasher.finish())
}

/// Returns the digest of a plain directory, for example a mount point.
pub fn digest_dir(root: &Path, progress: OnProgress<'_>) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(Form::Names, progress);
    walk::plain(root, &mut |item: &Item<'_>| hasher.add(item))?;
    Ok(hasher.finish())
}

/// Returns the digest of a layer as it is on disk, markers included, in the form of the digest that is `known` of it.
/// It does not depend on which whiteouts are hard links to each other.
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
    /// Whether whiteouts are markers.
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

    /// Adds bytes with their length, so that different sequences of fields differ.
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
