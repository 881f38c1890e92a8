//! A whole container in one tar archive: a manifest, then its layers as they lie on the disk, each
//! followed by the sum of everything before. docs/format.md has the layout.
//!
//! What the manifest says is not known here, nor what a container is. Numbers that objects borrow from
//! other layers (a file keeps its inode number over a copy-up) are said anew for the new layers: exported
//! are the numbers that some mark names, and when all layers are there the marks are set to what those
//! inodes have become.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cowl_layers::format::{NumberMark, XattrSpace};
use cowl_layers::layer::Layer;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{dir, stat, xattr};

use super::checksum::ChecksumReader;
use super::checksum::hex;
use super::compress::{Compression, Encoder};
use super::dir_map::DirMap;
use super::limits;
use super::member::{Member, What};
use super::report::Report;
use super::stream::Members;
use super::unpack::{How, Numbers, Unpack};
use super::writer::{Raw, Writer, cannot_write};
use crate::tree::error::{Context as _, ErrorKind, OnProgress, Progress, Result, TreeError};
use crate::tree::path;
use crate::tree::walk::{self, Item};

/// The first entry, by which such an archive is known.
pub(super) const MANIFEST: &[u8] = b"cowl-container.json";

/// A layer with the name that the archive gives it.
#[derive(Debug)]
pub struct Part {
    /// Letters, digits and hyphens.
    pub name: String,
    /// The layer.
    pub layer: Arc<Layer>,
}

fn folder_of(name: &str) -> Vec<u8> {
    format!("layers/{name}/").into_bytes()
}

fn sum_of(name: &str) -> Vec<u8> {
    format!("layers/{name}.sum").into_bytes()
}

/// Writes the archive. The layers must not change meanwhile. Making it durable is the caller's.
pub fn write(
    manifest: &[u8],
    parts: &[Part],
    output: impl Write,
    compression: Compression,
    progress: OnProgress<'_>,
) -> Result<Report> {
    // What could not be imported must not pass for a backup.
    let size = manifest.len() as u64;
    limits::bytes(size, limits::MANIFEST, "the manifest of its snapshots", b"")?;
    limit_values(manifest)?;
    let mut named: HashMap<u64, HashSet<u64>> = HashMap::new();
    for part in parts {
        borrowed(&part.layer, &mut named)?;
    }
    let encoder = Encoder::new(output, compression).map_err(cannot_write)?;
    let mut writer = Writer::new(encoder, progress).summed();
    writer.own_file(MANIFEST, 0o600, manifest)?;
    for Part { name, layer } in parts {
        let raw = Raw {
            layer: layer.id(),
            lends: named.remove(&layer.id()).unwrap_or_default(),
        };
        writer.begin_layer(folder_of(name), raw);
        walk::visit_dir(layer.path(), &mut |item: &Item<'_>| writer.item(item))?;
        let sum = format!("sha256:{}\n", writer.sum());
        writer.own_file(&sum_of(name), 0o600, sum.as_bytes())?;
    }
    let (encoder, result) = writer.finish()?;
    let mut output = encoder.finish().map_err(cannot_write)?;
    output.flush().map_err(cannot_write)?;
    Ok(result)
}

/// Refuses a manifest that would take far more memory than its bytes when it is parsed: before it is.
fn limit_values(manifest: &[u8]) -> Result<()> {
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

/// Adds the inodes whose numbers the objects of a layer borrow, by layer.
fn borrowed(layer: &Layer, named: &mut HashMap<u64, HashSet<u64>>) -> Result<()> {
    let mark = layer.space().ino().as_bytes();
    walk::visit_dir(layer.path(), &mut |item: &Item<'_>| {
        for (name, value) in item.xattrs()? {
            if name == mark
                && let Some(number) =
                    NumberMark::parse(&value).context("can't read the mark", item.path)?
            {
                named.entry(number.layer).or_default().insert(number.ino);
            }
        }
        Ok(())
    })
}

/// An archive of a whole container that is being read: the manifest was.
pub struct Whole<'a> {
    manifest: Vec<u8>,
    members: Members<ChecksumReader<'a>>,
    read: Vec<(PathBuf, XattrSpace, Numbers)>,
    done: Progress,
}

impl std::fmt::Debug for Whole<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Whole").finish_non_exhaustive()
    }
}

impl<'a> Whole<'a> {
    pub(super) fn new(first: &Member, mut members: Members<ChecksumReader<'a>>) -> Result<Self> {
        let manifest = small(first, &mut members, limits::MANIFEST)?;
        limit_values(&manifest)?;
        Ok(Self {
            manifest,
            members,
            read: Vec::new(),
            done: Progress::default(),
        })
    }

    /// What the archive says of itself.
    pub fn manifest(&self) -> &[u8] {
        &self.manifest
    }

