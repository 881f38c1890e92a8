//! The certificates that connections to registries trust.

use std::path::{Path, PathBuf};

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

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
    /// A directory with more certificates: those of authorities (`*.crt`), and that of the client (`*.cert`, `*.key`).
    pub cert_dir: Option<PathBuf>,
}

/// Directories with the certificates of one registry each, in directories with the name of the registry.
const CERTS_D: [&str; 2] = ["/etc/containers/certs.d", "/etc/docker/certs.d"];

/// The maximum size of a file of certificates, in bytes.
const MAX_FILE: u64 = 4 << 20;

impl Trust {
    /// Returns the TLS configurations for a registry, and for the other hosts that it names.
    pub(super) fn tls(&self, registry: &RegistryName) -> Result<Tls> {
        let own = self.own(registry, &CERTS_D.map(Path::new))?;
        let roots = match self.verify {
            TlsVerify::Off => None,
            TlsVerify::On => Some(roots(own.authorities)),
        };
        let config = |client| {
            let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
            let builder = TlsConfig::builder().unversioned_rustls_crypto_provider(provider);
            let builder = builder.client_cert(client);
            match &roots {
                None => builder.disable_verification(true).build(),
                Some(roots) => builder.root_certs(roots.clone()).build(),
            }
        };
        Ok(Tls {
            foreign: own.client.is_some().then(|| config(None)),
            own: config(own.client),
            is_configured: own.is_configured,
        })
    }

    /// Returns the certificates for this registry that are not those of the machine. `defaults` are directories with a
    /// directory for each registry.
    fn own(&self, registry: &RegistryName, defaults: &[&Path]) -> Result<Own> {
        let mut found = Own::default();
        if let Some(dir) = &self.cert_dir {
            let paths = list(dir)?;
            found.is_configured = has_certificates(&paths);
            found.authorities = authorities(&paths)?;
            found.client = client(dir, &paths)?;
            return Ok(found);
        }
        for parent in defaults {
            let dir = parent.join(registry.as_str());
            match std::fs::metadata(&dir) {
                Ok(found) if found.is_dir() => {}
                Err(error) if !is_absent(&error) => {
                    log::warn!(
                        "certificates may be missing: cannot read {}: {error}",
                        dir.shown()
                    );
                    found.is_configured = true;
                    continue;
                }
                Ok(_) | Err(_) => continue,
            }
            let paths = list(&dir)?;
            found.is_configured |= has_certificates(&paths);
            found.authorities.extend(authorities(&paths)?);
            if found.client.is_none() {
                // The registry may not require one, and only root may be able to read the key.
                found.client = client(&dir, &paths).unwrap_or_else(|error| {
                    log::warn!("no certificate of the client is used: {error}");
                    None
                });
            }
        }
        Ok(found)
    }
}

/// The TLS configurations of a connection.
pub(super) struct Tls {
    /// That for the registry.
    pub(super) own: TlsConfig,
    /// That for other hosts, which must not see the certificate of the client; `None` if there is none.
    pub(super) foreign: Option<TlsConfig>,
    /// Whether there are certificates for this registry, which is then not used without TLS: while a registry on this
    /// machine is not running, any user can listen on its port.
    pub(super) is_configured: bool,
}

/// Returns the authorities that are trusted: those of the machine, and more.
fn roots(mut certificates: Vec<Certificate<'static>>) -> RootCerts {
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
    RootCerts::new_with_certs(&certificates)
}

/// The certificates of the user for one registry. They contain a private key, so that they are not printed.
#[derive(Default)]
struct Own {
    authorities: Vec<Certificate<'static>>,
    /// The certificate of the client with its key, from the first directory that has one.
    client: Option<ClientCert>,
    /// Whether there are certificates, including one of the client that cannot be used.
    is_configured: bool,
}

/// Returns the paths of the files in a directory, sorted.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let at = |error| Error::at("read", dir, error);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(at)? {
        paths.push(entry.map_err(at)?.path());
    }
    paths.sort_unstable();
    Ok(paths)
}

fn with<'p>(paths: &'p [PathBuf], wanted: &'static str) -> impl Iterator<Item = &'p PathBuf> {
    let has = move |path: &&PathBuf| path.extension().is_some_and(|own| own == wanted);
    paths.iter().filter(has)
}

/// Returns whether an error means that there is no such directory. Another error, for example that this user cannot
/// search a parent directory, leaves this open.
fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Returns whether some of the files are certificates, whether or not they can be read.
fn has_certificates(paths: &[PathBuf]) -> bool {
    with(paths, "crt")
        .chain(with(paths, "cert"))
        .next()
        .is_some()
}

/// Reads the certificates of authorities (`*.crt`).
fn authorities(paths: &[PathBuf]) -> Result<Vec<Certificate<'static>>> {
    let mut found = Vec::new();
    for path in with(paths, "crt") {
        found.extend(certificates(path)?);
    }
    Ok(found)
}

