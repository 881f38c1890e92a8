//! The certificates that connections to registries trust.

use std::path::{Path, PathBuf};

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::reference::RegistryName;
use crate::error::{Error, Result};
use cowl_layers::shown::Show as _;

/// Whether the certificate of a registry is verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVerify {
    /// It is verified, and plain HTTP is used only on this machine.
    #[default]
    On,
    /// Any certificate is accepted, and plain HTTP as well.
    Off,
}

/// The trust in registries.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// Whether certificates are verified.
    pub verify: TlsVerify,
    /// A directory with more certificates: files that end in `.crt`.
    pub cert_dir: Option<PathBuf>,
}

/// Directories with the certificates of one registry each, in directories with the name of the registry.
const CERTS_D: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// The maximum size of a file of certificates, in bytes.
const MAX_FILE: u64 = 4 << 20;

impl Trust {
    /// Returns the TLS configuration for a registry.
    pub(super) fn tls(&self, registry: &RegistryName) -> Result<TlsConfig> {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let builder = TlsConfig::builder().unversioned_rustls_crypto_provider(provider);
        if self.verify == TlsVerify::Off {
            return Ok(builder.disable_verification(true).build());
        }
        let mut certificates = self.own(registry)?;
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            log::info!("cannot read a certificate of this machine: {error}");
        }
        for certificate in &system.certs {
            certificates.push(Certificate::from_der(certificate).to_owned());
        }
        if certificates.is_empty() {
            // Not an error yet: a registry on this machine may do without TLS.
            log::info!("this machine has no certificates of certification authorities");
        }
        let roots = RootCerts::new_with_certs(&certificates);
        Ok(builder.root_certs(roots).build())
    }

    /// Returns the certificates for this registry that are not those of the machine.
    fn own(&self, registry: &RegistryName) -> Result<Vec<Certificate<'static>>> {
        let mut found = Vec::new();
        match &self.cert_dir {
            Some(dir) => read_dir(dir, &mut found)?,
            None => {
                for parent in CERTS_D {
                    let dir = Path::new(parent).join(registry.as_str());
                    if dir.is_dir() {
                        read_dir(&dir, &mut found)?;
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Reads the certificates in the files of a directory that end in `.crt`.
fn read_dir(dir: &Path, found: &mut Vec<Certificate<'static>>) -> Result<()> {
    let at = |error| Error::at("read", dir, error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at)? {
        names.push(entry.map_err(at)?.file_name());
    }
    names.sort_unstable();
    for name in names {
        let path = dir.join(&name);
        if path.extension().is_some_and(|extension| extension == "crt") {
            let text = super::answer::read_file(&path, MAX_FILE)?;
            let before = found.len();
            for item in parse_pem(&text) {
                match item {
                    Ok(PemItem::Certificate(certificate)) => found.push(certificate),
                    Ok(_) => {}
                    Err(error) => return Err(Error::at("read", &path, error)),
                }
            }
            if found.len() == before {
                return Err(Error::failed(format!(
                    "{} contains no certificate in the PEM format",
                    path.shown()
                )));
            }
        }
    }
    Ok(())
}
