//! The files of an image: in a directory, or in a tar archive.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::archive::bundle;
use crate::archive::compress::{self, StreamEnd};
use crate::archive::entry_path::{self, PathRole, TreePath};
use crate::archive::limits;
use crate::archive::member::{EntryKind, Member};
use crate::archive::stream::Members;
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::path::{is_within, join, split};

/// The files of an image.
#[derive(Debug)]
pub(super) enum ImageFiles {
    /// In a directory.
    Dir(PathBuf),
    /// In a tar archive.
    Archive(ArchiveFiles),
}

/// A file of an image: its size and its content.
pub(super) type ImageFile<'f> = (u64, Box<dyn Read + 'f>);

impl ImageFiles {
    /// Opens a file; `None` if it does not exist.
    pub(super) fn open(&self, name: &str) -> Result<Option<ImageFile<'_>>> {
        match self {
            Self::Dir(dir) => open_in_dir(dir, name),
            Self::Archive(archive) => Ok(archive.open(name.as_bytes())),
        }
    }

    /// Reads a small file; `None` if it does not exist.
    pub(super) fn read(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        match self.open(name)? {
            Some((size, content)) => {
                limits::check_size(size, limit, "a document of the image", name.as_bytes())?;
                let mut data = Vec::new();
                content
                    .take(size)
                    .read_to_end(&mut data)
                    .context("cannot read", name.as_bytes())?;
                Ok(Some(data))
            }
            None => Ok(None),
        }
    }
}

/// Opens a file in a directory. Neither its name nor a symbolic link leads out of the directory.
fn open_in_dir(dir: &Path, name: &str) -> Result<Option<ImageFile<'static>>> {
    let at = dir.join(name).into_os_string().into_vec();
    let root = File::open(dir).context("cannot open", dir.as_os_str().as_bytes())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let opened = match rustix::fs::openat2(&root, name, FLAGS, Mode::empty(), resolve) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        other => other.context("cannot open", &at)?,
    };
    let (file, size) = regular(File::from(opened), &at)?;
    Ok(Some((size, Box::new(file))))
}

/// A FIFO does not block.
const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

fn open_regular(path: &Path) -> Result<File> {
    let name = path.as_os_str().as_bytes();
    let opened = rustix::fs::open(path, FLAGS, Mode::empty()).context("cannot open", name)?;
    regular(File::from(opened), name).map(|(file, _)| file)
}

/// Returns the file and its size if it is a regular file.
fn regular(file: File, name: &[u8]) -> Result<(File, u64)> {
    let metadata = file.metadata().context("cannot read", name)?;
    match metadata.is_file() {
        true => Ok((file, metadata.len())),
        false => Err(TreeError::new(ErrorKind::Refused, "not a regular file").at(name)),
    }
}

/// Which entries an archive may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entries {
    /// Only those of an image: if the archive is not an image, only its beginning is read.
    OfImage,
    /// Any: the user said that it is an image.
    Any,
}

/// The files of a tar archive, which is not unpacked.
#[derive(Debug)]
pub(super) struct ArchiveFiles {
    file: File,
    entries: HashMap<Vec<u8>, ArchiveEntry>,
}

#[derive(Debug)]
enum ArchiveEntry {
    File {
        offset: u64,
        size: u64,
    },
    /// A symbolic link, by which older versions of Docker repeat a layer: the path of its target.
    Link(Vec<u8>),
}

impl ArchiveFiles {
    /// Reads the list of files; `None` if an entry is not among `expected`.
    ///
    /// A compressed archive is unpacked to a file without a name in the directory `temporary` first.
    pub(super) fn read(path: &Path, expected: Entries, temporary: &Path) -> Result<Option<Self>> {
        let file = open_regular(path)?;
        let at = path.as_os_str().as_bytes();
        let source = file.try_clone().context("cannot read", at)?;
        let mut decoded = compress::decode(source)?;
        let file = match decoded.end {
            StreamEnd::Unmarked => {
                drop(decoded);
                file
            }
            StreamEnd::Marked => {
                if expected == Entries::OfImage && !begins_like_image(path)? {
                    return Ok(None);
                }
                let mut plain = tempfile::tempfile_in(temporary).context(
                    "cannot create a temporary file in",
                    temporary.as_os_str().as_bytes(),
                )?;
                io::copy(&mut decoded.input, &mut plain)
                    .context("cannot unpack the archive", at)?;
                plain
            }
        };
        let entries = list(&file, expected)?;
        Ok(entries.map(|entries| Self { file, entries }))
    }

