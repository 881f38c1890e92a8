//! Connections to registries: schemes, certificates, proxies, timeouts, and the rules for URLs that a registry sends.

use std::time::Duration;

use ureq::http::Uri;
use ureq::http::uri::Scheme;
use ureq::tls::TlsConfig;
use ureq::{Agent, Proxy};

use super::patience::{self, Patience};
use super::reference::{RegistryName, is_loopback};
use super::trust::{TlsVerify, Trust};
use crate::error::{Error, Result};

/// The time to connect, with TLS.
const CONNECT: Duration = Duration::from_secs(30);

/// The time of the first request.
const PROBE: Duration = Duration::from_secs(60);

/// The time in which a connection must transfer something.
const IDLE: Duration = Duration::from_secs(60);

/// The time until an answer begins. Some registries assemble a blob before they answer.
const ANSWER: Duration = Duration::from_secs(600);

/// The protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Https,
    Http,
}

/// A connection to a registry.
#[derive(Clone, Debug)]
pub struct Connection {
    registry: RegistryName,
    protocol: Protocol,
    verify: TlsVerify,
    agent: Agent,
    /// That for other hosts, which must not see the certificate of the client.
    foreign: Agent,
}

impl Connection {
    /// Connects to a registry: with TLS, or with plain HTTP if that fails and is permitted.
    pub fn open(registry: &RegistryName, trust: &Trust) -> Result<Self> {
        let tls = trust.tls(registry)?;
        let own = agent(registry, tls.own);
        let secure = Self {
            registry: registry.clone(),
            protocol: Protocol::Https,
            verify: trust.verify,
            foreign: tls
                .foreign
                .map_or_else(|| own.clone(), |tls| agent(registry, tls)),
            agent: own,
        };
        let plain = Self {
            protocol: Protocol::Http,
            ..secure.clone()
        };
        let may_be_plain = registry.is_loopback() && !tls.is_configured;
        let is_permitted = trust.verify == TlsVerify::Off || may_be_plain;
        let mut patience = Patience::new();
        loop {
            let failed = match secure.probe() {
                Ok(()) => return Ok(secure),
                Err(error) => error,
            };
            let may_pass = match is_permitted {
                false => may_pass(&failed),
                true => match plain.probe() {
                    Ok(()) => {
                        log::info!("{registry} is used without encryption");
                        return Ok(plain);
                    }
                    // A wrong certificate stays wrong, and its server answers no plain HTTP.
                    Err(error) => !is_certificate(&failed) && may_pass(&error),
                },
            };
            let error = connect_error(registry, failed);
            let wait = patience.next_wait(None).filter(|_| may_pass);
            let Some(wait) = wait else {
                return Err(error);
            };
            patience::report(&error, wait);
            std::thread::sleep(wait);
        }
    }

    /// Sends a first request. The answer may be anything but an error of plain HTTP to a TLS server.
    fn probe(&self) -> std::result::Result<(), ureq::Error> {
        let request = ureq::http::Request::get(self.url("/v2/")).body(())?;
        let request = self.agent.configure_request(request);
        let response = self
            .agent
            .run(request.timeout_global(Some(PROBE)).build())?;
        match (self.protocol, response.status().as_u16()) {
            // What TLS servers answer to plain HTTP.
            (Protocol::Http, 400) => Err(ureq::Error::Tls("the server requires TLS")),
            _ => Ok(()),
        }
    }

    /// Returns the registry.
    pub fn registry(&self) -> &RegistryName {
        &self.registry
    }

    /// Returns the agent for requests to a URL.
    pub(super) fn agent_for(&self, url: &str) -> &Agent {
        match self.is_own(url) {
            true => &self.agent,
            false => &self.foreign,
        }
    }

    /// Returns the URL of a path of the registry.
    pub(super) fn url(&self, path: &str) -> String {
        let scheme = match self.protocol {
            Protocol::Https => "https",
            Protocol::Http => "http",
        };
        format!("{scheme}://{}{path}", self.registry.endpoint())
    }

