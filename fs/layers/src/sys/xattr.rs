//! Extended attributes of an object, by descriptor (which may be O_PATH) or by name in a directory.

use std::os::fd::BorrowedFd;

use rustix::fs::XattrFlags;

use crate::error::{Errno, Error, Result};
use crate::sys::{by_descriptor, fault, proc_path, proc_path_at, xattr_at};

/// The xattr whose value the kernel interprets and may refuse to return.
const CAPABILITY: &[u8] = b"security.capability";

/// Returns the value of the xattr `name`; `None` if the object has none, or the file system does not support xattrs.
///
/// Capabilities that the kernel refuses to return are empty, see [`is_invalid`].
pub fn get(fd: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Vec<u8>>> {
    absent_as_none(invalid_as_empty(name, value(fd, name)))
}

/// Whether `error` is that of reading capabilities whose value is invalid.
///
/// Such exist: setxattr(2) accepts an empty value, and a file system can contain any other. They grant nothing, and
/// an empty value is as invalid, so a copy of the file gets an empty one.
pub fn is_invalid(name: &[u8], error: &Error) -> bool {
    name == CAPABILITY && error.errno() == Errno::INVAL
}

fn invalid_as_empty(name: &[u8], result: Result<Vec<u8>>) -> Result<Vec<u8>> {
    match result {
        Err(error) if is_invalid(name, &error) => Ok(Vec::new()),
        other => other,
    }
}

/// Returns the value of the xattr `name`.
///
/// Fails with ENODATA if the object has none, and with EOPNOTSUPP if the file system does not support xattrs.
pub fn value(fd: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>> {
    let path = proc_path(fd);
    sized(|buffer| {
        let reborrowed = &mut *buffer;
        match rustix::fs::fgetxattr(fd, name, reborrowed) {
            Err(Errno::BADF) => rustix::fs::getxattr(path.as_slice(), name, buffer),
            done => done,
        }
    })
}

/// Returns the value of the xattr `name` of the object `entry` in `dir`, like [`get`]. Does not follow links.
pub fn get_at(dir: BorrowedFd<'_>, entry: &[u8], name: &[u8]) -> Result<Option<Vec<u8>>> {
    let found = sized(|buffer| {
        xattr_at::get(dir, entry, name, buffer).unwrap_or_else(|| {
            let path = proc_path_at(dir, entry);
            rustix::fs::lgetxattr(path.as_slice(), name, buffer)
        })
    });
    absent_as_none(invalid_as_empty(name, found))
}

/// Whether the xattr `name` is an alias of an ACL: XFS lists its ACLs under these names, too.
///
/// [`list`] and [`all`] omit them. Copied as separate xattrs, they would survive a removal of the ACL, and become the
/// ACL again when they are written to an XFS.
pub fn is_alias(name: &[u8]) -> bool {
    name == b"trusted.SGI_ACL_FILE" || name == b"trusted.SGI_ACL_DEFAULT"
}

/// Lists the names of all xattrs except for [aliases](is_alias), without the terminating NUL.
pub fn list(fd: BorrowedFd<'_>) -> Result<Vec<Box<[u8]>>> {
    let path = proc_path(fd);
    let raw = sized(|buffer| rustix::fs::listxattr(path.as_slice(), buffer));
    Ok(split(&absent_as_none(raw)?.unwrap_or_default()))
}

/// Like [`list`], for a descriptor that is not O_PATH. Takes one system call and no path through /proc.
pub fn list_open(fd: BorrowedFd<'_>) -> Result<Vec<Box<[u8]>>> {
    let raw = sized(|buffer| rustix::fs::flistxattr(fd, buffer));
    Ok(split(&absent_as_none(raw)?.unwrap_or_default()))
}

/// Lists the names of the xattrs of the object `entry` in `dir`, like [`list`]. Does not follow links.
pub fn list_at(dir: BorrowedFd<'_>, entry: &[u8]) -> Result<Vec<Box<[u8]>>> {
    let call = |buffer: &mut [u8]| {
        xattr_at::list(dir, entry, buffer).unwrap_or_else(|| {
            let path = proc_path_at(dir, entry);
            rustix::fs::llistxattr(path.as_slice(), buffer)
        })
    };
    let mut small = [0_u8; 512];
    match call(&mut small) {
        // Most files have no xattrs; avoid an allocation for them.
        Ok(0) | Err(Errno::NOTSUP) => Ok(Vec::new()),
        Ok(n) => Ok(split(small.get(..n).unwrap_or_default())),
        Err(Errno::RANGE) => {
            let raw = sized(call)?;
            Ok(split(&raw))
        }
        Err(error) => Err(error.into()),
    }
}

/// Sets an xattr. `flags` are XATTR_CREATE and XATTR_REPLACE, as for setxattr(2).
pub fn set_with(fd: BorrowedFd<'_>, name: &[u8], value: &[u8], flags: u32) -> Result<()> {
    let _change = fault::begin()?;
    let flags = XattrFlags::from_bits_retain(flags);
    Ok(by_descriptor(
        || rustix::fs::fsetxattr(fd, name, value, flags),
        || rustix::fs::setxattr(proc_path(fd).as_slice(), name, value, flags),
    )?)
}

/// Creates or replaces an xattr.
pub fn set(fd: BorrowedFd<'_>, name: &[u8], value: &[u8]) -> Result<()> {
    set_with(fd, name, value, 0)
}

/// Removes an xattr; fails with ENODATA if it does not exist.
pub fn remove(fd: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let _change = fault::begin()?;
    Ok(rustix::fs::removexattr(proc_path(fd).as_slice(), name)?)
}

/// Returns all xattrs with their values, sorted by name.
pub fn all(fd: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    for name in list(fd)? {
        if let Some(value) = get(fd, &name)? {
            found.push((name.into_vec(), value));
        }
    }
    found.sort();
    Ok(found)
}

fn absent_as_none(result: Result<Vec<u8>>) -> Result<Option<Vec<u8>>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.errno(), Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Retries `call` with a larger buffer until the result fits.
///
/// The size is not queried first, because it may grow before the second call.
fn sized(mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>> {
    let mut buffer = vec![0_u8; 256];
    loop {
        match call(&mut buffer) {
            Ok(n) => {
                buffer.truncate(n);
                return Ok(buffer);
            }
            // 64 KiB is the kernel's own limit (XATTR_SIZE_MAX, XATTR_LIST_MAX).
            Err(Errno::RANGE) if buffer.len() < 64 * 1024 => buffer.resize(buffer.len() * 4, 0),
            Err(error) => return Err(error.into()),
        }
    }
}

fn split(raw: &[u8]) -> Vec<Box<[u8]>> {
    raw.split(|&byte| byte == 0)
        .filter(|name| !name.is_empty() && !is_alias(name))
        .map(Into::into)
        .collect()
}
