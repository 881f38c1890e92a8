//! Digests of trees.
//!
//! A digest covers names and their depth, types, modes, owners, modification times, link targets, device numbers,
//! contents, xattrs, and hard links. It does not cover inode numbers, access and change times, sizes of directories, or
//! the location of holes.

use std::fmt;
use std::path::Path;

use cowl_layers::sys::stat::FileKind;
use cowl_layers::view::View;
use sha2::{Digest as _, Sha256};

use super::attrs::Xattrs;
use super::content::Blocks;
use super::digest_form::Form;
use super::error::{Context as _, OnProgress, Progress, Result};
use super::walk::{self, Item, ItemAttributes, LinkMap};

/// A SHA-256 digest of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TreeDigest([u8; 32], Form);

impl fmt::Display for TreeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1.digest_prefix())?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Returns the digest of a state.
pub fn digest(view: &View, progress: OnProgress<'_>) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(Form::Names, progress);
    walk::visit_state(view, ItemAttributes::Original, &mut |item: &Item<'_>| {
        hasher.add_item(item)
    })?;
    Ok(hasher.finish())
}

/// Returns the digest of a plain directory, for example a mount point.
pub fn digest_dir(root: &Path, progress: OnProgress<'_>) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(Form::Names, progress);
    walk::visit_dir(root, &mut |item: &Item<'_>| hasher.add_item(item))?;
    Ok(hasher.finish())
}

/// Returns the digest of a layer as it is on disk, including markers.
///
/// It has the form of the `known` digest, with which it is to be compared. It does not depend on which whiteouts are
/// hard links to each other.
pub fn digest_layer(
    root: &Path,
    known: Option<&str>,
    progress: OnProgress<'_>,
) -> Result<TreeDigest> {
    let mut hasher = Hasher::new(known.map_or(Form::Names, Form::of_digest), progress);
    hasher.is_layer = true;
    walk::visit_dir(root, &mut |item: &Item<'_>| hasher.add_item(item))?;
    Ok(hasher.finish())
}

/// The state of a digest over the entries of a walk.
pub(super) struct Hasher<'a> {
    form: Form,
    sha: Sha256,
    /// Whether the tree is a layer, whose whiteouts are markers.
    is_layer: bool,
    links: LinkMap<u64>,
    done: Progress,
    progress: OnProgress<'a>,
}

impl<'a> Hasher<'a> {
    fn new(form: Form, progress: OnProgress<'a>) -> Self {
        Self {
            form,
            sha: Sha256::new_with_prefix(form.hash_prefix("tree")),
            is_layer: false,
            links: LinkMap::default(),
            done: Progress::default(),
            progress,
        }
    }

    /// Creates a hasher for a layer as it is on disk; `kind` separates its digests from those of other kinds.
    pub(super) fn for_layer(kind: &str, progress: OnProgress<'a>) -> Self {
        let form = Form::Names;
        Self {
            sha: Sha256::new_with_prefix(form.hash_prefix(kind)),
            is_layer: true,
            ..Self::new(form, progress)
        }
    }

    fn add_number(&mut self, number: u64) {
        self.sha.update(number.to_le_bytes());
    }

    /// Adds bytes with their length, so that the encoding of a sequence of fields is unambiguous.
    fn add_bytes(&mut self, bytes: &[u8]) {
        self.add_number(bytes.len() as u64);
        self.sha.update(bytes);
    }

    /// Adds an entry. A later name of a file refers to its first one.
    fn add_item(&mut self, item: &Item<'_>) -> Result<()> {
        self.add_item_with(item, |xattrs| xattrs)
    }

    /// Adds an entry like [`Self::add_item`], with converted xattrs.
    pub(super) fn add_item_with(
        &mut self,
        item: &Item<'_>,
        convert: impl FnOnce(Xattrs) -> Xattrs,
    ) -> Result<()> {
        let index = self.done.entries;
        self.done.entries += 1;
        self.form.add_name(item, &mut self.sha);
        if !(self.is_layer && item.is_whiteout()?)
            && let Some(&first) = self.links.first(&item.stat, || index)
        {
            self.add_bytes(b"link");
            self.add_number(first);
            return Ok(());
        }
        let stat = &item.stat;
        self.add_number(stat.mode.into());
        self.add_number(stat.uid.into());
        self.add_number(stat.gid.into());
        self.add_number(stat.mtime.secs.cast_unsigned());
        self.add_number(stat.mtime.nanos.into());
        let xattrs = convert(item.xattrs()?);
        self.add_number(xattrs.len() as u64);
        for (name, value) in &xattrs {
            self.add_bytes(name);
            self.add_bytes(value);
        }
        match item.kind() {
            FileKind::Regular => self.add_content(item)?,
            FileKind::Symlink => self.add_bytes(&item.target()?),
            FileKind::CharDevice | FileKind::BlockDevice => self.add_number(stat.rdev),
            FileKind::Directory | FileKind::Fifo | FileKind::Socket => {}
        }
        (self.progress)(self.done);
        Ok(())
    }

    /// Adds the content of a regular file.
    fn add_content(&mut self, item: &Item<'_>) -> Result<()> {
        let size = item.stat.size;
        self.add_number(size);
        if size > 0 {
            let mut blocks = Blocks::new(item.open()?, size);
            while let Some((at, block)) = blocks.next().context("cannot read", item.path)? {
                self.sha.update(at.to_le_bytes());
                self.sha.update(block);
            }
        }
        self.add_number(u64::MAX);
        self.done.bytes += size;
        Ok(())
    }

    /// Returns the digest and reports the final progress.
    fn finish(self) -> TreeDigest {
        (self.progress)(self.done);
        TreeDigest(self.sha.finalize().into(), self.form)
    }

    /// Returns the digest in hexadecimal digits, without the prefix of its form.
    pub(super) fn finish_hex(self) -> String {
        let sum = self.sha.finalize();
        sum.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
