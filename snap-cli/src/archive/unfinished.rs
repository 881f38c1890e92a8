//! Files and directories that appear atomically under their names.
//!
//! They are created under a temporary name in the same directory, synced, and renamed. Until then the final name does
//! not exist, or refers to the previous file.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use cowl_layers::sys;

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// A file that gets its name when it is complete.
///
/// An existing object that is not a regular file (a fifo, /dev/null) is written in place. Without [`Self::finish`] the
/// temporary file is removed on drop.
#[derive(Debug)]
pub struct UnfinishedFile<'p> {
    file: File,
    path: &'p Path,
    temporary: Option<PathBuf>,
}

impl<'p> UnfinishedFile<'p> {
    /// Creates the temporary file.
    pub fn new(path: &'p Path) -> Result<Self> {
        Self::with_mode(path, 0o666)
    }

    /// Creates the temporary file with a mode, of which the umask removes bits.
    pub fn with_mode(path: &'p Path, mode: u32) -> Result<Self> {
        let at = |error| Error::at("write", path, error);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                return Err(Error::failed(format!("{} is a directory", path.shown()))
                    .hint("specify the path of a file"));
            }
            Ok(meta) if !meta.is_file() => {
                let file = File::options().write(true).open(path).map_err(at)?;
                return Ok(Self {
                    file,
                    path,
                    temporary: None,
                });
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(at(error)),
        }
        let temporary = temporary_path(path)?;
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(mode);
        let file = file.open(&temporary).map_err(at)?;
        Ok(Self {
            file,
            path,
            temporary: Some(temporary),
        })
    }

    /// Returns the file to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Syncs the file, renames it to its final name, and syncs the parent directory.
    pub fn finish(mut self) -> Result<()> {
        let at = |error| Error::at("write", self.path, error);
        self.file.flush().map_err(at)?;
        if let Some(temporary) = &self.temporary {
            self.file.sync_all().map_err(at)?;
            std::fs::rename(temporary, self.path).map_err(at)?;
            self.temporary = None;
            // The caller may remove the original as soon as this returns.
            sync_parent(self.path).map_err(at)?;
        }
        Ok(())
    }
}

impl Drop for UnfinishedFile<'_> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(error) = std::fs::remove_file(temporary)
        {
            log::warn!("cannot remove {}: {error}", temporary.shown());
        }
    }
}

/// A directory that gets its name when it is complete.
///
/// Without [`Self::finish`] the temporary directory is removed on drop.
#[derive(Debug)]
pub struct UnfinishedDir<'p> {
    path: &'p Path,
    temporary: Option<PathBuf>,
}

impl<'p> UnfinishedDir<'p> {
    /// Creates the temporary directory.
    ///
    /// The final name must not exist, except as an empty directory.
    pub fn new(path: &'p Path) -> Result<Self> {
        let exists = || {
            Error::failed(format!("{} already exists", path.shown()))
                .hint("specify the path of a new or an empty directory")
        };
        match std::fs::read_dir(path) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(exists());
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(exists()),
            Err(error) => return Err(Error::at("read", path, error)),
        }
        let temporary = temporary_path(path)?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&temporary)
            .map_err(|error| Error::at("create", path, error))?;
        Ok(Self {
            path,
            temporary: Some(temporary),
        })
    }

    /// Returns the path of the directory to fill.
    pub fn path(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(self.path)
    }

    /// Syncs the file system, renames the directory to its final name, and syncs the parent directory.
    pub fn finish(mut self) -> Result<()> {
        let at = |error| Error::at("create", self.path, error);
        if let Some(temporary) = &self.temporary {
            let dir = File::open(temporary).map_err(at)?;
            rustix::fs::syncfs(&dir).map_err(|error| at(error.into()))?;
            std::fs::rename(temporary, self.path).map_err(at)?;
        }
        self.temporary = None;
        sync_parent(self.path).map_err(at)
    }
}

impl Drop for UnfinishedDir<'_> {
    fn drop(&mut self) {
        let Some(temporary) = &self.temporary else {
            return;
        };
        let name = temporary.file_name().unwrap_or_default().as_bytes();
        let removed = sys::dir::open_root(parent_dir(temporary))
            .and_then(|parent| sys::remove::remove_tree(parent.as_fd(), name));
        if let Err(error) = removed {
            log::warn!("cannot remove {}: {error}", temporary.shown());
        }
    }
}

/// Syncs the parent directory of a path, where its file system and its mode permit that.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    let parent = parent_dir(path);
    match File::open(parent).and_then(|parent| parent.sync_all()) {
        // Some file systems cannot sync a directory, and a writable directory need not be readable.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::InvalidInput | ErrorKind::Unsupported | ErrorKind::PermissionDenied
            ) =>
        {
            log::warn!("cannot sync {}: {error}", parent.shown());
            Ok(())
        }
        done => done,
    }
}

/// Returns the directory that contains a path.
fn parent_dir(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Returns a temporary name in the same directory, unique to this process.
fn temporary_path(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::usage(format!(
            "{} does not end in a file name",
            path.shown()
        )));
    };
    let mut name = name.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_temporary_file_has_the_mode_from_the_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let unfinished = UnfinishedFile::with_mode(&path, 0o600).unwrap();
        let mode = unfinished.file().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        unfinished.finish().unwrap();
        assert!(path.is_file());
    }
}
