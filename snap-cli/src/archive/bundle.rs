//! A whole container in one tar archive (a bundle). docs/format.md specifies the layout.
//!
//! The archive contains a manifest, and then the layers in their on-disk form, each followed by the checksum of
//! everything before. A layer that is sent to another store is also followed by its portable digest. The module does not
//! interpret the manifest.
//!
//! Objects can borrow inode numbers from other layers, because a file retains its number across copy-up. Those
//! references are translated: the export records the numbers to which some marker xattr refers, and after a layer is
//! imported, its markers are set to the new numbers of those inodes. For layers that the reader has already, the archive
//! contains lists of these numbers (see [`super::numbers`]).

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowl_layers::format::{InodeNumberXattr, XattrSpace};
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{dir, stat, xattr};

use super::checksum::ChecksumReader;
use super::checksum::hex;
use super::compress::{Compression, Encoder};
use super::dir_map::DirMap;
use super::limits;
use super::member::{EntryKind, Member};
use super::numbers::{self, LentNumbers};
use super::report::TransferReport;
use super::stream::Members;
use super::unpack::{NumberReferences, Unpacker};
use super::unpack_mode::UnpackMode;
use super::writer::{RawLayer, Writer, cannot_write};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::tree::omissions::Unsupported;
use crate::tree::path;
use crate::tree::portable::{PortableDigest, PortableHasher};
use crate::tree::walk::{self, Item};

/// The name of the first entry, which identifies the kind of archive.
pub(super) const MANIFEST: &[u8] = b"cowl-container.json";

/// A layer of a bundle.
#[derive(Debug)]
pub struct BundleLayer {
    /// The name in the archive: letters, digits and hyphens.
    pub name: String,
    /// The layer.
    pub layer: Arc<Layer>,
    /// Whether the archive contains its portable digest.
    pub digest: DigestMember,
}

/// Whether a bundle contains the portable digest of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DigestMember {
    /// It does not.
    Omitted,
    /// It contains this digest, which was computed earlier.
    Known(PortableDigest),
    /// The digest is computed while the layer is written.
    Computed,
}

/// The layers of a bundle.
#[derive(Debug, Default)]
pub struct BundleLayers {
    /// The layers that the archive refers to, but does not contain, each with its name in the archive.
    pub base: Vec<(String, Arc<Layer>)>,
    /// The layers that the archive contains.
    pub sent: Vec<BundleLayer>,
}

/// The result of writing a bundle.
#[derive(Debug)]
pub struct BundleReport {
    /// The number of entries and bytes.
    pub done: Progress,
    /// The digests that were computed, with the names of the layers.
    pub computed: Vec<(String, PortableDigest)>,
}

fn dir_path(name: &str) -> Vec<u8> {
    format!("layers/{name}/").into_bytes()
}

fn checksum_path(name: &str) -> Vec<u8> {
    format!("layers/{name}.sum").into_bytes()
}

fn digest_path(name: &str) -> Vec<u8> {
    format!("layers/{name}.digest").into_bytes()
}

fn numbers_path(name: &str) -> Vec<u8> {
    format!("base/{name}.numbers").into_bytes()
}