    /// Reads the next layer, which must be the one of this name, into the empty folder `target`. Marks
    /// come from the space `from`, and go into the space `to`.
    pub fn layer(
        &mut self,
        name: &str,
        target: &Path,
        (from, to): (XattrSpace, XattrSpace),
        progress: OnProgress<'_>,
    ) -> Result<()> {
        let (folder, sum_file) = (folder_of(name), sum_of(name));
        let before = self.done;
        let mut progress = |done: Progress| {
            progress(Progress {
                entries: before.entries + done.entries,
                bytes: before.bytes + done.bytes,
                total: None,
            });
        };
        let mut unpack = Unpack::new(target, How::Raw(from, to), &mut progress)?;
        loop {
            self.members.skip_rest()?;
            let sum = self.members.input().sum.clone();
            let Some(mut member) = self.members.next()? else {
                let what = format!("the archive ends before the layer {name} does");
                return Err(TreeError::new(ErrorKind::Truncated, what));
            };
            if member.path == sum_file && member.what == What::File {
                let said = small(&member, &mut self.members, limits::SUM)?;
                let found = format!("sha256:{}\n", sum.map_or_else(String::new, hex));
                if said != found.as_bytes() {
                    let what = "the archive is damaged: its sum is wrong up to this place";
                    return Err(TreeError::new(ErrorKind::Damaged, what).at(sum_file));
                }
                break;
            }
            strip(&mut member.path, &folder)?;
            if let What::HardLink(target) = &mut member.what {
                strip(target, &folder)?;
            }
            unpack.entry(member, &mut self.members)?;
        }
        let (imported, numbers) = unpack.finish()?;
        self.done.entries += imported.done.entries;
        self.done.bytes += imported.done.bytes;
        self.read.push((target.to_owned(), to, numbers));
        Ok(())
    }

    /// Ends: there must be nothing left. Sets the marks by which numbers are borrowed.
    pub fn finish(mut self) -> Result<Progress> {
        if let Some(member) = self.members.next()? {
            let what = "the archive has more in it than it says";
            return Err(TreeError::new(ErrorKind::Refused, what).at(member.path));
        }
        let mut lent = HashMap::new();
        for (target, space, numbers) in &self.read {
            let layer = Layer::open(target, *space).map_err(|error| {
                TreeError::new(ErrorKind::Io, "can't open the new layer")
                    .at(target.as_os_str().as_bytes())
                    .because(error)
            })?;
            if let Some(was) = numbers.layer {
                for (old, new) in &numbers.lent {
                    let mark = NumberMark {
                        layer: layer.id(),
                        ino: *new,
                    };
                    lent.insert((was, *old), mark);
                }
            }
        }
        for (target, space, numbers) in self.read {
            borrow(&target, space, numbers.borrowed, &lent)?;
        }
        Ok(self.done)
    }
}

/// Sets the marks of one layer. What lent a number and is not there means nothing any more.
fn borrow(
    target: &Path,
    space: XattrSpace,
    borrowed: DirMap<Vec<(Box<[u8]>, NumberMark)>>,
    lent: &HashMap<(u64, u64), NumberMark>,
) -> Result<()> {
    let root = dir::open_root(target)
        .context("can't open the new layer", target.as_os_str().as_bytes())?;
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
            let found = found.context("can't open", &path)?;
            let kind = stat::stat_fd(&found).context("can't read", &path)?.kind();
            if space == XattrSpace::Trusted
                || matches!(kind, FileKind::Directory | FileKind::Regular)
            {
                xattr::set(found.as_fd(), space.ino().as_bytes(), &mark.to_value())
                    .context("can't set the number of", &path)?;
            }
        }
        Ok(())
    })
}

/// The content of a small file of the archive's own.
fn small(
    member: &Member,
    members: &mut Members<ChecksumReader<'_>>,
    limit: u64,
) -> Result<Vec<u8>> {
    limits::bytes(
        member.stored,
        limit,
        "a file of the archive's own",
        &member.path,
    )?;
    if member.sparse.is_some() {
        let what = "the archive has a file of its own that has holes";
        return Err(TreeError::new(ErrorKind::Refused, what).at(member.path.as_slice()));
    }
    let mut data = Vec::new();
    // Not all at once: the size may be a lie.
    let mut left = usize::try_from(member.stored).unwrap_or_default();
    while left > 0 {
        let mut part = vec![0; left.min(1 << 16)];
        members.read_data(&mut part)?;
        left -= part.len();
        data.append(&mut part);
    }
    Ok(data)
}

/// Makes a path of the archive one of the layer.
fn strip(path: &mut Vec<u8>, folder: &[u8]) -> Result<()> {
    match path.strip_prefix(folder) {
        Some(b"") => *path = b"./".to_vec(),
        Some(inner) => *path = inner.to_vec(),
        None => {
            let what = "the archive has an entry that belongs to no layer, or to another one";
            return Err(TreeError::new(ErrorKind::Refused, what).at(path.as_slice()));
        }
    }
    Ok(())
}
