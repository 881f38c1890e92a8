//! Parses PAX extended headers. Only known records are retained, within limits. No I/O.

use std::collections::BTreeMap;

use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT};
use cowl_layers::sys::stat::Time;
use cowl_layers::sys::xattr::is_alias;

use super::acl::{self, AclProblem, AclValue};
use super::limits;
use super::pax::{self, decimal};
use super::sparse;
use crate::tree::attrs::Xattrs;
use crate::tree::error::{ErrorKind, Result, TreeError};
use crate::tree::omissions;

/// A field that a header sets, revokes, or does not contain.
#[derive(Debug, Default)]
pub(super) enum Field<T> {
    #[default]
    Unset,
    /// An empty value: the entry's own header applies again.
    Revoked,
    Set(T),
}

impl<T> Field<T> {
    /// Returns this value, or that of the global headers.
    pub(super) fn over<'a>(&'a self, global: &'a Self) -> Option<&'a T> {
        match self {
            Self::Set(value) => Some(value),
            Self::Revoked => None,
            Self::Unset => match global {
                Self::Set(value) => Some(value),
                Self::Revoked | Self::Unset => None,
            },
        }
    }

    fn into_option(self) -> Option<T> {
        match self {
            Self::Set(value) => Some(value),
            Self::Revoked | Self::Unset => None,
        }
    }
}

/// The contents of extended headers.
#[derive(Debug, Default)]
pub(super) struct Extended {
    pub(super) path: Field<Vec<u8>>,
    pub(super) link: Field<Vec<u8>>,
    pub(super) size: Field<u64>,
    pub(super) uid: Field<i128>,
    pub(super) gid: Field<i128>,
    pub(super) mtime: Field<Time>,
    pub(super) atime: Field<Time>,
    pub(super) major: Field<u64>,
    pub(super) minor: Field<u64>,
    pub(super) sparse_name: Option<Vec<u8>>,
    pub(super) sparse: sparse::Records,
    /// Records that cowl defines.
    pub(super) is_socket: bool,
    pub(super) layer: Option<u64>,
    pub(super) ino: Option<u64>,
    /// Whether the entry continues a file of another volume.
    pub(super) continues: bool,
    /// An xattr of the same name takes precedence, because it is exact.
    acls: BTreeMap<&'static [u8], AclValue>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The total length of the xattr names, each with its NUL.
    name_bytes: usize,
    /// Whether any record was retained.
    pub(super) any: bool,
    /// The first invalid record. It is an error of the entry, whose path is not known yet.
    pub(super) bad: Option<TreeError>,
    /// Records that Linux cannot store: the text of a note, and the name of the record.
    pub(super) omitted: Vec<Omitted>,
}