/// Writes a bundle.
///
/// The layers must not change during the call. The caller must sync the output.
pub fn write(
    manifest: &[u8],
    layers: &BundleLayers,
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<BundleReport> {
    // A bundle that exceeds the limits of the import would be a useless backup.
    let size = manifest.len() as u64;
    limits::check_size(size, limits::MANIFEST, "the manifest of its snapshots", b"")?;
    check_value_count(manifest)?;
    let mut lent: HashMap<u64, HashSet<u64>> = HashMap::new();
    for BundleLayer { layer, .. } in &layers.sent {
        collect_borrowed_numbers(layer, &mut lent)?;
    }
    let encoder = Encoder::new(output, compression).map_err(cannot_write)?;
    let mut writer = Writer::new(encoder, progress).with_checksum();
    writer.write_own_file(MANIFEST, 0o600, manifest)?;
    let mut listed = limits::LENT_NUMBERS;
    for (name, layer) in &layers.base {
        let mut numbers = lent.remove(&layer.id()).unwrap_or_default();
        if numbers.len() > listed {
            numbers = numbers.into_iter().take(listed).collect();
        }
        listed -= numbers.len();
        let list = numbers::list(layer, layer.id(), &numbers)?;
        writer.write_own_file(&numbers_path(name), 0o600, &list)?;
    }
    let mut computed = Vec::new();
    for sent in &layers.sent {
        let BundleLayer { name, layer, .. } = sent;
        let raw = RawLayer {
            layer: layer.id(),
            lent: lent.remove(&layer.id()).unwrap_or_default(),
        };
        writer.begin_layer(dir_path(name), raw);
        if let Some(digest) = write_tree(&mut writer, sent)? {
            let line = format!("{digest}\n");
            writer.write_own_file(&digest_path(name), 0o600, line.as_bytes())?;
            if sent.digest == DigestMember::Computed {
                computed.push((name.clone(), digest));
            }
        }
        let sum = format!("sha256:{}\n", writer.checksum());
        writer.write_own_file(&checksum_path(name), 0o600, sum.as_bytes())?;
    }
    let (encoder, result) = writer.finish()?;
    let mut output = encoder.finish().map_err(cannot_write)?;
    output.flush().map_err(cannot_write)?;
    Ok(BundleReport {
        done: result.done,
        computed,
    })
}

/// Writes the entries of a layer, and returns the digest that the archive contains.
fn write_tree<W: Write>(
    writer: &mut Writer<'_, W>,
    sent: &BundleLayer,
) -> Result<Option<PortableDigest>> {
    let layer = &sent.layer;
    let space = layer.space();
    // The writer reports the progress.
    let mut silent = |_| {};
    let mut hasher = match sent.digest {
        DigestMember::Computed => Some(PortableHasher::new(space, &mut silent)),
        DigestMember::Known(_) | DigestMember::Omitted => None,
    };
    walk::visit_dir(layer.path(), &mut |item: &Item<'_>| {
        let item = item.clone().with_original_attributes(space)?;
        if let Some(hasher) = &mut hasher {
            hasher.add(&item)?;
        }
        writer.write_item(&item)
    })?;
    Ok(match &sent.digest {
        DigestMember::Omitted => None,
        DigestMember::Known(digest) => Some(digest.clone()),
        DigestMember::Computed => hasher.map(PortableHasher::finish),
    })
}

/// Refuses a manifest with too many JSON values, because parsing it would take far more memory than its size.
fn check_value_count(manifest: &[u8]) -> Result<()> {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for byte in manifest {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b':' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    if values <= limits::MANIFEST_VALUES {
        return Ok(());
    }
    let what = format!(
        "the manifest has {values} values; the limit is {}",
        limits::MANIFEST_VALUES
    );
    Err(limits::exceeded(what, MANIFEST))
}

/// Adds the inodes from which the objects of a layer borrow their numbers to `lent`, by layer id.
fn collect_borrowed_numbers(layer: &Layer, lent: &mut HashMap<u64, HashSet<u64>>) -> Result<()> {
    let marker = layer.space().ino().as_bytes();
    walk::visit_dir(layer.path(), &mut |item: &Item<'_>| {
        for (name, value) in item.xattrs()? {
            if name == marker
                && let Some(number) = InodeNumberXattr::parse(&value)
                    .context("cannot read the inode number", item.path)?
            {
                lent.entry(number.layer).or_default().insert(number.ino);
            }
        }
        Ok(())
    })
}

/// A reader of a bundle. The manifest has been read.
pub struct BundleReader<'a> {
    manifest: Vec<u8>,
    members: Members<ChecksumReader<'a>>,
    /// The new numbers of inodes in the layers that were imported or listed.
    lent: LentNumbers,
    /// The imported layers with references to numbers of layers that were not imported yet.
    waiting: Vec<(PathBuf, XattrSpace, BorrowedNumbers)>,
    report: TransferReport,
}

/// The objects of a layer with borrowed inode numbers, by directory: their names, or an empty name for the directory.
type BorrowedNumbers = DirMap<Vec<(Box<[u8]>, InodeNumberXattr)>>;

/// A layer that was read from a bundle.
#[derive(Debug)]
pub struct LayerFromBundle {
    /// The digest of the layer that the bundle contains.
    pub digest: Option<PortableDigest>,
    /// Whether there are notes on attributes that were not stored as they are in the bundle.
    pub has_notes: bool,
    /// The numbers of the layer to which others may refer, for [`BundleReader::replace_layer`].
    lent: Vec<(u64, u64)>,
    exported_id: Option<u64>,
}

impl std::fmt::Debug for BundleReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BundleReader").finish_non_exhaustive()
    }
}

