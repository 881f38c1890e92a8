//! The fuzz targets for archives. See [`cowl_layers::fuzzing`].

use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::Path;

use super::acl::{self, AclValue};
use super::entry_path::{self, PathRole, TreePath};
use super::extended::Extended;
use super::import;
use super::member::{EntryKind, Member};
use super::pax::{self, Records};
use super::stream::Members;
use crate::tree::omissions::Unsupported;
use cowl_layers::format::XattrSpace;
use cowl_layers::layer::Layer;
use cowl_layers::name::Name;
use cowl_layers::sys::{dir, remove};
use cowl_layers::view::View;

/// Reads a tar archive.
///
/// Entries do not outnumber blocks, paths stay inside the root, and no part of an entry is larger than the archive.
pub fn tar(data: &[u8]) {
    let archive = repair(data);
    let mut members = Members::new(archive.as_slice());
    let mut count = 0;
    while let Ok(Some(member)) = members.next() {
        count += 1;
        assert!(count <= data.len() / 512);
        check_member(&member, data.len());
    }
}

/// Unpacks a tar archive into a directory in memory, and again as an image layer over the result.
///
/// No entry changes the directory beside it, which each archive can reach by the path `../outside`.
pub fn unpack(data: &[u8]) {
    let around = Path::new("/dev/shm").join(format!("cowl-fuzz-{}", std::process::id()));
    let done = unpack_in(&around, &repair(data));
    assert!(done.is_ok(), "the directory for the archive: {done:?}");
}

fn unpack_in(around: &Path, archive: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    let (outside, target) = (around.join("outside"), around.join("target"));
    let layer = around.join("layer");
    let secret = outside.join("secret");
    std::fs::DirBuilder::new().mode(0o700).create(around)?;
    std::fs::create_dir(&outside)?;
    std::fs::create_dir(&target)?;
    std::fs::write(&secret, "unchanged")?;
    let state = || -> std::io::Result<_> {
        let (file, dir) = (secret.symlink_metadata()?, outside.symlink_metadata()?);
        let times = (
            file.ctime(),
            file.ctime_nsec(),
            dir.ctime(),
            dir.ctime_nsec(),
        );
        Ok((times, file.nlink(), std::fs::read(&secret)?))
    };
    let before = state()?;
    let (space, skip) = (XattrSpace::detect(), Unsupported::Skip);
    let imported = import::from_stream(archive, &target, space, skip, &mut |_| {});
    let below = View::new(vec![Layer::open(&target, space)?]);
    std::fs::create_dir(&layer)?;
    let over = (Some(below), space);
    let applied = import::image_layer(archive, &layer, over, skip, &mut |_| {});
    assert_eq!(before, state()?, "{imported:?}, {applied:?}");
    assert_eq!(std::fs::read_dir(around)?.count(), 3);
    let parent = dir::open_root(Path::new("/dev/shm"))?;
    let name = around.file_name().unwrap_or_default();
    Ok(remove::remove_tree(parent.as_fd(), name.as_bytes())?)
}

/// Corrects the checksums of blocks that are headers, which a fuzzer cannot compute.
fn repair(data: &[u8]) -> Vec<u8> {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let mut archive = data.to_vec();
    for block in archive.chunks_exact_mut(512) {
        let Some(field) = block.get_mut(CHECKSUM) else {
            continue;
        };
        let is_octal = |byte: &u8| b"01234567 \0".contains(byte);
        if field.iter().all(is_octal) && field.iter().any(u8::is_ascii_digit) {
            field.fill(b' ');
            let sum: u32 = block.iter().copied().map(u32::from).sum();
            if let Some(field) = block.get_mut(CHECKSUM) {
                field.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
    }
    archive
}

fn check_member(member: &Member, limit: usize) {
    check_path(&member.path, PathRole::Name);
    if let EntryKind::HardLink(target) = &member.kind {
        check_path(target, PathRole::LinkTarget);
    }
    let sizes = |(name, value): &(Vec<u8>, Vec<u8>)| name.len() + value.len();
    let xattrs: usize = member.attrs.xattrs.iter().map(sizes).sum();
    // The binary form of an ACL is up to three times as long as its text.
    assert!(xattrs <= 4 * limit, "{xattrs} bytes of xattrs");
    if let Some(sparse) = &member.sparse {
        assert!(sparse.map.0.len() <= limit);
        let mut end = 0;
        for &(offset, length) in &sparse.map.0 {
            assert!(offset >= end);
            end = offset + length;
        }
        assert!(end <= sparse.size);
    }
}

fn check_path(path: &[u8], role: PathRole) {
    if let TreePath::Same(path) | TreePath::Changed(path, _) = entry_path::convert(path, role) {
        let is_name = |part: &[u8]| Name::new(part).is_ok();
        assert!(path.is_empty() || path.split(|&byte| byte == b'/').all(is_name));
    }
}

/// Parses PAX records, times, and names of xattrs.
///
/// Records, times and names survive a round trip. A record that the syntax permits is at most an error of its entry.
pub fn pax(data: &[u8]) {
    let mut records = Records::default();
    let parsed = pax::for_each_record(data, &mut |key, value| records.push(key, value));
    let mut again = Records::default();
    let copy = records.to_bytes();
    pax::for_each_record(&copy, &mut |key, value| again.push(key, value)).unwrap_or_default();
    assert_eq!(again, records);
    let mut extended = Extended::default();
    assert_eq!(extended.read(data).is_ok(), parsed.is_ok());
    let (xattrs, named) = extended.into_xattrs(&Extended::default());
    assert!(xattrs.len() + named.len() <= records.0.len());
    if let Some(time) = pax::parse_time(data) {
        assert!(time.nanos < 1_000_000_000);
        assert_eq!(
            pax::parse_time(pax::format_time(time).as_bytes()),
            Some(time)
        );
    }
    let key = pax::escape_xattr(data);
    assert!(!key.contains(&b'='));
    assert_eq!(pax::unescape_xattr(&key), data);
}

/// Parses an ACL in text form, and one in binary form.
///
/// An ACL survives a round trip through both forms.
pub fn acl(data: &[u8]) {
    if let Ok(AclValue::Binary(binary)) = acl::from_text(data) {
        let text = acl::to_text(&binary);
        let again = text.as_deref().map(acl::from_text);
        assert_eq!(again, Some(Ok(AclValue::Binary(binary))));
    }
    if let Ok(binary) = acl::from_text_with(data, &mut |_, name| u32::try_from(name.len()).ok()) {
        assert!(acl::to_text(&binary).is_some());
    }
    if let Some(text) = acl::to_text(data) {
        assert!(text.len() <= 3 * data.len());
        if let Ok(AclValue::Binary(binary)) = acl::from_text(&text) {
            let canonical = acl::to_text(&binary).unwrap_or_default();
            assert_eq!(acl::from_text(&canonical), Ok(AclValue::Binary(binary)));
        }
    }
}

#[cfg(test)]
mod tests {
    use cowl_layers::fuzzing::replay;

    #[test]
    fn corpora_are_replayed() {
        replay("tar", super::tar);
        replay("unpack", super::unpack);
        replay("pax", super::pax);
        replay("acl", super::acl);
    }
}
