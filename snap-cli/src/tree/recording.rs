//! Records of attributes that the user cannot store, on the objects of a layer.

use std::os::fd::BorrowedFd;

use cowl_layers::error::Errno;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::{RecordedAttributes, StoredAttributes};
use cowl_layers::shown::Show as _;
use cowl_layers::sys::{stat, xattr};

use super::error::{Context as _, Result};
use super::omissions::{self, Omissions, XattrProblem};
use super::xattr_values;

/// The note on an xattr for which a record has no space.
const XATTR_TOO_LARGE: &str = "skipped an xattr that is too large to be recorded";

/// Whether a record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    Yes,
    /// Without xattrs for which the file system has no space; there is a note on each.
    Partly,
    /// The object cannot have a record, or the import writes none.
    No,
}

/// Changes the record of the object behind `fd`; without one, that of its attributes.
pub(crate) fn update(
    fd: BorrowedFd<'_>,
    path: &[u8],
    omissions: &mut Omissions,
    change: impl FnOnce(&mut RecordedAttributes),
) -> Result<Recorded> {
    let Some(space) = omissions.record_space() else {
        return Ok(Recorded::No);
    };
    let mut record = match read(fd, space, path)? {
        Some(record) => record,
        None => RecordedAttributes::of(&stat::stat_fd(fd).context("cannot read", path)?),
    };
    change(&mut record);
    write(fd, record, path, omissions)
}

/// Writes the record of the object behind `fd`, whose current attributes are those that were stored.
///
/// Xattrs for which the file system has no space are omitted, the largest first.
pub(crate) fn write(
    fd: BorrowedFd<'_>,
    mut record: RecordedAttributes,
    path: &[u8],
    omissions: &mut Omissions,
) -> Result<Recorded> {
    const MESSAGE: &str = "cannot record the attributes of";
    let Some(space) = omissions.record_space() else {
        return Ok(Recorded::No);
    };
    record.stored = StoredAttributes::from(&stat::stat_fd(fd).context(MESSAGE, path)?);
    let (name, mut recorded) = (space.recorded().as_bytes(), Recorded::Yes);
    loop {
        let value = record.to_value();
        if let Some(value) = &value {
            if RecordedAttributes::parse(value).is_err() {
                return Ok(Recorded::No);
            }
            let Err(error) = xattr::set(fd, name, value) else {
                omissions.note_record();
                return Ok(recorded);
            };
            let errno = error.errno();
            match omissions::xattr_problem(fd, name, value, errno) {
                XattrProblem::Other => return Err(error).context(MESSAGE, path),
                _ if matches!(errno, Errno::NOSPC | Errno::TOOBIG | Errno::RANGE) => {}
                // Only files and directories have user xattrs, and not on every file system.
                XattrProblem::Never(_) | XattrProblem::Here => return Ok(Recorded::No),
            }
        }
        let sizes = record.xattrs.iter().enumerate();
        let Some((largest, _)) = sizes.max_by_key(|(_, (_, value))| value.len()) else {
            return Ok(Recorded::No);
        };
        recorded = Recorded::Partly;
        let (omitted, _) = record.xattrs.remove(largest);
        omissions.notes.add_part(XATTR_TOO_LARGE, path, &omitted);
    }
}

/// Updates the attributes on which a record depends, after the last change of the object by an import.
pub(crate) fn refresh(fd: BorrowedFd<'_>, path: &[u8], omissions: &mut Omissions) -> Result<()> {
    let Some(space) = omissions.record_space().filter(|_| omissions.has_records()) else {
        return Ok(());
    };
    match read(fd, space, path)? {
        Some(record) => write(fd, record, path, omissions).map(drop),
        None => Ok(()),
    }
}

/// Removes the record of an earlier entry for the same object.
pub(crate) fn clear(fd: BorrowedFd<'_>, path: &[u8], omissions: &Omissions) -> Result<()> {
    let Some(space) = omissions.record_space().filter(|_| omissions.has_records()) else {
        return Ok(());
    };
    match read(fd, space, path)? {
        Some(_) => xattr::remove(fd, space.recorded().as_bytes())
            .context("cannot remove the recorded attributes of", path),
        None => Ok(()),
    }
}

fn read(fd: BorrowedFd<'_>, space: XattrSpace, path: &[u8]) -> Result<Option<RecordedAttributes>> {
    let value = xattr::get(fd, space.recorded().as_bytes());
    let value = value.context("cannot read the recorded attributes of", path)?;
    Ok(value.and_then(|value| parse(&value, path)))
}

/// Parses a record. An invalid one is ignored: it may come from elsewhere.
pub(crate) fn parse(value: &[u8], path: &[u8]) -> Option<RecordedAttributes> {
    let record = match RecordedAttributes::parse(value) {
        Ok(record) => record,
        Err(why) => {
            log::debug!(
                "the recorded attributes of {} are ignored: {why}",
                path.shown()
            );
            return None;
        }
    };
    let invalid = |(name, value): &(Vec<u8>, Vec<u8>)| xattr_values::invalid(name, value).is_some();
    if record.xattrs.iter().any(invalid) {
        log::debug!(
            "the recorded attributes of {} have an invalid xattr",
            path.shown()
        );
        return None;
    }
    Some(record)
}