    /// Returns whether a file exists.
    pub(super) fn has(&self, name: &str) -> bool {
        self.find(name.as_bytes()).is_some()
    }

    fn find(&self, name: &[u8]) -> Option<(u64, u64)> {
        let normal = normalize(name)?;
        match self.entries.get(&normal)? {
            ArchiveEntry::File { offset, size } => Some((*offset, *size)),
            ArchiveEntry::Link(target) => match self.entries.get(target)? {
                ArchiveEntry::File { offset, size } => Some((*offset, *size)),
                ArchiveEntry::Link(_) => None,
            },
        }
    }

    fn open(&self, name: &[u8]) -> Option<ImageFile<'_>> {
        let (offset, size) = self.find(name)?;
        let file = FileFrom {
            file: &self.file,
            offset,
        };
        Some((size, Box::new(file.take(size))))
    }
}

/// Returns whether a compressed archive begins like an image: all entries up to one that most other archives do not have.
fn begins_like_image(path: &Path) -> Result<bool> {
    let decoded = compress::decode(open_regular(path)?)?;
    let mut members = Members::new(decoded.input);
    while let Some(member) = members.next()? {
        if !is_of_image(&member) {
            return Ok(false);
        }
        if normalize(&member.path).is_some_and(|path| is_typical(&path)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns whether an entry of this path is in each image of one kind, and hardly in other archives.
fn is_typical(path: &[u8]) -> bool {
    let files: [&[u8]; 3] = [b"oci-layout", b"index.json", b"manifest.json"];
    files.contains(&path) || is_within(path, b"blobs/sha256")
}

/// Returns whether an entry may be one of an image.
fn is_of_image(member: &Member) -> bool {
    let Some(path) = normalize(&member.path) else {
        return false;
    };
    let mut parts = path.split(|&byte| byte == b'/');
    let first = parts.next().unwrap_or_default();
    let is_digest = first.len() == 64 && first.iter().all(u8::is_ascii_hexdigit);
    match first {
        // The root itself.
        bundle::MANIFEST => false,
        b"" | b"oci-layout" | b"index.json" | b"manifest.json" | b"repositories" | b"blobs" => true,
        _ if is_digest => true,
        other => parts.next().is_none() && (other.ends_with(b".json") || other.ends_with(b".tar")),
    }
}

fn normalize(path: &[u8]) -> Option<Vec<u8>> {
    match entry_path::convert(path, PathRole::Name) {
        TreePath::Same(path) | TreePath::Changed(path, _) => Some(path),
        TreePath::Unstorable(_) => None,
    }
}

/// Lists the files of an uncompressed archive; `None` if an entry is not among `expected`.
fn list(file: &File, expected: Entries) -> Result<Option<HashMap<Vec<u8>, ArchiveEntry>>> {
    let mut members = Members::new(FileFrom { file, offset: 0 });
    let (mut entries, mut names) = (HashMap::new(), 0);
    while let Some(member) = members.next()? {
        if expected == Entries::OfImage && !is_of_image(&member) {
            return Ok(None);
        }
        let entry = match &member.kind {
            EntryKind::File if member.sparse.is_none() => Some(ArchiveEntry::File {
                offset: members.input().offset,
                size: member.stored,
            }),
            EntryKind::Symlink(target) => link_target(&member.path, target).map(ArchiveEntry::Link),
            _ => None,
        };
        let rest = members.pass_rest();
        let headers = members.input();
        headers.offset = headers.offset.saturating_add(rest);
        if let (Some(entry), Some(path)) = (entry, normalize(&member.path)) {
            names += path.len();
            if entries.len() >= limits::IMAGE_FILES || names > limits::IMAGE_NAMES {
                let what = "the archive has more files than an image may have";
                return Err(limits::exceeded(what, b""));
            }
            entries.insert(path, entry);
        }
    }
    Ok(Some(entries))
}

/// Returns the path of a relative symbolic link's target, which may be in the parent directory of that of the link.
fn link_target(path: &[u8], target: &[u8]) -> Option<Vec<u8>> {
    let path = normalize(path)?;
    let parent = split(&path).0;
    match target.strip_prefix(b"../") {
        Some(rest) => normalize(&join(split(parent).0, rest)),
        None => normalize(&join(parent, target)),
    }
}

/// A reader of a file from an offset.
struct FileFrom<'f> {
    file: &'f File,
    offset: u64,
}

impl Read for FileFrom<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.offset)?;
        self.offset += got as u64;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lead_out_of_a_directory() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("image");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(top.path().join("secret"), "secret").unwrap();
        std::fs::write(dir.join("file"), "1").unwrap();
        std::os::unix::fs::symlink("../secret", dir.join("out")).unwrap();
        std::os::unix::fs::symlink("file", dir.join("in")).unwrap();
        let secret = top.path().join("secret");
        let files = ImageFiles::Dir(dir);
        assert_eq!(files.read("file", 9).unwrap().unwrap(), b"1");
        assert_eq!(files.read("in", 9).unwrap().unwrap(), b"1");
        assert!(files.read("missing", 9).unwrap().is_none());
        assert!(files.read("file", 0).is_err());
        for name in ["out", "../secret", secret.to_str().unwrap(), "."] {
            assert!(files.read(name, 9).is_err(), "{name}");
        }
    }

    fn archive(files: &[(&str, &str)]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut builder = tar::Builder::new(file.reopen().unwrap());
        for (name, content) in files {
            let mut header = tar::Header::new_ustar();
            match content.strip_prefix("-> ") {
                Some(target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_size(0);
                    builder.append_link(&mut header, name, target).unwrap();
                }
                None => {
                    header.set_size(content.len() as u64);
                    builder
                        .append_data(&mut header, name, content.as_bytes())
                        .unwrap();
                }
            }
        }
        builder.into_inner().unwrap();
        file
    }

    fn content(files: &ArchiveFiles, name: &str) -> Option<String> {
        let (size, mut content) = files.open(name.as_bytes())?;
        let mut text = String::new();
        content.read_to_string(&mut text).unwrap();
        assert_eq!(size, text.len() as u64);
        Some(text)
    }

    #[test]
    fn files_are_read_in_the_archive() {
        let hex = "0".repeat(64);
        let own = archive(&[
            ("./manifest.json", "[]"),
            (&format!("{hex}/layer.tar"), "one"),
            ("again/layer.tar", &format!("-> ../{hex}/layer.tar")),
            ("out/layer.tar", "-> ../../../etc/passwd"),
            ("blobs/sha256/x", ""),
        ]);
        let temporary = tempfile::tempdir().unwrap();
        let read = |expected| ArchiveFiles::read(own.path(), expected, temporary.path()).unwrap();
        let files = read(Entries::Any).unwrap();
        for (name, expected) in [
            ("manifest.json", Some("[]")),
            ("./manifest.json", Some("[]")),
            (&format!("{hex}/layer.tar"), Some("one")),
            ("again/layer.tar", Some("one")),
            ("out/layer.tar", None),
            ("blobs/sha256/x", Some("")),
            ("../manifest.json", None),
            ("missing", None),
        ] {
            assert_eq!(content(&files, name).as_deref(), expected, "{name}");
        }
        // A directory of another name is not in an image.
        assert!(read(Entries::OfImage).is_none());
    }

    #[test]
    fn an_archive_of_a_root_filesystem_is_recognized_by_its_first_entries() {
        let temporary = tempfile::tempdir().unwrap();
        let read = |files: &[(&str, &str)]| {
            let own = archive(files);
            ArchiveFiles::read(own.path(), Entries::OfImage, temporary.path()).unwrap()
        };
        assert!(read(&[("manifest.json", "[]"), ("etc/passwd", "")]).is_none());
        assert!(read(&[("cowl-container.json", ""), ("layers/x", "")]).is_none());
        assert!(read(&[("cowl-container.json", "")]).is_none());
        assert!(read(&[("manifest.json", "[]"), ("x.tar", "")]).is_some());
        let begins = |files: &[(&str, &str)]| {
            let plain = std::fs::read(archive(files).path()).unwrap();
            let own = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(own.path(), zstd::encode_all(&*plain, 1).unwrap()).unwrap();
            begins_like_image(own.path()).unwrap()
        };
        // None of these is unpacked to a temporary file.
        for other in [
            &[("./", ""), ("bin/sh", "")][..],
            &[("./", "")],
            &[("cowl-container.json", ""), ("manifest.json", "")],
            &[("x.tar", ""), ("y.json", "")],
            &[("blobs/x", "")],
        ] {
            assert!(!begins(other), "{other:?}");
        }
        for image in [
            &[("./", ""), ("blobs/", ""), ("blobs/sha256/", "")][..],
            &[("0.tar", ""), ("c.json", ""), ("manifest.json", "")],
            &[("./oci-layout", "")],
        ] {
            assert!(begins(image), "{image:?}");
        }
    }
}
