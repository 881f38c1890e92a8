//! The platform of an image: operating system, architecture and variant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A platform, in the terms of the image specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// The operating system.
    #[serde(default)]
    pub os: String,
    /// The architecture.
    #[serde(default)]
    pub architecture: String,
    /// The variant of the architecture, such as `v7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// Returns the platform of this machine.
    pub fn of_machine() -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: machine_architecture().to_owned(),
            variant: None,
        }
    }

    /// Returns whether an image of this platform is requested by `wanted`.
    ///
    /// Without a variant in the request, every variant is accepted. An image without a variant has the first one.
    pub fn is_selected_by(&self, wanted: &Self) -> bool {
        let first = match self.architecture.as_str() {
            "arm64" => "v8",
            "arm" => "v7",
            "amd64" => "v1",
            _ => "",
        };
        let own = self.variant.as_deref().filter(|own| !own.is_empty());
        let same = match wanted.variant.as_deref() {
            None => true,
            Some(wanted) => own.unwrap_or(first) == wanted,
        };
        self.os == wanted.os && self.architecture == wanted.architecture && same
    }
}

/// Returns the architecture of this machine in the terms of the image specification.
fn machine_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, architecture] => (*os, *architecture, None),
            [os, architecture, variant] => (*os, *architecture, Some(*variant)),
            _ => return Err("write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT".to_owned()),
        };
        if parts.iter().any(|part| part.is_empty()) {
            return Err("a part of the platform is empty".to_owned());
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_selects_images() {
        let parse = |text: &str| text.parse::<Platform>().unwrap();
        for (image, wanted, selected) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/arm64", "linux/amd64", false),
            ("windows/amd64", "linux/amd64", false),
            ("linux/arm/v6", "linux/arm", true),
            ("linux/arm/v6", "linux/arm/v7", false),
            ("linux/arm64", "linux/arm64/v8", true),
        ] {
            let found = parse(image).is_selected_by(&parse(wanted));
            assert_eq!(found, selected, "{image} {wanted}");
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
