//! Files and folders that get their names when they are complete: made beside their place, put on the
//! disk, and renamed. Until then there is nothing under the name, or what was there before.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use cowl_layers::sys;

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// A file. What is no regular file (a fifo, /dev/null) is written as it is.
#[derive(Debug)]
pub struct UnfinishedFile<'p> {
    file: File,
    path: &'p Path,
    temporary: Option<PathBuf>,
}

impl<'p> UnfinishedFile<'p> {
    /// Begins.
    pub fn new(path: &'p Path) -> Result<Self> {
        let at = |error| Error::at("write", path, error);
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                return Err(Error::failed(format!("{} is a folder", path.shown()))
                    .hint("name a file to write"));
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
        let temporary = beside(path)?;
        let file = File::create_new(&temporary).map_err(at)?;
        Ok(Self {
            file,
            path,
            temporary: Some(temporary),
        })
    }

    /// What to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name.
    pub fn finish(mut self) -> Result<()> {
        let at = |error| Error::at("write", self.path, error);
        self.file.flush().map_err(at)?;
        if let Some(temporary) = &self.temporary {
            self.file.sync_all().map_err(at)?;
            std::fs::rename(temporary, self.path).map_err(at)?;
            self.temporary = None;
            // What it is a copy of may be removed as soon as this returns.
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

/// A folder.
#[derive(Debug)]
pub struct UnfinishedFolder<'p> {
    path: &'p Path,
    temporary: Option<PathBuf>,
}

impl<'p> UnfinishedFolder<'p> {
    /// Begins. There may be an empty folder of this name, and nothing else.
    pub fn new(path: &'p Path) -> Result<Self> {
        let taken = || {
            Error::failed(format!("{} is there already", path.shown()))
                .hint("name a folder that is not there yet, or an empty one")
        };
        match std::fs::read_dir(path) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(taken());
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(taken()),
            Err(error) => return Err(Error::at("read", path, error)),
        }
        let temporary = beside(path)?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&temporary)
            .map_err(|error| Error::at("make", path, error))?;
        Ok(Self {
            path,
            temporary: Some(temporary),
        })
    }

    /// The folder to fill.
    pub fn path(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(self.path)
    }

    /// Puts everything on the disk and gives it its name.
    pub fn finish(mut self) -> Result<()> {
        let at = |error| Error::at("make", self.path, error);
        if let Some(temporary) = &self.temporary {
            let folder = File::open(temporary).map_err(at)?;
            rustix::fs::syncfs(&folder).map_err(|error| at(error.into()))?;
            std::fs::rename(temporary, self.path).map_err(at)?;
        }
        self.temporary = None;
        sync_parent(self.path).map_err(at)
    }
}

impl Drop for UnfinishedFolder<'_> {
    fn drop(&mut self) {
        let Some(temporary) = &self.temporary else {
            return;
        };
        let name = temporary.file_name().unwrap_or_default().as_bytes();
        let removed = sys::dir::open_root(sys_parent(temporary))
            .and_then(|parent| sys::remove::remove_tree(parent.as_fd(), name));
        if let Err(error) = removed {
            log::warn!("cannot remove {}: {error}", temporary.shown());
        }
    }
}

/// Makes a name durable, where its file system and the modes allow that.
fn sync_parent(path: &Path) -> std::io::Result<()> {
    let parent = sys_parent(path);
    match File::open(parent).and_then(|parent| parent.sync_all()) {
        // Some file systems cannot sync a directory, and one that may be written need not be readable.
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

/// The folder that a path lies in.
fn sys_parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// Puts everything that is in a folder into a plain tar archive.
pub fn pack(folder: &Path, output: &File) -> Result<()> {
    let packed = || {
        let mut archive = tar::Builder::new(std::io::BufWriter::new(output));
        archive.append_dir_all("", folder)?;
        archive.into_inner()?.flush()
    };
    packed().map_err(|error| Error::failed("cannot pack the image").because(error))
}

fn beside(path: &Path) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::usage(format!(
            "{} names nothing that can be made",
            path.shown()
        )));
    };
    let mut name = name.to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    Ok(path.with_file_name(name))
}