/// Reads the certificate of the client (`NAME.cert`) with its key (`NAME.key`), if there is one.
fn client(dir: &Path, paths: &[PathBuf]) -> Result<Option<ClientCert>> {
    for key in with(paths, "key") {
        let certificate = key.with_extension("cert");
        if !paths.contains(&certificate) {
            let what = format!("{} has no certificate", key.shown());
            let hint = format!("the file of its certificate is {}", certificate.shown());
            return Err(Error::failed(what).hint(hint));
        }
    }
    let mut clients = with(paths, "cert");
    let Some(path) = clients.next() else {
        return Ok(None);
    };
    if let Some(second) = clients.next() {
        let what = format!(
            "{} has more than one certificate of the client: {} and {}",
            dir.shown(),
            path.shown(),
            second.shown()
        );
        return Err(Error::failed(what).hint("select another directory: --cert-dir"));
    }
    let chain = certificates(path)?;
    let key = path.with_extension("key");
    if !paths.contains(&key) {
        let what = format!("{} has no key", path.shown());
        let hint = format!("the file of its key is {}", key.shown());
        return Err(Error::failed(what).hint(hint));
    }
    let key = private_key(&key)?;
    check_client(&chain, &key).map_err(|error| {
        let what = format!("{} cannot be the certificate of the client", path.shown());
        Error::failed(what)
            .hint("it must be an X.509 certificate of version 3 that belongs to its key")
            .because(error)
    })?;
    Ok(Some(ClientCert::new_with_certs(&chain, key)))
}

/// Reads the certificates in a file, which has at least one.
fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let text = super::answer::read_file(path, MAX_FILE)?;
    let mut found = Vec::new();
    for item in parse_pem(&text) {
        match item {
            Ok(PemItem::Certificate(certificate)) => found.push(certificate),
            Ok(_) => {}
            Err(error) => return Err(Error::at("read", path, error)),
        }
    }
    match found.is_empty() {
        true => Err(Error::failed(format!(
            "{} contains no certificate in the PEM format",
            path.shown()
        ))),
        false => Ok(found),
    }
}

/// Reads the private key in a file.
fn private_key(path: &Path) -> Result<PrivateKey<'static>> {
    let text = super::answer::read_file(path, MAX_FILE)?;
    // The error could quote a part of the key.
    PrivateKey::from_pem(&text).map_err(|_| {
        Error::failed(format!(
            "{} contains no private key in the PEM format that can be used",
            path.shown()
        ))
        .hint("it must not be encrypted")
    })
}

/// Returns an error if rustls does not accept the certificate of the client: ureq would panic.
fn check_client(
    chain: &[Certificate<'static>],
    key: &PrivateKey<'static>,
) -> std::result::Result<(), rustls::Error> {
    let chain = chain.iter();
    let chain = chain.map(|certificate| CertificateDer::from(certificate.der().to_vec()));
    let key = PrivateKeyDer::try_from(key.der().to_vec())
        .map_err(|why| rustls::Error::General(why.to_owned()))?;
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_client_auth_cert(chain.collect(), key)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_searched_may_have_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let registry = RegistryName::parse("localhost:5000").unwrap();
        let is_configured = |parent: &Path| {
            let own = Trust::default().own(&registry, &[parent]).unwrap();
            own.is_configured
        };
        assert!(!is_configured(&dir.path().join("none")));
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(!is_configured(&dir.path().join("file")));
        std::fs::create_dir(dir.path().join("localhost:5000")).unwrap();
        assert!(!is_configured(dir.path()));
        // As root, a loop of links stands for a directory without permission.
        let endless = dir.path().join("loop");
        std::os::unix::fs::symlink("loop", &endless).unwrap();
        assert!(is_configured(&endless));
    }

    #[test]
    fn the_certificate_of_a_client_needs_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let registry = RegistryName::parse("r.example").unwrap();
        let own = dir.path().join("r.example");
        std::fs::create_dir(&own).unwrap();
        let explicit = Trust {
            cert_dir: Some(own.clone()),
            ..Trust::default()
        };
        let read = || explicit.own(&registry, &[]);
        let default = || Trust::default().own(&registry, &[dir.path()]);
        let write = |name: &str, text: &str| std::fs::write(own.join(name), text).unwrap();
        read().unwrap();
        write("README", "not a certificate");
        read().unwrap();
        write("ca.crt", "");
        assert!(default().is_err());
        for (name, word) in [
            ("ca.crt", "no certificate"),
            ("client.key", "client.cert"),
            ("client.cert", "no certificate"),
            ("other.cert", "more than one"),
        ] {
            write(name, "");
            let error = read().map(drop).unwrap_err();
            let text = format!("{error} {}", error.hint.as_deref().unwrap_or_default());
            assert!(text.contains(word), "{name}: {text}");
            assert_eq!(error.kind, crate::error::Kind::Failed, "{name}");
            if name == "ca.crt" {
                std::fs::remove_file(own.join(name)).unwrap();
            }
            // The files in a default directory were not selected for this command.
            let found = default().unwrap();
            assert!(found.client.is_none(), "{name}");
            // A certificate that cannot be used still shows that the registry is used with TLS.
            assert_eq!(found.is_configured, name.ends_with(".cert"), "{name}");
        }
    }
}