impl<'a> BundleReader<'a> {
    pub(super) fn new(first: &Member, mut members: Members<ChecksumReader<'a>>) -> Result<Self> {
        members.limit_rest(limits::REST);
        let manifest = read_own_file(first, &mut members, limits::MANIFEST)?;
        check_value_count(&manifest)?;
        Ok(Self {
            manifest,
            members,
            lent: LentNumbers::new(),
            waiting: Vec::new(),
            report: TransferReport::default(),
        })
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// Reads what the archive contains of the next layer that it only refers to, which must have this name. The reader's
    /// own copy of this layer is at `tree`.
    pub fn read_base(&mut self, name: &str, tree: &Path, space: XattrSpace) -> Result<()> {
        self.members.skip_rest()?;
        let path = numbers_path(name);
        let member = self.members.next()?;
        let member = member.filter(|member| member.path == path && member.kind == EntryKind::File);
        let Some(member) = member else {
            let what = "the archive lacks the list of numbers of a layer that it refers to";
            return Err(TreeError::new(ErrorKind::Damaged, what).at(path));
        };
        let data = read_own_file(&member, &mut self.members, limits::NUMBERS as u64)?;
        numbers::resolve(&data, tree, &*open_layer(tree, space)?, &mut self.lent)
    }

    /// Unpacks the next layer, which must have this name, into the empty directory `target`.
    ///
    /// Marker xattrs are converted from the namespace `from` to the namespace `to`. The caller compares the digest.
    pub fn read_layer(
        &mut self,
        name: &str,
        target: &Path,
        (from, to): (XattrSpace, XattrSpace),
        progress: OnProgress<'_>,
    ) -> Result<LayerFromBundle> {
        let (prefix, checksum_file) = (dir_path(name), checksum_path(name));
        let digest_file = digest_path(name);
        let before = self.report.done;
        let mut progress = |done: Progress| progress(done.after(before));
        let mode = UnpackMode::Raw(from, to);
        let mut unpacker = Unpacker::new(target, mode, Unsupported::Refuse, &mut progress)?;
        let mut digest = None;
        loop {
            self.members.skip_rest()?;
            let sum = self.members.input().sum.clone();
            let Some(mut member) = self.members.next()? else {
                let what = format!("the archive is truncated within the layer {name}");
                return Err(TreeError::new(ErrorKind::Truncated, what));
            };
            if member.path == checksum_file && member.kind == EntryKind::File {
                let recorded = read_own_file(&member, &mut self.members, limits::SUM)?;
                let computed = format!("sha256:{}\n", sum.map_or_else(String::new, hex));
                if recorded != computed.as_bytes() {
                    let what =
                        "the archive is damaged: wrong checksum of the data up to this entry";
                    return Err(TreeError::new(ErrorKind::Damaged, what).at(checksum_file));
                }
                break;
            }
            if digest.is_none() && member.path == digest_file && member.kind == EntryKind::File {
                let line = read_own_file(&member, &mut self.members, limits::SUM)?;
                digest = Some(parse_digest(&line).ok_or_else(|| {
                    let what = "the archive has an invalid digest of a layer";
                    TreeError::new(ErrorKind::Damaged, what).at(digest_file.as_slice())
                })?);
                continue;
            }
            strip_prefix(&mut member.path, &prefix)?;
            if let EntryKind::HardLink(target) = &mut member.kind {
                strip_prefix(target, &prefix)?;
            }
            unpacker.unpack_entry(member, &mut self.members)?;
        }
        let (imported, numbers) = unpacker.finish()?;
        self.report.done.entries += imported.done.entries;
        self.report.done.bytes += imported.done.bytes;
        let has_notes = !imported.notes.is_empty();
        self.report.notes.append(imported.notes);
        self.set_numbers(target, to, numbers, (digest, has_notes))
    }

    /// Records the numbers of an imported layer, and sets those that it borrowed from earlier layers.
    fn set_numbers(
        &mut self,
        target: &Path,
        space: XattrSpace,
        numbers: NumberReferences,
        (digest, has_notes): (Option<PortableDigest>, bool),
    ) -> Result<LayerFromBundle> {
        let layer = open_layer(target, space)?;
        if let Some(exported) = numbers.layer {
            for (old, new) in &numbers.lent {
                let mark = InodeNumberXattr {
                    layer: layer.id(),
                    ino: *new,
                };
                self.lent.insert((exported, *old), mark);
            }
        }
        let waiting = set_borrowed_numbers(target, space, numbers.borrowed, &self.lent)?;
        self.waiting.push((target.to_owned(), space, waiting));
        Ok(LayerFromBundle {
            digest,
            has_notes,
            lent: numbers.lent,
            exported_id: numbers.layer,
        })
    }

    /// Replaces the layer that was read last, at `target`, by an equal one at `tree`: later layers refer to that.
    pub fn replace_layer(
        &mut self,
        read: &LayerFromBundle,
        target: &Path,
        (tree, space): (&Path, XattrSpace),
    ) -> Result<()> {
        self.waiting.pop_if(|(path, ..)| path == target);
        let Some(exported) = read.exported_id else {
            return Ok(());
        };
        // The paths of the objects in the new layer lead to those in the other one.
        let numbers: HashSet<u64> = read.lent.iter().map(|(_, new)| *new).collect();
        let list = numbers::list(&*open_layer(target, space)?, exported, &numbers)?;
        let mut found = LentNumbers::new();
        numbers::resolve(&list, tree, &*open_layer(tree, space)?, &mut found)?;
        for (old, new) in &read.lent {
            match found.remove(&(exported, *new)) {
                Some(mark) => self.lent.insert((exported, *old), mark),
                None => self.lent.remove(&(exported, *old)),
            };
        }
        Ok(())
    }

    /// Completes the import: verifies that the archive ends here, and sets the remaining borrowed inode numbers.
    pub fn finish(mut self) -> Result<TransferReport> {
        if let Some(member) = self.members.next()? {
            let what = "the archive has an entry that its manifest does not list";
            return Err(TreeError::new(ErrorKind::Refused, what).at(member.path));
        }
        for (target, space, waiting) in self.waiting {
            // References to inodes that the archive does not contain are dropped.
            set_borrowed_numbers(&target, space, waiting, &self.lent)?;
        }
        Ok(self.report)
    }
}

/// Parses the content of a digest member.
fn parse_digest(line: &[u8]) -> Option<PortableDigest> {
    let line = str::from_utf8(line).ok()?;
    PortableDigest::parse(line.strip_suffix('\n')?)
}

fn open_layer(tree: &Path, space: XattrSpace) -> Result<Arc<Layer>> {
    Layer::open(tree, space).map_err(|error| {
        TreeError::new(ErrorKind::Io, "cannot open the layer")
            .at(tree.as_os_str().as_bytes())
            .because(error)
    })
}

/// Sets the marker xattrs of the objects of a layer that borrow inode numbers. Returns the objects whose numbers are not in
/// `lent`.
fn set_borrowed_numbers(
    target: &Path,
    space: XattrSpace,
    borrowed: BorrowedNumbers,
    lent: &LentNumbers,
) -> Result<BorrowedNumbers> {
    let root = dir::open_root(target)
        .context("cannot open the new layer", target.as_os_str().as_bytes())?;
    let mut unknown = BorrowedNumbers::default();
    borrowed.visit(root.as_fd(), &mut |names, parent, parent_path| {
        let mut left = Vec::new();
        for (name, reference) in names {
            let Some(mark) = lent.get(&(reference.layer, reference.ino)) else {
                left.push((name, reference));
                continue;
            };
            let path = path::join(parent_path, &name);
            let found = match &*name {
                b"" => dir::reopen_dir(parent),
                name => dir::open_path(parent, name),
            };
            let found = found.context("cannot open", &path)?;
            let kind = stat::stat_fd(&found).context("cannot read", &path)?.kind();
            if space == XattrSpace::Trusted
                || matches!(kind, FileKind::Directory | FileKind::Regular)
            {
                xattr::set(found.as_fd(), space.ino().as_bytes(), &mark.to_value())
                    .context("cannot set the inode number of", &path)?;
            }
        }
        match left.is_empty() {
            true => Ok(()),
            false => unknown.set(parent_path, left),
        }
    })?;
    Ok(unknown)
}

/// Reads a small file that is not part of a layer.
fn read_own_file(
    member: &Member,
    members: &mut Members<ChecksumReader<'_>>,
    limit: u64,
) -> Result<Vec<u8>> {
    limits::check_size(
        member.stored,
        limit,
        "a metadata file of the archive",
        &member.path,
    )?;
    if member.sparse.is_some() {
        let what = "the archive has a sparse metadata file";
        return Err(TreeError::new(ErrorKind::Refused, what).at(member.path.as_slice()));
    }
    let mut data = Vec::new();
    // The size is untrusted, so memory is allocated only as data arrives.
    let mut left = usize::try_from(member.stored).unwrap_or_default();
    while left > 0 {
        let mut chunk = vec![0; left.min(1 << 16)];
        members.read_data(&mut chunk)?;
        left -= chunk.len();
        data.append(&mut chunk);
    }
    Ok(data)
}

/// Converts a path in the archive to a path in the layer with this prefix.
fn strip_prefix(path: &mut Vec<u8>, prefix: &[u8]) -> Result<()> {
    match path.strip_prefix(prefix) {
        Some(b"") => *path = b"./".to_vec(),
        Some(inner) => *path = inner.to_vec(),
        None => {
            let what = "the archive has an entry that does not belong to the current layer";
            return Err(TreeError::new(ErrorKind::Refused, what).at(path.as_slice()));
        }
    }
    Ok(())
}
