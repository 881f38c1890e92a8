//! Parses PAX extended headers. Only known records are retained, within limits. No I/O.

use std::collections::BTreeMap;

use cowl_layers::format::{ACL_ACCESS, ACL_DEFAULT};
use cowl_layers::sys::stat::Time;
use cowl_layers::sys::xattr::is_alias;

use super::acl;
use super::limits;
use super::pax::{self, decimal};
use super::sparse;
use crate::tree::attrs::Xattrs;
use crate::tree::error::{ErrorKind, Result, TreeError};
use cowl_layers::shown::Show as _;

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
}

/// The contents of extended headers.
#[derive(Debug, Default)]
pub(super) struct Extended {
    pub(super) path: Field<Vec<u8>>,
    pub(super) link: Field<Vec<u8>>,
    pub(super) size: Field<u64>,
    pub(super) uid: Field<u64>,
    pub(super) gid: Field<u64>,
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
    /// In binary form. An xattr of the same name takes precedence, because it is exact.
    acls: BTreeMap<&'static [u8], Vec<u8>>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The total length of the xattr names, each with its NUL.
    name_bytes: usize,
    /// Whether any record was retained.
    pub(super) any: bool,
    /// The first invalid record. It is an error of the entry, whose path is not known yet.
    pub(super) bad: Option<TreeError>,
}

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
            b"size" => self.size = number(value, "size")?,
            b"uid" => self.uid = number(value, "uid")?,
            b"gid" => self.gid = number(value, "gid")?,
            b"mtime" => self.mtime = time(value, "mtime")?,
            b"atime" => self.atime = time(value, "atime")?,
            b"SCHILY.devmajor" => self.major = number(value, "SCHILY.devmajor")?,
            b"SCHILY.devminor" => self.minor = number(value, "SCHILY.devminor")?,
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
            _ if key == pax::LAYER.as_bytes() => self.layer = cowl_number(value, pax::LAYER)?,
            _ if key == pax::INO.as_bytes() => self.ino = cowl_number(value, pax::INO)?,
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
                let what = format!(
                    "the archive has an ACL of a type that Linux does not support ({})",
                    other.shown()
                );
                return Err(TreeError::new(ErrorKind::Refused, what));
            }
        };
        if !value.is_empty() {
            self.acls.insert(name, acl::from_text(value)?);
        }
        Ok(())
    }

    fn add_xattr(&mut self, name: Vec<u8>, value: &[u8]) -> Result<()> {
        // Either the archive contains the ACL itself, or it was removed.
        if is_alias(&name) {
            return Ok(());
        }
        if value.len() > limits::XATTR_VALUE {
            let what = format!(
                "the extended attribute {} has {} bytes; the limit is {}",
                name.escape_ascii(),
                value.len(),
                limits::XATTR_VALUE
            );
            return Err(TreeError::new(ErrorKind::Limit, what));
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
        let acls = self.acls.values().map(Vec::len);
        xattrs.chain(acls).sum::<usize>() as u64
    }

    /// Returns the xattrs of an entry to which this header and the global ones apply.
    pub(super) fn into_xattrs(self, global: &Self) -> Xattrs {
        let acls = |acls: &BTreeMap<&'static [u8], Vec<u8>>| {
            let acls = acls.iter();
            acls.map(|(name, value)| (name.to_vec(), value.clone()))
                .collect::<Xattrs>()
        };
        let mut all: BTreeMap<Vec<u8>, Vec<u8>> = acls(&global.acls).into_iter().collect();
        all.extend(global.xattrs.clone());
        all.extend(acls(&self.acls));
        all.extend(self.xattrs);
        all.into_iter().collect()
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

fn number(value: &[u8], key: &str) -> Result<Field<u64>> {
    match value {
        b"" => Ok(Field::Revoked),
        value => decimal(value).map(Field::Set).ok_or_else(|| damaged(key)),
    }
}

fn cowl_number(value: &[u8], key: &str) -> Result<Option<u64>> {
    Ok(match number(value, key)? {
        Field::Set(number) => Some(number),
        Field::Unset | Field::Revoked => None,
    })
}

fn time(value: &[u8], key: &str) -> Result<Field<Time>> {
    match value {
        b"" => Ok(Field::Revoked),
        value => pax::parse_time(value)
            .map(Field::Set)
            .ok_or_else(|| damaged(key)),
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
            let xattrs = read(local).into_xattrs(&read(global));
            assert_eq!(xattrs.len(), 1);
            xattrs[0].1.clone()
        };
        let binary = acl::from_text(text).unwrap();
        assert_eq!(one(&[(exact, b"x")], &[]), b"x");
        assert_eq!(one(&[(exact, b"x")], &[(acl, text)]), binary);
        assert_eq!(one(&[(acl, text)], &[(exact, b"x")]), b"x");
        assert_eq!(one(&[], &[(exact, b"x"), (acl, text)]), b"x");
        assert_eq!(one(&[(acl, text)], &[(acl, b"")]), binary);
    }

    #[test]
    fn exceeding_a_limit_is_an_error_of_the_entry() {
        let long = vec![b'p'; limits::PATH as usize + 1];
        let value = vec![0; limits::XATTR_VALUE + 1];
        let names: Vec<String> = (0..600)
            .map(|n| format!("SCHILY.xattr.user.{n:0>200}"))
            .collect();
        let names: Vec<(&str, &[u8])> =
            names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        for records in [
            &[("path", long.as_slice())][..],
            &[("linkpath", long.as_slice())],
            &[("GNU.sparse.name", long.as_slice())],
            &[("SCHILY.xattr.user.x", value.as_slice())],
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
        assert_eq!(all.into_xattrs(&Extended::default()), []);
    }
}