/// A record that is omitted: the text of a note, and the name of the record.
pub(super) type Omitted = (&'static str, Vec<u8>);

/// The note on a number or a time that is none.
pub(super) const NOT_A_NUMBER: &str = "ignored a field that is not a number";

/// The note on an owner or a group that is not a number.
pub(super) const NOT_AN_ID: &str = "changed an owner or group that is not a number to 65534";

/// The id without privileges that the kernel reports for ids that it cannot represent (overflowuid).
pub(super) const OVERFLOW_ID: u32 = 65534;

/// The maximum number of omitted records of a header for which there are notes.
const OMITTED: usize = 256;

/// The xattrs of an entry, with ACLs in binary form, and its ACLs that contain names.
pub(super) type XattrsAndAcls = (Xattrs, Vec<(&'static [u8], Vec<u8>)>);

impl Extended {
    /// Parses the data of a header. The error describes the syntax error.
    pub(super) fn read(&mut self, data: &[u8]) -> Result<(), &'static str> {
        self.any = true;
        pax::for_each_record(data, &mut |key, value| {
            if let Err(error) = self.add_record(key, value) {
                self.bad.get_or_insert(error);
            }
        })
    }

    fn add_record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = size(value)?,
            b"uid" => self.uid = self.id(value, key),
            b"gid" => self.gid = self.id(value, key),
            b"mtime" => self.mtime = self.parsed(pax::parse_time, value, key),
            b"atime" => self.atime = self.parsed(pax::parse_time, value, key),
            b"SCHILY.devmajor" => self.major = self.parsed(decimal, value, key),
            b"SCHILY.devminor" => self.minor = self.parsed(decimal, value, key),
            b"GNU.sparse.name" => {
                self.sparse_name = match text(value)? {
                    Field::Set(name) => Some(name),
                    Field::Revoked | Field::Unset => None,
                }
            }
            b"GNU.volume.offset" => self.continues = decimal(value).is_some_and(|at| at > 0),
            b"RHT.security.selinux" if !value.is_empty() => {
                self.add_xattr(b"security.selinux".to_vec(), value)?;
            }
            _ if key == pax::SOCKET.as_bytes() => self.is_socket = !value.is_empty(),
            _ if key == pax::LAYER.as_bytes() => {
                self.layer = self.parsed(decimal, value, key).into_option();
            }
            _ if key == pax::INO.as_bytes() => {
                self.ino = self.parsed(decimal, value, key).into_option();
            }
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value)?;
                } else if let Some(kind) = key.strip_prefix(pax::ACL) {
                    self.add_acl(kind, value)?;
                } else if let Some(name) = key.strip_prefix(pax::XATTR) {
                    self.add_xattr(pax::unescape_xattr(name), value)?;
                }
            }
        }
        Ok(())
    }

    fn add_acl(&mut self, kind: &[u8], value: &[u8]) -> Result<()> {
        let name = match kind {
            b"access" => ACL_ACCESS,
            b"default" => ACL_DEFAULT,
            other => {
                self.omit(
                    "skipped an ACL of a type that Linux does not support",
                    other,
                );
                return Ok(());
            }
        };
        if value.is_empty() {
            return Ok(());
        }
        match acl::from_text(value) {
            Ok(value) => {
                self.acls.insert(name, value);
            }
            Err(AclProblem::Invalid) => self.omit("skipped an invalid ACL", kind),
            Err(AclProblem::TooMany) => {
                let limit = limits::ACL_ENTRIES;
                let what = format!("the ACL exceeds the limit of {limit} entries");
                return Err(TreeError::new(ErrorKind::Limit, what));
            }
        }
        Ok(())
    }

    /// Parses a number or a time. Like GNU tar, ignores one that is invalid, so that the entry's own header applies.
    fn parsed<T>(
        &mut self,
        parse: impl FnOnce(&[u8]) -> Option<T>,
        value: &[u8],
        key: &[u8],
    ) -> Field<T> {
        match value {
            b"" => Field::Revoked,
            value => parse(value).map_or_else(
                || {
                    self.omit(NOT_A_NUMBER, key);
                    Field::Unset
                },
                Field::Set,
            ),
        }
    }

    /// Parses the id of a user or a group. An invalid one does not become that of the entry's own header, which may be
    /// root.
    fn id(&mut self, value: &[u8], key: &[u8]) -> Field<i128> {
        match value {
            b"" => Field::Revoked,
            value => Field::Set(pax::id(value).unwrap_or_else(|| {
                self.omit(NOT_AN_ID, key);
                OVERFLOW_ID.into()
            })),
        }
    }

    fn omit(&mut self, reason: &'static str, record: &[u8]) {
        if self.omitted.len() < OMITTED {
            let record = record.get(..record.len().min(limits::OMITTED_NAME));
            self.omitted
                .push((reason, record.unwrap_or_default().to_vec()));
        }
    }

    fn add_xattr(&mut self, name: Vec<u8>, value: &[u8]) -> Result<()> {
        // Either the archive contains the ACL itself, or it was removed.
        if is_alias(&name) {
            return Ok(());
        }
        if let Some(reason) = omissions::unstorable_xattr(&name, value) {
            self.omit(reason, &name);
            return Ok(());
        }
        if !self.xattrs.contains_key(&name) {
            self.name_bytes += name.len() + 1;
        }
        if self.name_bytes > limits::XATTR_NAMES {
            let what = format!(
                "the names of the extended attributes exceed the limit of {} bytes",
                limits::XATTR_NAMES
            );
            return Err(TreeError::new(ErrorKind::Limit, what));
        }
        self.xattrs.insert(name, value.to_vec());
        Ok(())
    }

    /// Returns the size of the retained xattrs in bytes.
    pub(super) fn xattr_bytes(&self) -> u64 {
        let xattrs = self
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len());
        let acls = self.acls.values().map(|acl| match acl {
            AclValue::Binary(bytes) | AclValue::Text(bytes) => bytes.len(),
        });
        xattrs.chain(acls).sum::<usize>() as u64
    }

    /// Returns the xattrs of an entry to which this header and the global ones apply.
    pub(super) fn into_xattrs(self, global: &Self) -> XattrsAndAcls {
        let (mut xattrs, mut acls) = (global.xattrs.clone(), global.acls.clone());
        acls.retain(|name, _| !xattrs.contains_key(*name));
        for (name, acl) in self.acls {
            xattrs.remove(name);
            acls.insert(name, acl);
        }
        for (name, value) in self.xattrs {
            acls.remove(name.as_slice());
            xattrs.insert(name, value);
        }
        let mut named = Vec::new();
        for (name, acl) in acls {
            match acl {
                AclValue::Binary(value) => {
                    xattrs.insert(name.to_vec(), value);
                }
                AclValue::Text(text) => named.push((name, text)),
            }
        }
        (xattrs.into_iter().collect(), named)
    }
}

fn damaged(what: &str) -> TreeError {
    TreeError::new(ErrorKind::Damaged, format!("damaged entry: {what}"))
}

fn text(value: &[u8]) -> Result<Field<Vec<u8>>> {
    limits::check_size(value.len() as u64, limits::PATH, "a path", b"")?;
    Ok(match value {
        b"" => Field::Revoked,
        value => Field::Set(value.to_vec()),
    })
}

