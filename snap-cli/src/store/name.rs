//! The grammar of names: containers, snapshots, `NAME@SNAP` addresses and `A..B` ranges. Pure: this module does not
//! know which containers exist.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The maximum length of a name, in bytes.
pub const MAX_NAME: usize = 64;

/// Checks `[A-Za-z0-9][A-Za-z0-9._-]*`, at most 64 bytes, without `..`.
fn check(what: &str, raw: &OsStr) -> Result<String> {
    let refuse = |why: &str| {
        let shown = raw.shown();
        Err(
            Error::usage(format!("invalid {what} name \"{shown}\": {why}")).hint(
                "a name consists of letters, digits, '.', '_' and '-', begins with a letter or a digit, \
                 and has at most 64 bytes",
            ),
        )
    };
    let Some(name) = raw.to_str() else {
        return refuse("it is not valid UTF-8");
    };
    let Some(first) = name.bytes().next() else {
        return refuse("it is empty");
    };
    if name.len() > MAX_NAME {
        return refuse(&format!("it has {} bytes", name.len()));
    }
    if name.contains("..") {
        return refuse("it contains '..'");
    }
    if !first.is_ascii_alphanumeric() {
        return refuse("it does not begin with a letter or a digit");
    }
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match name.chars().find(|c| !allowed(c)) {
        Some(bad) => refuse(&format!("'{}' is not allowed", bad.to_string().shown())),
        None => Ok(name.to_owned()),
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// Parses a name.
            pub fn parse(raw: impl AsRef<OsStr>) -> Result<Self> {
                check($what, raw.as_ref()).map(Self)
            }

            /// Returns the name.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = Error;
            fn try_from(raw: String) -> Result<Self> {
                Self::parse(&raw)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name_type!(
    /// A container's name.
    ContainerName,
    "container"
);
name_type!(
    /// A snapshot's name.
    SnapshotName,
    "snapshot"
);

impl SnapshotName {
    /// Returns the default name of a snapshot with this number: `snap0`, `snap1`, ...
    pub fn counted(number: u64) -> Self {
        Self(format!("snap{number}"))
    }

    /// Returns the name of an automatic snapshot with this number: `auto0`, `auto1`, ...
    pub fn automatic(number: u64) -> Self {
        Self(format!("auto{number}"))
    }

    /// The largest number that another host can give to a snapshot: the numbers after it must suffice.
    pub const MAX_NUMBER: u64 = 0xffff_ffff;

    /// Returns the number in a name that consists of `prefix` and a number, as cowl writes it, if that is at most
    /// [`Self::MAX_NUMBER`].
    pub fn number(&self, prefix: &str) -> Option<u64> {
        let number: u64 = self.0.strip_prefix(prefix)?.parse().ok()?;
        (number <= Self::MAX_NUMBER && format!("{prefix}{number}") == self.0).then_some(number)
    }

    /// Returns whether the name is reserved for automatic numbering, which never uses a name twice.
    pub fn is_reserved(&self) -> bool {
        ["snap", "auto"].iter().any(|prefix| {
            self.0
                .strip_prefix(prefix)
                .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
        })
    }
}

/// The address of a state: `NAME` (the current state of a container) or `NAME@SNAP` (a snapshot).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The container.
    pub container: ContainerName,
    /// The snapshot; `None` for the current state.
    pub snapshot: Option<SnapshotName>,
}

impl Address {
    /// Parses an address.
    pub fn parse(raw: impl AsRef<OsStr>) -> Result<Self> {
        let raw = raw.as_ref();
        let Some(text) = raw.to_str() else {
            // This fails with the detailed error.
            return ContainerName::parse(raw).map(|container| Self {
                container,
                snapshot: None,
            });
        };
        let (container, snapshot) = match text.split_once('@') {
            Some((container, snapshot)) => (container, Some(SnapshotName::parse(snapshot)?)),
            None => (text, None),
        };
        Ok(Self {
            container: ContainerName::parse(container)?,
            snapshot,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.container),
            None => self.container.fmt(f),
        }
    }
}

/// A path in a state: `NAME[@SNAP]:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePath {
    /// The state.
    pub address: Address,
    /// The path from the container's root, unchanged; `None` if the argument has no colon.
    pub path: Option<Vec<u8>>,
}

impl StatePath {
    /// Parses a path in a state. Names contain no colon, so the first one ends the address.
    pub fn parse(raw: impl AsRef<OsStr>) -> Result<Self> {
        let raw = raw.as_ref().as_bytes();
        let colon = raw.iter().position(|&byte| byte == b':');
        let (address, path) = match colon.and_then(|at| raw.split_at_checked(at)) {
            Some((address, path)) => (address, path.get(1..)),
            None => (raw, None),
        };
        Ok(Self {
            address: Address::parse(OsStr::from_bytes(address))?,
            path: path.map(<[u8]>::to_vec),
        })
    }
}

/// A range of layers, `A..B`: the changes after snapshot A, up to snapshot B. Either may be omitted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// The snapshot before the range; `None` for the base.
    pub from: Option<SnapshotName>,
    /// The last snapshot of the range; `None` for the newest frozen layer.
    pub to: Option<SnapshotName>,
}

impl Range {
    /// Parses a range.
    pub fn parse(raw: impl AsRef<OsStr>) -> Result<Self> {
        let raw = raw.as_ref();
        let Some((from, to)) = raw.to_str().and_then(|text| text.split_once("..")) else {
            let shown = raw.shown();
            return Err(Error::usage(format!("\"{shown}\" is not a range")).hint(
                "a range is A..B with two snapshots of the container; either may be omitted",
            ));
        };
        let side = |text: &str| match text {
            "" => Ok(None),
            name => SnapshotName::parse(name).map(Some),
        };
        Ok(Self {
            from: side(from)?,
            to: side(to)?,
        })
    }
}

