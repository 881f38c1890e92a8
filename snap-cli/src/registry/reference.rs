//! References to images in registries: `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`. Pure.
//!
//! The host is required: which registry a short name such as `debian` means is a setting of each container engine.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use crate::archive::image_source::Digest;
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// The maximum length of a repository together with its host, in bytes.
const MAX_NAME: usize = 255;

/// The maximum length of a tag, in bytes.
const MAX_TAG: usize = 128;

/// The tag of a reference without a tag and without a digest.
const DEFAULT_TAG: &str = "latest";

/// The host of a registry, with its port if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryName(String);

impl RegistryName {
    /// Parses `HOST[:PORT]`.
    ///
    /// A host contains a dot or a port, or is `localhost`. Everything else is a short name.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Err(
                Error::usage(format!("invalid registry \"{}\": {why}", text.shown())).hint(
                    "write the host of the registry, and its port if it is not 443: registry.example.com:5000",
                ),
            )
        };
        let (host, port) = match split_port(text) {
            Some(parts) => parts,
            None => return refuse("it has no valid port"),
        };
        let is_valid = match host.strip_prefix('[') {
            Some(rest) => {
                let inner = rest.strip_suffix(']').unwrap_or_default();
                inner.parse::<Ipv6Addr>().is_ok()
            }
            None => is_domain(host),
        };
        if !is_valid || text.len() > MAX_NAME {
            return refuse("it is not the name or the address of a host");
        }
        if !host.contains(['.', ':']) && port.is_none() && host != "localhost" {
            return refuse("it has neither a dot nor a port");
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// Returns the host and the port as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the host and the port to which requests are sent.
    pub(super) fn endpoint(&self) -> &str {
        match self.0.as_str() {
            // The registry of Docker has another host than its name.
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        }
    }

    /// Returns whether the registry is on this machine.
    pub(super) fn is_loopback(&self) -> bool {
        is_loopback(&self.0)
    }
}

impl fmt::Display for RegistryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Splits a host and its port; `None` if the port is invalid.
fn split_port(text: &str) -> Option<(&str, Option<u16>)> {
    let end_of_host = text.rfind(']').unwrap_or(0);
    let Some(colon) = text.get(end_of_host..)?.rfind(':') else {
        return Some((text, None));
    };
    let (host, port) = text.split_at(end_of_host + colon);
    let port = port.strip_prefix(':')?;
    let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(port) if port > 0 && is_number => Some((host, Some(port))),
        _ => None,
    }
}

/// Returns whether a host with or without a port is an address of this machine.
pub(super) fn is_loopback(authority: &str) -> bool {
    let Some((host, _)) = split_port(authority) else {
        return false;
    };
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    match bare.unwrap_or(host).parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

fn is_domain(host: &str) -> bool {
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !label.is_empty()
            && label.bytes().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    !host.is_empty() && host.split('.').all(is_label)
}

/// A reference to an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryRef {
    /// The registry.
    pub registry: RegistryName,
    /// The repository.
    pub repository: String,
    /// The tag, if one is given.
    pub tag: Option<String>,
    /// The digest of the manifest, if one is given.
    pub digest: Option<Digest>,
}

impl RegistryRef {
    /// Parses a reference, with or without `docker://` before it.
    pub fn parse(text: &str) -> Result<Self> {
        let own = text.strip_prefix("docker://").unwrap_or(text);
        let refuse = |why: &str, hint: &str| {
            let what = format!("invalid image reference \"{}\": {why}", own.shown());
            Err(Error::usage(what).hint(hint))
        };
        const FORM: &str = "write REGISTRY/REPOSITORY[:TAG], for example docker.io/library/debian:12; short names are not \
                            supported";
        let Some((registry, rest)) = own.split_once('/') else {
            return refuse("it does not begin with the host of a registry", FORM);
        };
        let Ok(registry) = RegistryName::parse(registry) else {
            return refuse("it does not begin with the host of a registry", FORM);
        };
        let (rest, digest) = match rest.split_once('@') {
            None => (rest, None),
            Some((rest, digest)) => match Digest::try_from(digest.to_owned()) {
                Ok(digest) => (rest, Some(digest)),
                Err(why) => return refuse(&why, FORM),
            },
        };
        let (repository, tag) = match rest.split_once(':') {
            None => (rest, None),
            Some((repository, tag)) if is_tag(tag) => (repository, Some(tag.to_owned())),
            Some(_) => {
                return refuse(
                    "the tag is invalid",
                    "a tag consists of up to 128 letters, digits, '_', '.' and '-', and does not begin with '.' or '-'",
                );
            }
        };
        if !is_repository(repository) || repository.len() + registry.as_str().len() > MAX_NAME {
            return refuse(
                "the repository is invalid",
                "a repository consists of names in lower case, with '/' between them",
            );
        }
        if registry.endpoint() != registry.as_str() && !repository.contains('/') {
            return refuse(
                "repositories of docker.io have two parts",
                "official images are in library: docker.io/library/debian:12",
            );
        }
        Ok(Self {
            registry,
            repository: repository.to_owned(),
            tag,
            digest,
        })
    }

