//! Opens images: those that the user names as such, and those that are recognized by their content.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::ImageSource;
use super::docker::{self, SavedImage};
use super::files::{ArchiveFiles, Entries, ImageFiles};
use super::layout::{LayoutFiles, OciImage};
use super::reference::Transport;
use crate::archive::image::{self, DirImage};
use crate::tree::error::{ErrorKind, Result, TreeError};

const LAYOUT: &str = "oci-layout";
const INDEX: &str = "index.json";

/// Opens an image. A compressed archive is unpacked in the directory `temporary`.
pub fn open(
    transport: Transport,
    path: &Path,
    name: Option<String>,
    temporary: &Path,
) -> Result<Box<dyn ImageSource>> {
    let archive = || -> Result<ImageFiles> {
        let found = ArchiveFiles::read(path, Entries::Any, temporary)?;
        found.map(ImageFiles::Archive).ok_or_else(|| {
            TreeError::new(ErrorKind::NotAnArchive, "not an image").at(path.as_os_str().as_bytes())
        })
    };
    Ok(match transport {
        Transport::Oci => oci(ImageFiles::Dir(path.to_owned()), name),
        Transport::OciArchive => oci(archive()?, name),
        Transport::DockerArchive => Box::new(SavedImage {
            files: archive()?,
            name,
        }),
    })
}

fn oci(files: ImageFiles, tag: Option<String>) -> Box<dyn ImageSource> {
    Box::new(OciImage::new(LayoutFiles(files), tag))
}

/// Opens the image at a path, if it is recognized as one by its content.
///
/// Returns `None` for everything else, also for a file that is damaged or not an archive.
pub fn recognize(path: &Path, temporary: &Path) -> Result<Option<Box<dyn ImageSource>>> {
    if path.is_dir() {
        let files = ImageFiles::Dir(path.to_owned());
        return Ok(match image::in_dir(path)? {
            Some(DirImage::Oci) => Some(oci(files, None)),
            Some(DirImage::Saved) => Some(Box::new(SavedImage { files, name: None })),
            Some(DirImage::Skopeo) | None => None,
        });
    }
    in_archive(path, temporary)
}

fn in_archive(path: &Path, temporary: &Path) -> Result<Option<Box<dyn ImageSource>>> {
    // The other side of a FIFO would notice that it is opened and closed.
    if !path.is_file() {
        return Ok(None);
    }
    let archive = match ArchiveFiles::read(path, Entries::OfImage, temporary) {
        Ok(Some(archive)) => archive,
        Ok(None) => return Ok(None),
        // It is an image, or may be one.
        Err(error) if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Limit) => {
            return Err(error);
        }
        Err(error) => {
            log::debug!("not an image: {error}");
            return Ok(None);
        }
    };
    let is_layout = archive.has(LAYOUT) && archive.has(INDEX);
    let is_saved = archive.has(docker::MANIFEST);
    let files = ImageFiles::Archive(archive);
    Ok(match (is_layout, is_saved) {
        (true, _) => Some(oci(files, None)),
        (false, true) => {
            let image = SavedImage { files, name: None };
            image.is_one().then(|| Box::new(image) as _)
        }
        (false, false) => None,
    })
}