/// A selection of snapshots of one container: one snapshot, or `A..B`, which includes both ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotChoice {
    /// One snapshot.
    One(SnapshotName),
    /// All snapshots from the first to the second one in the list, both included.
    Through(SnapshotName, SnapshotName),
}

impl SnapshotChoice {
    /// Parses a selection. Both ends of a range are required, because the selected snapshots are removed.
    pub fn parse(raw: impl AsRef<OsStr>) -> Result<Self> {
        let raw = raw.as_ref();
        match raw.to_str().and_then(|text| text.split_once("..")) {
            None => SnapshotName::parse(raw).map(Self::One),
            Some(("", _) | (_, "")) => Err(Error::usage(format!(
                "\"{}\" is not a complete range",
                raw.shown()
            ))
            .hint("specify both ends: A..B selects the snapshots A and B and all between them")),
            Some((first, last)) => Ok(Self::Through(
                SnapshotName::parse(first)?,
                SnapshotName::parse(last)?,
            )),
        }
    }
}

/// Returns the name in `known` that is most similar to `typed`, if any is similar enough.
pub fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(typed, name), name))
        .filter(|(distance, name)| *distance <= 1 + name.len().min(typed.len()) / 4)
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn names_are_checked() {
        let long = "x".repeat(64);
        let longer = "x".repeat(65);
        let good: [&[u8]; 7] = [
            b"a",
            b"0",
            b"web",
            b"a.b_c-d",
            b"A1",
            b"x.",
            long.as_bytes(),
        ];
        for raw in good {
            assert!(
                ContainerName::parse(OsStr::from_bytes(raw)).is_ok(),
                "{raw:?}"
            );
        }
        let bad: [&[u8]; 16] = [
            b"",
            b".",
            b"..",
            b"a..b",
            b"a/b",
            b"/a",
            b"-a",
            b".a",
            b"_a",
            b"a b",
            b"a\nb",
            b"a\n",
            b"\xff",
            b"a\xc3\xa9",
            b"a@b",
            longer.as_bytes(),
        ];
        for raw in bad {
            let error = ContainerName::parse(OsStr::from_bytes(raw)).unwrap_err();
            assert_eq!(error.kind, Kind::Usage, "{raw:?}");
            assert!(!error.what.contains('\n'), "{raw:?}");
        }
    }

    #[test]
    fn numbered_names_are_reserved() {
        for (name, reserved) in [
            ("snap0", true),
            ("snap17", true),
            ("auto3", true),
            ("snap", false),
            ("snapx", false),
            ("snap1a", false),
            ("mysnap1", false),
        ] {
            let name = SnapshotName::parse(name).unwrap();
            assert_eq!(name.is_reserved(), reserved, "{name}");
        }
        assert_eq!(SnapshotName::counted(7).as_str(), "snap7");
    }

    #[test]
    fn addresses_are_parsed() {
        let both = Address::parse("web@snap0").unwrap();
        assert_eq!(both.to_string(), "web@snap0");
        assert_eq!(Address::parse("web").unwrap().snapshot, None);
        for bad in ["web@", "@snap0", "@", "", "web@a@b", "web@a/b", "we\nb@x"] {
            assert!(Address::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Address::parse(OsStr::from_bytes(b"web@\xff")).is_err());
    }

    #[test]
    fn paths_in_states_are_parsed() {
        let found = StatePath::parse(OsStr::from_bytes(b"web@snap0:/a:b\xff")).unwrap();
        assert_eq!(found.address, Address::parse("web@snap0").unwrap());
        assert_eq!(found.path.as_deref(), Some(&b"/a:b\xff"[..]));
        assert_eq!(StatePath::parse("web").unwrap().path, None);
        assert_eq!(
            StatePath::parse("web:").unwrap().path.as_deref(),
            Some(&b""[..])
        );
        assert_eq!(StatePath::parse("web:a@b").unwrap().address.snapshot, None);
        for bad in ["", ":etc", "web@:etc", "a/b:c"] {
            assert!(StatePath::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ranges_are_parsed() {
        let range = Range::parse("a..b").unwrap();
        assert_eq!(range.from.unwrap().as_str(), "a");
        assert_eq!(range.to.unwrap().as_str(), "b");
        assert_eq!(Range::parse("..").unwrap(), Range::default());
        assert_eq!(Range::parse("..b").unwrap().from, None);
        assert_eq!(Range::parse("a..").unwrap().to, None);
        for bad in ["a", "a.b", "", "a..b..c", "a../b"] {
            assert!(Range::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn snapshot_choices_are_parsed() {
        let name = |text: &str| SnapshotName::parse(text).unwrap();
        assert_eq!(
            SnapshotChoice::parse("a").unwrap(),
            SnapshotChoice::One(name("a"))
        );
        let range = SnapshotChoice::Through(name("a"), name("b"));
        assert_eq!(SnapshotChoice::parse("a..b").unwrap(), range);
        for bad in [
            "", "..", "a..", "..b", "a..b..c", "a...b", "*", "a b", "ALL/",
        ] {
            let error = SnapshotChoice::parse(bad).unwrap_err();
            assert_eq!(error.kind, Kind::Usage, "{bad:?}");
        }
    }

    #[test]
    fn nearest_finds_a_similar_name() {
        assert_eq!(nearest("wbe", ["db", "web"]), Some("web"));
        assert_eq!(nearest("snap1", ["snap0", "other"]), Some("snap0"));
        assert_eq!(nearest("zebra", ["web", "db"]), None);
        assert_eq!(nearest("x", []), None);
    }
}
