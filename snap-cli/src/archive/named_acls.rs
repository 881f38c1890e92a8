//! ACLs that contain names of users and groups.
//!
//! The names are resolved in `etc/passwd` and `etc/group` of the archive itself, because its ids are those of its own
//! users. These files may follow the objects that refer to them, so such ACLs are set when the tree is complete.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;

use cowl_layers::sys::content;
use cowl_layers::sys::dir;
use cowl_layers::sys::stat::{self, FileKind};
use rustix::fs::OFlags;

use super::acl::{self, AclName};
use super::dir_attrs::DirAttrs;
use super::limits;
use crate::tree::attrs;
use crate::tree::dir_cursor::DirCursor;
use crate::tree::error::{Context as _, ErrorKind, Result, TreeError};
use crate::tree::in_root::{self, Resolved};
use crate::tree::omissions::Omissions;
use crate::tree::path;
use crate::tree::path_map::PathMap;

/// ACLs in text form, by the names of their xattrs.
type AclTexts = Vec<(&'static [u8], Vec<u8>)>;

/// The ACLs to set when the tree is complete.
#[derive(Debug, Default)]
pub(super) struct NamedAcls {
    objects: PathMap<AclTexts>,
    bytes: usize,
}

impl NamedAcls {
    /// Records the ACLs of a new object. They replace those of an earlier object with the same path.
    pub(super) fn set(&mut self, path: &[u8], acls: AclTexts) -> Result<()> {
        if acls.is_empty() && !self.objects.has(path) {
            return Ok(());
        }
        let texts = acls.iter().map(|(_, text)| text.len());
        self.bytes += path.len() + texts.sum::<usize>();
        if self.bytes > limits::NAMED_ACLS {
            let what = format!(
                "the ACLs with names of users and groups exceed the limit of {} bytes",
                limits::NAMED_ACLS
            );
            return Err(limits::exceeded(what, path));
        }
        self.objects.insert(path, acls);
        Ok(())
    }

    /// Discards the ACLs at and below a path that is about to be replaced.
    pub(super) fn forget(&mut self, path: &[u8]) {
        self.objects.remove_all(path);
    }

    /// Sets the ACLs of files, and passes those of directories to `dir_attrs`.
    pub(super) fn finish(
        self,
        dirs: &mut DirCursor,
        dir_attrs: &mut DirAttrs,
        omissions: &mut Omissions,
    ) -> Result<()> {
        if self.bytes == 0 {
            return Ok(());
        }
        let ids = read_ids(dirs)?;
        self.objects.each(|path, acls| {
            for (xattr, text) in acls {
                let mut unknown = Vec::new();
                let binary = acl::from_text_with(text, &mut |kind, name| {
                    let id = ids.get(&(kind, name.to_vec())).copied();
                    if id.is_none() {
                        unknown.push(name.to_vec());
                    }
                    id
                });
                for name in unknown {
                    let reason =
                        "skipped an ACL entry for a user or group that the archive does not define";
                    omissions.notes.add_part(reason, path, &name);
                }
                // The text was validated before.
                if let Ok(binary) = binary {
                    set(dirs, dir_attrs, omissions, (path, xattr, binary))?;
                }
            }
            Ok(())
        })
    }
}

fn set(
    dirs: &mut DirCursor,
    dir_attrs: &mut DirAttrs,
    omissions: &mut Omissions,
    (path, xattr, value): (&[u8], &'static [u8], Vec<u8>),
) -> Result<()> {
    let (parent, name) = path::split(path);
    let parent = dirs.open(parent)?;
    if name.is_empty() {
        return dir_attrs.add_acl(path, xattr, value);
    }
    let object = dir::open_path(parent, name).context("cannot open", path)?;
    match stat::stat_fd(&object).context("cannot read", path)?.kind() {
        FileKind::Directory => dir_attrs.add_acl(path, xattr, value),
        _ => attrs::set_xattr(object.as_fd(), xattr, &value, path, omissions),
    }
}

/// Reads the ids of the users and groups that the tree defines.
fn read_ids(dirs: &mut DirCursor) -> Result<HashMap<(AclName, Vec<u8>), u32>> {
    let mut ids = HashMap::new();
    for (kind, file) in [
        (AclName::User, &b"etc/passwd"[..]),
        (AclName::Group, b"etc/group"),
    ] {
        for line in read_within(dirs, file)?.split(|&byte| byte == b'\n') {
            let mut fields = line.split(|&byte| byte == b':');
            let id = fields
                .next()
                .zip(fields.nth(1))
                .and_then(|(name, id)| Some((name, acl::parse_id(Some(id), b"")?)));
            if let Some((name, id)) = id {
                // As for getpwnam(3), the first one counts.
                ids.entry((kind, name.to_vec())).or_insert(id);
            }
        }
    }
    Ok(ids)
}

/// Reads the start of a regular file of the tree; without such a file, returns nothing.
fn read_within(dirs: &mut DirCursor, path: &[u8]) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    match open_within(dirs, path) {
        Ok(file) => {
            let read = file.take(limits::NAME_FILES).read_to_end(&mut data);
            read.context("cannot read", path)?;
        }
        // The names in ACLs are unknown then, for which there are notes.
        Err(error) => log::debug!("cannot read the names of users or groups: {error}"),
    }
    Ok(data)
}

/// Opens a regular file of the tree, which may be reached through symbolic links within the tree.
fn open_within(dirs: &mut DirCursor, path: &[u8]) -> Result<File> {
    // All components but the last one are resolved, so that the file itself is, too.
    let (Resolved::Path(resolved) | Resolved::NotADirectory(resolved)) =
        in_root::resolve(dirs, &path::join(path, b"."))?
    else {
        let what = "the path has too many symbolic links";
        return Err(TreeError::new(ErrorKind::Refused, what).at(path));
    };
    let (parent, name) = path::split(path::split(&resolved).0);
    let file = content::open_nodev(dirs.open(parent)?, name, OFlags::RDONLY);
    Ok(File::from(file.context("cannot open", path)?))
}