/// Parses the size of the data. Without it, the next entry cannot be found.
fn size(value: &[u8]) -> Result<Field<u64>> {
    match value {
        b"" => Ok(Field::Revoked),
        value => decimal(value)
            .map(Field::Set)
            .ok_or_else(|| damaged("its size is not a number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(records: &[(&str, &[u8])]) -> Extended {
        let mut all = pax::Records::default();
        for (key, value) in records {
            all.push(key.as_bytes(), *value);
        }
        let mut extended = Extended::default();
        extended.read(&all.to_bytes()).unwrap();
        extended
    }

    #[test]
    fn empty_value_revokes_the_global_one() {
        let global = read(&[("uid", b"7"), ("gid", b"8"), ("path", b"p")]);
        let local = read(&[("uid", b""), ("gid", b"9")]);
        assert_eq!(local.uid.over(&global.uid), None);
        assert_eq!(local.gid.over(&global.gid), Some(&9));
        assert_eq!(local.path.over(&global.path), Some(&b"p".to_vec()));
    }

    #[test]
    fn xattrs_override_acls_and_local_records_override_global_ones() {
        let acl = "SCHILY.acl.access";
        let exact = "SCHILY.xattr.system.posix_acl_access";
        let text = &b"user::rw-,group::r--,other::---"[..];
        let one = |global: &[(&str, &[u8])], local: &[(&str, &[u8])]| {
            let (xattrs, named) = read(local).into_xattrs(&read(global));
            assert_eq!((xattrs.len(), named.len()), (1, 0));
            xattrs[0].1.clone()
        };
        let AclValue::Binary(binary) = acl::from_text(text).unwrap() else {
            panic!("the ACL has names");
        };
        assert_eq!(one(&[(exact, b"x")], &[]), b"x");
        assert_eq!(one(&[(exact, b"x")], &[(acl, text)]), binary);
        assert_eq!(one(&[(acl, text)], &[(exact, b"x")]), b"x");
        assert_eq!(one(&[], &[(exact, b"x"), (acl, text)]), b"x");
        assert_eq!(one(&[(acl, text)], &[(acl, b"")]), binary);
    }

    #[test]
    fn exceeding_a_limit_is_an_error_of_the_entry() {
        let long = vec![b'p'; limits::PATH as usize + 1];
        let names: Vec<String> = (0..600)
            .map(|n| format!("SCHILY.xattr.user.{n:0>200}"))
            .collect();
        let names: Vec<(&str, &[u8])> =
            names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        for records in [
            &[("path", long.as_slice())][..],
            &[("linkpath", long.as_slice())],
            &[("GNU.sparse.name", long.as_slice())],
            &names,
        ] {
            let bad = read(records).bad.unwrap();
            assert_eq!(bad.kind(), ErrorKind::Limit, "{bad}");
            assert!(bad.to_string().contains("limit"), "{bad}");
        }
    }

    #[test]
    fn alias_of_an_acl_is_ignored() {
        let all = read(&[("SCHILY.xattr.trusted.SGI_ACL_FILE", b"x")]);
        assert_eq!(all.into_xattrs(&Extended::default()), (vec![], vec![]));
    }

    #[test]
    fn records_that_linux_cannot_store_are_omitted() {
        let large = vec![0; limits::XATTR_VALUE + 1];
        let all = read(&[
            ("SCHILY.xattr.user.large", &large),
            ("SCHILY.xattr.com.apple.provenance", b"x"),
            ("SCHILY.xattr.user.", b"x"),
            ("SCHILY.xattr.user.nul\0", b"x"),
            ("SCHILY.acl.ace", b"owner@:rwxp--aARWcCos:-------:allow"),
            ("SCHILY.acl.access", b"hello"),
            ("SCHILY.xattr.user.small", b"x"),
        ]);
        assert!(all.bad.is_none());
        let names = all.omitted.iter().map(|(_, name)| name.as_slice());
        let want: [&[u8]; 6] = [
            b"user.large",
            b"com.apple.provenance",
            b"user.",
            b"user.nul\0",
            b"ace",
            b"access",
        ];
        assert_eq!(names.collect::<Vec<_>>(), want);
        let (xattrs, named) = all.into_xattrs(&Extended::default());
        assert_eq!(xattrs, [(b"user.small".to_vec(), b"x".to_vec())]);
        assert_eq!(named, []);
    }

    #[test]
    fn acls_with_names_are_retained_as_text_unless_an_xattr_overrides_them() {
        let text = &b"user::rw-,user:joe:rw-,group::r--,mask::rw-,other::---"[..];
        let acl = ("SCHILY.acl.access", text);
        let exact = ("SCHILY.xattr.system.posix_acl_access", &b"x"[..]);
        let get = |global: &[_], local: &[_]| read(local).into_xattrs(&read(global));
        let named = (vec![], vec![(ACL_ACCESS, text.to_vec())]);
        let binary = (vec![(ACL_ACCESS.to_vec(), b"x".to_vec())], vec![]);
        assert_eq!(get(&[], &[acl]), named);
        assert_eq!(get(&[exact], &[acl]), named);
        assert_eq!(get(&[acl], &[exact]), binary);
        assert_eq!(get(&[exact, acl], &[]), binary);
    }
}
