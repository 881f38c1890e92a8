//! Reads and atomic writes of the store's files: after a crash, a file has either its old or its new content.
//!
//! This module handles files and directories and knows nothing of containers.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::record::{Body, Record, RecordError};
use crate::error::{Error, Kind, Result};
use cowl_layers::shown::Show as _;
use cowl_layers::sys;

/// The suffix of temporary files.
pub const TEMPORARY: &str = ".tmp";

/// The flag for opening a file for writing: a symlink in its place would lead out of the store.
pub(crate) const NO_LINK: i32 = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();

/// Opens a file or directory of the store for reading.
///
/// Does not block if another kind of object, such as a FIFO, is in its place.
pub fn open(path: &Path) -> std::io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
}

/// Reads a file of the store, which must be a regular one.
pub fn read_bytes(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = open(path)?;
    if !file.metadata()?.is_file() {
        let what = "it is not a regular file";
        return Err(std::io::Error::new(ErrorKind::InvalidData, what));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns the error for a file of the store that cannot be read.
pub(super) fn unreadable(path: &Path, error: std::io::Error) -> Error {
    let damaged = matches!(error.kind(), ErrorKind::InvalidData);
    let error = Error::at("read", path, error);
    match damaged {
        true => Error {
            kind: Kind::Damaged,
            ..error
        }
        .hint("restore the file from a backup; nothing was changed"),
        false => error,
    }
}

/// Returns whether the error means that the file, or a directory in its path, does not exist.
pub(super) fn is_absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Reads a record; `None` if the file does not exist.
pub fn read_opt<T: Body>(path: &Path) -> Result<Option<Record<T>>> {
    let bytes = match read_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(unreadable(path, error)),
    };
    Record::decode(&bytes)
        .map(Some)
        .map_err(|error| record_error::<T>(path, error))
}

/// Reads a record that must exist.
pub fn read<T: Body>(path: &Path) -> Result<Record<T>> {
    read_opt(path)?.ok_or_else(|| missing::<T>(path))
}

/// Returns the error for a record that must exist and does not.
pub fn missing<T: Body>(path: &Path) -> Error {
    Error::damaged(format!(
        "the {} file {} is missing",
        T::TYPE_NAME,
        path.shown()
    ))
    .hint("restore it from a backup; nothing was changed")
}

/// Returns the error for a record that cannot be decoded.
fn record_error<T: Body>(path: &Path, error: RecordError) -> Error {
    let newer = matches!(error, RecordError::Newer { .. });
    let what = format!("cannot use the {} file {}", T::TYPE_NAME, path.shown());
    if newer {
        Error::new(Kind::Failed, what)
            .because(error)
            .hint("a newer cowl made it: install that version; nothing was changed")
    } else {
        Error::damaged(what)
            .because(error)
            .hint("restore the file from a backup; nothing was changed")
    }
}

/// Returns the error for a record whose fields are well-formed but violate an invariant.
pub fn invalid<T: Body>(path: &Path, why: String) -> Error {
    record_error::<T>(path, RecordError::Shape(why))
}

/// Encodes a record that is written to `path`.
fn encode<T: Body>(path: &Path, record: &Record<T>) -> Result<Vec<u8>> {
    record
        .encode()
        .map_err(|error| Error::at("write", path, error))
}

/// Replaces the file at `path` by a record, atomically: temporary file, fsync, rename, fsync of the directory.
pub fn replace<T: Body>(path: &Path, record: &Record<T>) -> Result<()> {
    replace_bytes(path, &encode(path, record)?)
}

/// Replaces the content of the file at `path`, like [`replace`].
pub fn replace_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = sibling_path(path, &format!("{}{TEMPORARY}", std::process::id()))?;
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(NO_LINK)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
    if let Err(error) = written.and_then(|()| std::fs::rename(&temporary, path)) {
        remove_if_exists(&temporary)?;
        return Err(Error::at("write", path, error));
    }
    sync_parent(path)
}

/// Writes a new file. Fails if the file exists.
///
/// The content is durable only after [`sync_file`], the name only after [`sync_dir`]. A caller that writes several
/// files syncs them together, which costs no more than one sync.
pub fn write_new<T: Body>(path: &Path, record: &Record<T>) -> Result<()> {
    let bytes = encode(path, record)?;
    let at = |error| Error::at("write", path, error);
    let made = OpenOptions::new().write(true).create_new(true).open(path);
    let mut file = made.map_err(at)?;
    file.write_all(&bytes).map_err(|error| {
        // On a full disk, an empty file would remain.
        drop(remove_if_exists(path));
        at(error)
    })
}

/// Syncs a file or directory.
pub fn sync_file(path: &Path) -> Result<()> {
    open(path)
        .and_then(|file| file.sync_all())
        .map_err(|error| Error::at("sync", path, error))
}

/// A file system that can be synced as a whole.
///
/// syncfs(2) reports all writeback errors since the descriptor was opened.
#[derive(Debug)]
pub struct Filesystem {
    file: File,
    path: PathBuf,
}

impl Filesystem {
    /// Opens the file system that holds `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let file = open(path).map_err(|error| Error::at("open", path, error))?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Returns the file system of a descriptor that another process opened for `path`.
    pub fn from_descriptor(file: OwnedFd, path: &Path) -> Self {
        Self {
            file: File::from(file),
            path: path.to_path_buf(),
        }
    }

    /// Returns another descriptor of the same open file description.
    pub fn share(&self) -> Result<OwnedFd> {
        self.try_clone().map(|other| OwnedFd::from(other.file))
    }

