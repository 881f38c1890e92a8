//! Recognizes container images, which are directories or tar archives but not root filesystems.

use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use cowl_layers::error::Errno;
use cowl_layers::sys::stat::FileKind;
use cowl_layers::sys::{content, dir, stat};
use rustix::fs::OFlags;

use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};

/// The treatment of a source that is a container image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Images {
    /// Refuse it.
    Refuse,
    /// Import its files as they are.
    ImportAsFiles,
}

/// Every root filesystem that a distribution or a build creates has at least one of these.
const ROOT_NAMES: [&[u8]; 12] = [
    b"bin", b"dev", b"etc", b"home", b"lib", b"lib64", b"proc", b"root", b"sbin", b"sys", b"usr",
    b"var",
];

/// The number of bytes of a file that are read to recognize it.
const HEAD: u64 = 64 << 10;

/// The form of an image in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirImage {
    /// An OCI image layout.
    Oci,
    /// An unpacked archive of `docker save`.
    Saved,
    /// A directory of `skopeo copy`, which cannot be imported.
    Skopeo,
}

impl DirImage {
    fn name(self) -> &'static str {
        match self {
            Self::Oci => "an OCI image",
            Self::Saved => "a docker save image",
            Self::Skopeo => "a container image in a directory",
        }
    }
}

/// Refuses the directory `tree`, unpacked or original, if it is a container image.
pub fn refuse(tree: &Path) -> Result<()> {
    match in_dir(tree)? {
        None => Ok(()),
        Some(image) => {
            let what = format!("this is {}, not a root filesystem", image.name());
            Err(TreeError::new(ErrorKind::Image, what))
        }
    }
}

/// Returns the form of the image that the directory `tree` is, if it is one.
pub fn in_dir(tree: &Path) -> Result<Option<DirImage>> {
    let name = tree.as_os_str().as_bytes();
    let root = dir::open_root(tree).context("cannot open the source", name)?;
    recognize(root.as_fd()).context("cannot read the source", name)
}

/// Returns the form of the image if the directory has all parts of one and no directory of a root filesystem.
fn recognize(root: BorrowedFd<'_>) -> cowl_layers::error::Result<Option<DirImage>> {
    for name in ROOT_NAMES {
        match stat::stat_at(root, name) {
            Ok(_) => return Ok(None),
            Err(error) if error.errno() == Errno::NOENT => {}
            Err(error) => return Err(error),
        }
    }
    let has = |head: &Option<Vec<u8>>, text: &[u8]| {
        let windows = |head: &Vec<u8>| head.windows(text.len()).any(|part| part == text);
        head.as_ref().is_some_and(windows)
    };
    let layout = head(root, b"oci-layout")?;
    if has(&layout, b"\"imageLayoutVersion\"") && head(root, b"index.json")?.is_some() {
        return Ok(Some(DirImage::Oci));
    }
    let manifest = head(root, b"manifest.json")?;
    let is_list = (manifest.as_ref()).is_some_and(|head| head.trim_ascii_start().starts_with(b"["));
    if is_list && has(&manifest, b"\"Config\"") && has(&manifest, b"\"Layers\"") {
        return Ok(Some(DirImage::Saved));
    }
    let version = head(root, b"version")?;
    if manifest.is_some() && has(&version, b"Directory Transport Version:") {
        return Ok(Some(DirImage::Skopeo));
    }
    Ok(None)
}

/// Reads the start of a regular file; `None` if there is no regular file of this name.
fn head(root: BorrowedFd<'_>, name: &[u8]) -> cowl_layers::error::Result<Option<Vec<u8>>> {
    let found = match dir::open_path(root, name) {
        Ok(found) => found,
        Err(error) if error.errno() == Errno::NOENT => return Ok(None),
        Err(error) => return Err(error),
    };
    if stat::stat_fd(&found)?.kind() != FileKind::Regular {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = std::fs::File::from(content::reopen(found.as_fd(), flags)?);
    let mut head = Vec::new();
    let read = file.take(HEAD).read_to_end(&mut head);
    read.map_err(|error| {
        let raw = error.raw_os_error().unwrap_or_default();
        cowl_layers::Error::Errno(Errno::from_raw_os_error(raw))
    })?;
    Ok(Some(head))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const LAYOUT: (&str, &str) = ("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
    const INDEX: (&str, &str) = ("index.json", "{}");
    const SAVED: (&str, &str) = (
        "manifest.json",
        r#" [{"Config":"c.json","RepoTags":null,"Layers":["l.tar"]}]"#,
    );

    fn is_refused(files: &[(&str, &str)]) -> bool {
        let tree = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = tree.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        match refuse(tree.path()) {
            Ok(()) => false,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Image);
                true
            }
        }
    }

    #[test]
    fn every_image_format_is_recognized() {
        let version = ("version", "Directory Transport Version: 1.1\n");
        assert!(is_refused(&[LAYOUT, INDEX, ("blobs/sha256/x", "")]));
        assert!(is_refused(&[SAVED, ("c.json", "{}"), ("l.tar", "")]));
        assert!(is_refused(&[version, ("manifest.json", "{}")]));
    }

    #[test]
    fn root_filesystems_with_image_file_names_are_accepted() {
        let etc = ("etc/hostname", "h");
        for files in [
            &[LAYOUT, INDEX, SAVED, etc][..],
            &[LAYOUT, INDEX, ("usr", "")],
            &[INDEX, ("blobs/x", ""), ("app/run", "")],
            &[("oci-layout", "notes"), INDEX],
            &[LAYOUT],
            &[("manifest.json", r#"{"Config":1,"Layers":2}"#)],
            &[("manifest.json", r#"[{"name":"x"}]"#)],
            &[("manifest.json/x", ""), ("version/x", "")],
            &[],
        ] {
            assert!(!is_refused(files), "{files:?}");
        }
    }
}
