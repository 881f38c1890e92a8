//! A whole container in one tar archive (a bundle). docs/format.md specifies the layout.
//!
//! The archive contains a manifest, and then the layers in their on-disk form, each followed by the checksum of
//! everything before. The module does not interpret the manifest.
//!
//! Objects can borrow inode numbers from other layers, because a file retains its number across copy-up. Those
//! references are translated: the export records the numbers to which some marker xattr refers, and after all layers
//! are imported the markers are set to the new numbers of those inodes.

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
use super::report::TransferReport;
use super::stream::Members;
use super::unpack::{NumberReferences, Unpacker};
use super::unpack_mode::UnpackMode;
use super::writer::{RawLayer, Writer, cannot_write};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::tree::omissions::Unsupported;
use crate::tree::path;
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
}

fn dir_path(name: &str) -> Vec<u8> {
    format!("layers/{name}/").into_bytes()
}

fn checksum_path(name: &str) -> Vec<u8> {
    format!("layers/{name}.sum").into_bytes()
}

/// Writes a bundle.
///
/// The layers must not change during the call. The caller must sync the output.
pub fn write(
    manifest: &[u8],
    layers: &[BundleLayer],
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<TransferReport> {
    // A bundle that exceeds the limits of the import would be a useless backup.
    let size = manifest.len() as u64;
    limits::check_size(size, limits::MANIFEST, "the manifest of its snapshots", b"")?;
    check_value_count(manifest)?;
    let mut lent: HashMap<u64, HashSet<u64>> = HashMap::new();
    for BundleLayer { layer, .. } in layers {
        collect_borrowed_numbers(layer, &mut lent)?;
    }
    let encoder = Encoder::new(output, compression).map_err(cannot_write)?;
    let mut writer = Writer::new(encoder, progress).with_checksum();
    writer.write_own_file(MANIFEST, 0o600, manifest)?;
    for BundleLayer { name, layer } in layers {
        let raw = RawLayer {
            layer: layer.id(),
            lent: lent.remove(&layer.id()).unwrap_or_default(),
        };
        writer.begin_layer(dir_path(name), raw);
        walk::visit_dir(layer.path(), &mut |item: &Item<'_>| {
            writer.write_item(&item.clone().with_original_attributes(layer.space())?)
        })?;
        let sum = format!("sha256:{}\n", writer.checksum());
        writer.write_own_file(&checksum_path(name), 0o600, sum.as_bytes())?;
    }
    let (encoder, result) = writer.finish()?;
    let mut output = encoder.finish().map_err(cannot_write)?;
    output.flush().map_err(cannot_write)?;
    Ok(result)
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
    /// The imported layers.
    layers: Vec<(PathBuf, XattrSpace, NumberReferences)>,
    report: TransferReport,
}

impl std::fmt::Debug for BundleReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BundleReader").finish_non_exhaustive()
    }
}

impl<'a> BundleReader<'a> {
    pub(super) fn new(first: &Member, mut members: Members<ChecksumReader<'a>>) -> Result<Self> {
        let manifest = read_own_file(first, &mut members, limits::MANIFEST)?;
        check_value_count(&manifest)?;
        Ok(Self {
            manifest,
            members,
            layers: Vec::new(),
            report: TransferReport::default(),
        })
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// Unpacks the next layer, which must have this name, into the empty directory `target`.
    ///
    /// Marker xattrs are converted from the namespace `from` to the namespace `to`.
    pub fn read_layer(
        &mut self,
        name: &str,
        target: &Path,
        (from, to): (XattrSpace, XattrSpace),
        progress: OnProgress<'_>,
    ) -> Result<()> {
        let (prefix, checksum_file) = (dir_path(name), checksum_path(name));
        let before = self.report.done;
        let mut progress = |done: Progress| progress(done.after(before));
        let mode = UnpackMode::Raw(from, to);
        let mut unpacker = Unpacker::new(target, mode, Unsupported::Refuse, &mut progress)?;
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
            strip_prefix(&mut member.path, &prefix)?;
            if let EntryKind::HardLink(target) = &mut member.kind {
                strip_prefix(target, &prefix)?;
            }
            unpacker.unpack_entry(member, &mut self.members)?;
        }
        let (imported, numbers) = unpacker.finish()?;
        self.report.done.entries += imported.done.entries;
        self.report.done.bytes += imported.done.bytes;
        self.report.notes.append(imported.notes);
        self.layers.push((target.to_owned(), to, numbers));
        Ok(())
    }

    /// Completes the import: verifies that the archive ends here, and sets the marker xattrs of borrowed inode numbers.
    pub fn finish(mut self) -> Result<TransferReport> {
        if let Some(member) = self.members.next()? {
            let what = "the archive has an entry that its manifest does not list";
            return Err(TreeError::new(ErrorKind::Refused, what).at(member.path));
        }
        let mut lent = HashMap::new();
        for (target, space, numbers) in &self.layers {
            let layer = Layer::open(target, *space).map_err(|error| {
                TreeError::new(ErrorKind::Io, "cannot open the new layer")
                    .at(target.as_os_str().as_bytes())
                    .because(error)
            })?;
            if let Some(exported_layer) = numbers.layer {
                for (old, new) in &numbers.lent {
                    let mark = InodeNumberXattr {
                        layer: layer.id(),
                        ino: *new,
                    };
                    lent.insert((exported_layer, *old), mark);
                }
            }
        }
        for (target, space, numbers) in self.layers {
            set_borrowed_numbers(&target, space, numbers.borrowed, &lent)?;
        }
        Ok(self.report)
    }
}

/// Sets the marker xattrs of the objects of a layer that borrow inode numbers.
///
/// A reference to an inode that the archive does not contain is dropped.
fn set_borrowed_numbers(
    target: &Path,
    space: XattrSpace,
    borrowed: DirMap<Vec<(Box<[u8]>, InodeNumberXattr)>>,
    lent: &HashMap<(u64, u64), InodeNumberXattr>,
) -> Result<()> {
    let root = dir::open_root(target)
        .context("cannot open the new layer", target.as_os_str().as_bytes())?;
    borrowed.visit(root.as_fd(), &mut |names, parent, parent_path| {
        for (name, mark) in names {
            let Some(mark) = lent.get(&(mark.layer, mark.ino)) else {
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
        Ok(())
    })
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