    /// Returns the tag; `latest` if neither a tag nor a digest is given.
    pub fn tag(&self) -> Option<&str> {
        match (&self.tag, &self.digest) {
            (Some(tag), _) => Some(tag),
            (None, None) => Some(DEFAULT_TAG),
            (None, Some(_)) => None,
        }
    }

    /// Returns the last name of the repository.
    pub fn last_name(&self) -> &str {
        let last = self.repository.rsplit('/').next();
        last.unwrap_or(&self.repository)
    }

    /// Returns the reference with its digest, without its tag.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry, self.repository)
    }
}

impl fmt::Display for RegistryRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = self.tag() {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Returns whether a text is a tag: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
fn is_tag(tag: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let other = |byte: u8| word(byte) || matches!(byte, b'.' | b'-');
    tag.len() <= MAX_TAG && tag.bytes().next().is_some_and(word) && tag.bytes().all(other)
}

/// Returns whether a text is a repository: names with `/` between them. A name consists of lower-case letters and digits
/// in parts, with one `.`, one or two `_`, or any number of `-` between them.
pub(super) fn is_repository(repository: &str) -> bool {
    let is_name = |name: &str| {
        let alnum = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let mut separator = String::new();
        for byte in name.bytes() {
            if alnum(byte) {
                separator.clear();
            } else {
                separator.push(char::from(byte));
                let dashes = separator.bytes().all(|byte| byte == b'-');
                if !dashes && !matches!(separator.as_str(), "." | "_" | "__") {
                    return false;
                }
            }
        }
        separator.is_empty() && name.bytes().next().is_some_and(alnum)
    };
    !repository.is_empty() && repository.split('/').all(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_parsed() {
        let digest = Digest::of(b"x");
        for (text, registry, repository, tag, digested) in [
            ("localhost/app", "localhost", "app", Some("latest"), false),
            (
                "docker://r.example/a/b:1.0",
                "r.example",
                "a/b",
                Some("1.0"),
                false,
            ),
            (
                "127.0.0.1:5000/a",
                "127.0.0.1:5000",
                "a",
                Some("latest"),
                false,
            ),
            ("[::1]:5000/a", "[::1]:5000", "a", Some("latest"), false),
            (
                "HOST:1/a__b/c--d.e_f",
                "host:1",
                "a__b/c--d.e_f",
                Some("latest"),
                false,
            ),
            ("r.example/a@{}", "r.example", "a", None, true),
            ("r.example/a:t@{}", "r.example", "a", Some("t"), true),
        ] {
            let text = text.replace("{}", digest.as_str());
            let found = RegistryRef::parse(&text).unwrap();
            assert_eq!(found.registry.as_str(), registry, "{text}");
            assert_eq!(found.repository, repository, "{text}");
            assert_eq!(found.tag(), tag, "{text}");
            assert_eq!(found.digest.is_some(), digested, "{text}");
        }
        assert_eq!(
            RegistryRef::parse("r.example/a/b").unwrap().to_string(),
            "r.example/a/b:latest"
        );
    }

    #[test]
    fn invalid_references_are_refused() {
        let long = format!("r.example/{}", "a".repeat(MAX_NAME));
        for bad in [
            "",
            "debian",
            "debian:12",
            "library/debian",
            "r.example/",
            "r.example//a",
            "r.example/A",
            "r.example/a/",
            "r.example/.a",
            "r.example/a.",
            "r.example/a..b",
            "r.example/a___b",
            "r.example/a._b",
            "r.example/../a",
            "r.example/a:",
            "r.example/a:.x",
            "r.example/a:x/y",
            "r.example/a@sha256:0",
            "r.example:0/a",
            "r.example:99999/a",
            "r.example:/a",
            "-r.example/a",
            "r..example/a",
            "[::1/a",
            "[x]:5/a",
            "user@r.example/a",
            "r.example\n/a",
            "r.example/a?b",
            "docker.io/debian",
            &long,
        ] {
            assert!(RegistryRef::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_addresses_of_this_machine_are_loopback() {
        for (authority, expected) in [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.8.0.1:5000", true),
            ("[::1]:5000", true),
            ("localhost.example.com:5000", false),
            ("127.0.0.1.example.com", false),
            ("10.0.0.1", false),
            ("[::2]", false),
        ] {
            assert_eq!(is_loopback(authority), expected, "{authority}");
        }
    }
}
