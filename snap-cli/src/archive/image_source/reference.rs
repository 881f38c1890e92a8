//! The name of an image on the command line, as skopeo and podman write it: `TRANSPORT:PATH[:TAG]`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;

/// The form of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// An OCI image layout in a directory.
    Oci,
    /// An OCI image layout in a tar archive.
    OciArchive,
    /// An archive of `docker save`.
    DockerArchive,
}

/// An image on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// An image in a file or a directory, with its tag or name.
    Stored(Transport, PathBuf, Option<String>),
    /// An image in a registry, without the prefix `docker://`.
    Registry(String),
    /// An image that cowl cannot read from its location, with the prefix.
    Unsupported(&'static str),
}

const STORED: [(&str, Transport); 3] = [
    ("oci", Transport::Oci),
    ("oci-archive", Transport::OciArchive),
    ("docker-archive", Transport::DockerArchive),
];

/// The other transports of skopeo and podman.
const UNSUPPORTED: [&str; 6] = [
    "docker",
    "docker-daemon",
    "containers-storage",
    "dir",
    "ostree",
    "sif",
];

impl Reference {
    /// Parses an argument; `None` if it is a path. Write `./` before a path that begins with a transport.
    pub fn parse(text: &OsStr) -> Option<Self> {
        let bytes = text.as_bytes();
        let colon = bytes.iter().position(|&byte| byte == b':')?;
        let (prefix, rest) = (bytes.get(..colon)?, bytes.get(colon + 1..)?);
        if let Some(name) = text
            .to_str()
            .and_then(|text| text.strip_prefix("docker://"))
        {
            return Some(Self::Registry(name.to_owned()));
        }
        if let Some(prefix) = UNSUPPORTED.iter().find(|one| one.as_bytes() == prefix) {
            return Some(Self::Unsupported(prefix));
        }
        let (_, transport) = STORED.iter().find(|(one, _)| one.as_bytes() == prefix)?;
        // A path cannot contain a colon, as in skopeo and podman.
        let (path, tag) = match rest.iter().position(|&byte| byte == b':') {
            Some(at) => (rest.get(..at)?, rest.get(at + 1..)),
            None => (rest, None),
        };
        let tag = tag.filter(|tag| !tag.is_empty());
        let tag = match tag.map(std::str::from_utf8) {
            Some(Ok(tag)) => Some(tag.to_owned()),
            Some(Err(_)) => return None,
            None => None,
        };
        let path = PathBuf::from(OsString::from_vec(path.to_vec()));
        Some(Self::Stored(*transport, path, tag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_those_of_skopeo() {
        let stored = |transport, path: &str, tag: Option<&str>| {
            Some(Reference::Stored(
                transport,
                PathBuf::from(path),
                tag.map(str::to_owned),
            ))
        };
        for (text, expected) in [
            ("oci:dir", stored(Transport::Oci, "dir", None)),
            ("oci:/a/b:1.0", stored(Transport::Oci, "/a/b", Some("1.0"))),
            (
                "oci-archive:a.tar:x/y:1",
                stored(Transport::OciArchive, "a.tar", Some("x/y:1")),
            ),
            (
                "docker-archive:a.tar:",
                stored(Transport::DockerArchive, "a.tar", None),
            ),
            (
                "docker://r.example/a:1",
                Some(Reference::Registry("r.example/a:1".to_owned())),
            ),
            ("docker:debian", Some(Reference::Unsupported("docker"))),
            ("dir:x", Some(Reference::Unsupported("dir"))),
            ("./oci:dir", None),
            ("web.tar", None),
            ("a:b", None),
        ] {
            assert_eq!(Reference::parse(OsStr::new(text)), expected, "{text}");
        }
    }
}