    /// Returns whether a URL is one of this registry, to which its credentials may be sent.
    pub(super) fn is_own(&self, url: &str) -> bool {
        match (url.parse::<Uri>(), self.url("/").parse::<Uri>()) {
            (Ok(url), Ok(own)) => origin(&url) == origin(&own) && origin(&own).is_some(),
            _ => false,
        }
    }

    /// Returns the URL that a registry sends in an answer to a request for `base`, if it may be used.
    pub(super) fn resolve(&self, base: &str, location: &str) -> Result<String> {
        let refuse = |why: &str| {
            let location = super::answer::shortened(location);
            let what = format!("{} refers to {location:?}: {why}", self.registry);
            Err(Error::failed(what))
        };
        let Ok(base) = base.parse::<Uri>() else {
            return refuse("the request has no valid URL");
        };
        let absolute = match (location.starts_with("//"), location.starts_with('/')) {
            (true, _) => format!("{}:{location}", base.scheme_str().unwrap_or("https")),
            (false, true) => {
                let authority = base.authority().map_or("", |authority| authority.as_str());
                format!(
                    "{}://{authority}{location}",
                    base.scheme_str().unwrap_or("https")
                )
            }
            (false, false) => location.to_owned(),
        };
        // A fragment is not a part of a request.
        let absolute = absolute.split('#').next().unwrap_or_default().to_owned();
        let Ok(url) = absolute.parse::<Uri>() else {
            return refuse("this is not a valid URL");
        };
        if url
            .authority()
            .is_none_or(|authority| authority.as_str().contains('@'))
        {
            return refuse("this is not the URL of a host");
        }
        match self.check(&url) {
            Ok(()) => Ok(absolute),
            Err(why) => refuse(why),
        }
    }

    /// Returns an error unless a URL that the registry sent may be used: it must use TLS, unless plain HTTP is permitted.
    fn check(&self, url: &Uri) -> std::result::Result<(), &'static str> {
        let host = url.authority().map_or("", |authority| authority.as_str());
        match url.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => Ok(()),
            Some(scheme) if *scheme == Scheme::HTTP => {
                let is_local = self.protocol == Protocol::Http && is_loopback(host);
                match is_local || self.verify == TlsVerify::Off {
                    true => Ok(()),
                    false => Err("a registry may not refer to a URL without TLS"),
                }
            }
            _ => Err("only https is supported"),
        }
    }
}

/// Returns the scheme, the host and the port of a URL.
fn origin(url: &Uri) -> Option<(String, String, u16)> {
    let scheme = url.scheme_str()?.to_ascii_lowercase();
    let default = match scheme.as_str() {
        "https" => 443,
        _ => 80,
    };
    let host = url.host()?.to_ascii_lowercase();
    Some((scheme, host, url.port_u16().unwrap_or(default)))
}

fn agent(registry: &RegistryName, tls: TlsConfig) -> Agent {
    let proxy = match registry.is_loopback() {
        true => None,
        false => Proxy::try_from_env(),
    };
    let config = Agent::config_builder()
        .tls_config(tls)
        .proxy(proxy)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("cowl/", env!("CARGO_PKG_VERSION")))
        .accept_encoding(ureq::config::AutoHeaderValue::None)
        .timeout_resolve(Some(CONNECT))
        .timeout_connect(Some(CONNECT))
        .timeout_per_read(Some(ANSWER))
        .timeout_per_write(Some(IDLE))
        .timeout_recv_response(Some(ANSWER))
        .build();
    config.new_agent()
}

/// Returns whether an error is one of TLS, and not of the network.
pub(super) fn is_tls(error: &ureq::Error) -> bool {
    matches!(error, ureq::Error::Tls(_)) || tls_error(error).is_some()
}