    /// Returns a second handle to the same open file description. A writeback error is reported to only one of the
    /// two.
    pub fn try_clone(&self) -> Result<Self> {
        let file = self.file.try_clone();
        Ok(Self {
            file: file.map_err(|error| Error::at("open", &self.path, error))?,
            path: self.path.clone(),
        })
    }

    /// Writes back all data of the file system and waits until it is durable.
    pub fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.file).map_err(|error| {
            Error::at(
                "sync the file system of",
                &self.path,
                std::io::Error::from(error),
            )
        })
    }
}

/// Syncs the file system that holds `path`.
///
/// Earlier writeback errors may be missed, because they are reported once, perhaps to another process. If they matter,
/// open a [`Filesystem`] before the writes.
pub fn sync_all(path: &Path) -> Result<()> {
    Filesystem::open(path)?.sync()
}

/// Syncs the entries of a directory.
pub fn sync_dir(path: &Path) -> Result<()> {
    sync_file(path)
}

/// Syncs the entries of the directory that contains `path`.
pub fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync_dir)
}

/// Moves a file or directory within the store and syncs both parent directories.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    rename_unsynced(from, to)?;
    sync_parent(to)?;
    if from.parent() != to.parent() {
        sync_parent(from)?;
    }
    Ok(())
}

/// Moves a file or directory within the store. The caller syncs both parent directories.
pub fn rename_unsynced(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|error| {
        Error::failed(format!("cannot move {} to {}", from.shown(), to.shown())).because(error)
    })
}

/// Creates a directory unless it exists.
pub fn ensure_dir(path: &Path) -> Result<()> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::at("create the directory", path, error)),
    }
}

/// Creates a directory with mode 0700 and syncs its parent, unless it exists.
pub fn ensure_private_dir(path: &Path) -> Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(Error::at("create the directory", path, error)),
    }
}

/// Creates an empty file. Fails if it exists.
pub fn touch(path: &Path) -> Result<()> {
    File::create_new(path)
        .map(drop)
        .map_err(|error| Error::at("write", path, error))
}

/// Removes a file if it exists.
pub fn remove_if_exists(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::at("remove", path, error)),
    }
}

/// Removes a directory tree of any depth if it exists.
pub fn remove_tree(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::failed(format!(
            "cannot remove {}: the path does not end in a name",
            path.shown()
        )));
    };
    let dir = match sys::dir::open_root(parent) {
        Ok(dir) => dir,
        Err(error) if error.is_absent() => return Ok(()),
        Err(error) => return Err(Error::at("remove", path, error)),
    };
    sys::remove::tree(dir.as_fd(), name.as_bytes()).map_err(|stopped| {
        let at = match stopped.path.as_slice() {
            b"" => path.to_path_buf(),
            inner => path.join(std::ffi::OsStr::from_bytes(inner)),
        };
        Error::at("remove", &at, stopped.error)
    })
}

/// Returns whether an object exists at `path`, a dangling symlink included.
pub fn exists(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(Error::at("inspect", path, error)),
    }
}

/// Returns whether a directory exists at `path`. Any other object, a symlink included, is an error of kind "damaged".
pub fn is_dir(path: &Path) -> Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => Ok(true),
        Ok(_) => Err(
            Error::damaged(format!("{} is not a directory", path.shown()))
                .hint("restore it from a backup; nothing was changed"),
        ),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(Error::at("inspect", path, error)),
    }
}

/// Returns the sorted names in a directory; empty if it does not exist.
///
/// Names that are not valid UTF-8 are skipped: cowl never creates such names.
pub fn names(path: &Path) -> Result<Vec<String>> {
    let at = |error| Error::at("list", path, error);
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.map_err(at)?.file_name().into_string() {
            found.push(name);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Returns `path` with `.ENDING` appended to its name.
fn sibling_path(path: &Path, ending: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::failed(format!(
            "cannot write {}: the path does not end in a name",
            path.shown()
        )));
    };
    let mut name = name.to_owned();
    name.push(".");
    name.push(ending);
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::super::manifest::{LayerKind, LayerManifest};
    use super::*;

    fn layer() -> Record<LayerManifest> {
        Record::first(LayerManifest {
            created: String::new(),
            ..LayerManifest::new(LayerKind::Delta, &[], &[])
        })
    }

    #[test]
    fn a_damaged_file_is_reported_with_its_path_and_kind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.json");
        assert!(read_opt::<LayerManifest>(&path).unwrap().is_none());
        assert_eq!(
            read::<LayerManifest>(&path).unwrap_err().kind,
            Kind::Damaged
        );
        replace(&path, &layer()).unwrap();
        assert_eq!(read::<LayerManifest>(&path).unwrap(), layer());
        let text = std::fs::read_to_string(&path)
            .unwrap()
            .replace("delta", "base");
        std::fs::write(&path, text).unwrap();
        let error = read::<LayerManifest>(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Damaged);
        assert!(error.what.contains("layer.json"), "{error}");
    }

    #[test]
    fn a_newer_format_is_not_reported_as_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.json");
        std::fs::write(&path, b"{\"format\": 2, \"checksum\": \"crc:1\"}").unwrap();
        let error = read::<LayerManifest>(&path).unwrap_err();
        assert_eq!(error.kind, Kind::Failed);
        assert!(error.to_string().contains("format 2"), "{error}");
    }

    #[test]
    fn replacing_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.json");
        replace(&path, &layer()).unwrap();
        replace(&path, &layer().next(layer().body)).unwrap();
        assert_eq!(names(dir.path()).unwrap(), ["layer.json"]);
        assert!(write_new(&path, &layer()).is_err());
    }
}
