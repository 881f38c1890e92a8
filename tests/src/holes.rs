//! The data segments of sparse files.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Result;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{FileType, SeekFrom, seek};
use rustix::io::Errno;

use crate::tree::Tree;

/// Offset and end of each data segment, by the path of the file.
pub type Segments = BTreeMap<Vec<u8>, Vec<(u64, u64)>>;

/// Returns the data segments of the regular files of a tree that was read from `root`.
pub fn segments(root: &Path, tree: &Tree) -> Result<Segments> {
    let mut all = Segments::new();
    for (path, entry) in tree {
        if entry.kind == FileType::RegularFile {
            let file = File::open(root.join(OsStr::from_bytes(path)))?;
            all.insert(path.clone(), segments_of(&file, entry.size)?);
        }
    }
    Ok(all)
}

fn segments_of(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let (mut found, mut offset) = (Vec::new(), 0);
    while offset < size {
        let start = match seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // No data up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        offset = seek(file, SeekFrom::Hole(start))?;
        found.push((start, offset));
    }
    Ok(found)
}