fn tls_error(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

/// Returns whether a server has a certificate that is not accepted, or does not accept that of the client.
fn is_certificate(error: &ureq::Error) -> bool {
    use rustls::Error::{AlertReceived, InvalidCertificate, NoCertificatesPresented};
    matches!(
        tls_error(error),
        Some(InvalidCertificate(_) | NoCertificatesPresented | AlertReceived(_))
    )
}

/// Returns whether a host that was connected to before, or that the registry names, may answer later.
pub(super) fn may_pass_later(error: &ureq::Error) -> bool {
    use rustls::AlertDescription as Alert;
    use rustls::Error::AlertReceived;
    match tls_error(error) {
        // Of a damaged record, or of an overloaded server.
        Some(AlertReceived(alert)) => matches!(alert, Alert::InternalError | Alert::BadRecordMac),
        Some(_) => !is_certificate(error),
        None => may_pass(error),
    }
}

/// Returns whether a connection may succeed later.
fn may_pass(error: &ureq::Error) -> bool {
    use std::io::ErrorKind as Kind;
    match error {
        ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed => true,
        ureq::Error::Io(_) if is_tls(error) => false,
        ureq::Error::Io(error) => match error.kind() {
            Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::NotConnected
            | Kind::BrokenPipe
            | Kind::TimedOut
            | Kind::WouldBlock
            | Kind::UnexpectedEof
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::NetworkDown => true,
            _ => is_unresolved(&error.to_string()),
        },
        _ => false,
    }
}

/// Returns whether an error is that of a name server that fails for now (EAI_AGAIN), for which std has no kind: only the text
/// of the C library (glibc's or musl's) is known.
fn is_unresolved(error: &str) -> bool {
    let text = error.strip_prefix("failed to lookup address information: ");
    text.is_some_and(|text| text.contains("Temporary failure") || text.starts_with("Try again"))
}

/// Returns whether a server does not accept the certificate of the client, or misses one.
fn is_client_certificate(error: &ureq::Error) -> bool {
    use rustls::AlertDescription as Alert;
    let Some(rustls::Error::AlertReceived(alert)) = tls_error(error) else {
        return false;
    };
    matches!(
        alert,
        Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
    )
}

fn connect_error(registry: &RegistryName, error: ureq::Error) -> Error {
    let hint = match (is_client_certificate(&error), is_tls(&error)) {
        (true, _) => {
            "the registry requires a certificate of the client that it knows: NAME.cert and NAME.key in --cert-dir DIR"
        }
        (false, true) => {
            "if the registry has a certificate of your own authority: --cert-dir DIR; if this machine has no \
             certificates of authorities, install them (on Debian: apt-get install ca-certificates); to accept any \
             certificate, or plain HTTP: --tls-verify=false"
        }
        (false, false) => "check the name of the registry and the network",
    };
    Error::failed(format!("cannot connect to {registry}"))
        .hint(hint)
        .because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(registry: &str, protocol: Protocol, verify: TlsVerify) -> Connection {
        Connection {
            registry: RegistryName::parse(registry).unwrap(),
            protocol,
            verify,
            agent: Agent::new_with_defaults(),
            foreign: Agent::new_with_defaults(),
        }
    }

    #[test]
    fn urls_of_a_registry_are_checked() {
        let secure = connection("r.example", Protocol::Https, TlsVerify::On);
        let local = connection("127.0.0.1:5000", Protocol::Http, TlsVerify::On);
        let open = connection("r.example", Protocol::Https, TlsVerify::Off);
        let base = "https://r.example/v2/a/blobs/x";
        for (connection, base, location, expected) in [
            (&secure, base, "/x?y=1", Some("https://r.example/x?y=1")),
            (
                &secure,
                base,
                "https://cdn.example/x",
                Some("https://cdn.example/x"),
            ),
            (
                &secure,
                base,
                "https://cdn.example/x#y",
                Some("https://cdn.example/x"),
            ),
            (
                &secure,
                base,
                "//cdn.example/x",
                Some("https://cdn.example/x"),
            ),
            (&secure, base, "http://r.example/x", None),
            (&secure, base, "http://127.0.0.1/x", None),
            (&secure, base, "file:///etc/passwd", None),
            (&secure, base, "https://user:x@cdn.example/", None),
            (&secure, base, "x", None),
            (&secure, base, "", None),
            (
                &open,
                base,
                "http://cdn.example/x",
                Some("http://cdn.example/x"),
            ),
            (
                &local,
                "http://127.0.0.1:5000/a",
                "/x",
                Some("http://127.0.0.1:5000/x"),
            ),
            (&local, "http://127.0.0.1:5000/a", "http://10.0.0.1/x", None),
        ] {
            let found = connection.resolve(base, location);
            assert_eq!(found.ok().as_deref(), expected, "{location}");
        }
    }

    #[test]
    fn the_certificate_of_the_client_is_sent_only_to_the_same_origin() {
        use ureq::tls::{Certificate, ClientCert, PrivateKey};
        let certificate = Certificate::from_der(b"x").to_owned();
        let pem = "-----BEGIN PRIVATE KEY-----\neA==\n-----END PRIVATE KEY-----\n";
        let key = PrivateKey::from_pem(pem.as_bytes()).unwrap();
        let client = ClientCert::new_with_certs(&[certificate], key);
        let tls = TlsConfig::builder().client_cert(Some(client)).build();
        let mut secure = connection("r.example", Protocol::Https, TlsVerify::On);
        secure.agent = agent(&secure.registry, tls);
        for (url, expected) in [
            ("https://r.example/v2/", true),
            ("https://r.example:444/v2/", false),
            ("https://auth.example/token", false),
        ] {
            let agent = secure.agent_for(url);
            let found = agent.config().tls_config().client_cert().is_some();
            assert_eq!(found, expected, "{url}");
        }
    }

    #[test]
    fn errors_of_name_servers_are_recognized() {
        let before = "failed to lookup address information: ";
        for (text, expected) in [
            ("Temporary failure in name resolution", true),
            ("Try again", true),
            ("Name or service not known", false),
            ("Name does not resolve", false),
        ] {
            assert_eq!(
                is_unresolved(&format!("{before}{text}")),
                expected,
                "{text}"
            );
        }
        assert!(!is_unresolved("Try again"));
    }

    #[test]
    fn errors_after_the_first_request_are_sorted() {
        use rustls::{AlertDescription as Alert, CertificateError, Error as Tls};
        use std::io::{Error as Io, ErrorKind};
        for (error, expected) in [
            (ureq::Error::HostNotFound, false),
            (ureq::Error::BadUri("x".to_owned()), false),
            (ureq::Error::Io(Io::from_raw_os_error(5)), false),
            (ureq::Error::Io(ErrorKind::ConnectionReset.into()), true),
            (ureq::Error::Io(Io::other(Tls::DecryptError)), true),
            (
                ureq::Error::Rustls(Tls::AlertReceived(Alert::InternalError)),
                true,
            ),
            (
                ureq::Error::Rustls(Tls::AlertReceived(Alert::UnknownCA)),
                false,
            ),
            (
                ureq::Error::Rustls(Tls::InvalidCertificate(CertificateError::Expired)),
                false,
            ),
        ] {
            assert_eq!(may_pass_later(&error), expected, "{error}");
        }
    }

    #[test]
    fn credentials_are_sent_only_to_the_same_origin() {
        let secure = connection("r.example", Protocol::Https, TlsVerify::On);
        for (url, expected) in [
            ("https://r.example/v2/", true),
            ("https://R.EXAMPLE:443/v2/", true),
            ("https://r.example:444/v2/", false),
            ("http://r.example/v2/", false),
            ("https://r.example.evil/v2/", false),
            ("https://evil/r.example", false),
        ] {
            assert_eq!(secure.is_own(url), expected, "{url}");
        }
    }
}
