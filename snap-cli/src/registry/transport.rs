//! Connections to registries: schemes, certificates, proxies, timeouts, and the rules for URLs that a registry sends.

use std::time::Duration;

use ureq::http::Uri;
use ureq::http::uri::Scheme;
use ureq::{Agent, Proxy};

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
}

impl Connection {
    /// Connects to a registry: with TLS, or with plain HTTP if that fails and is permitted.
    pub fn open(registry: &RegistryName, trust: &Trust) -> Result<Self> {
        let secure = Self {
            registry: registry.clone(),
            protocol: Protocol::Https,
            verify: trust.verify,
            agent: agent(registry, trust)?,
        };
        let failed = match secure.probe() {
            Ok(()) => return Ok(secure),
            Err(error) => error,
        };
        let plain = Self {
            protocol: Protocol::Http,
            ..secure
        };
        let is_permitted = trust.verify == TlsVerify::Off || registry.is_loopback();
        if is_permitted && plain.probe().is_ok() {
            log::info!("{registry} is used without encryption");
            return Ok(plain);
        }
        Err(connect_error(registry, failed))
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

    pub(super) fn agent(&self) -> &Agent {
        &self.agent
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

fn agent(registry: &RegistryName, trust: &Trust) -> Result<Agent> {
    let proxy = match registry.is_loopback() {
        true => None,
        false => Proxy::try_from_env(),
    };
    let config = Agent::config_builder()
        .tls_config(trust.tls(registry)?)
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
    Ok(config.new_agent())
}

fn connect_error(registry: &RegistryName, error: ureq::Error) -> Error {
    let is_tls = matches!(error, ureq::Error::Rustls(_) | ureq::Error::Tls(_))
        || matches!(&error, ureq::Error::Io(error) if error.get_ref().is_some_and(|e| e.is::<rustls::Error>()));
    let new = Error::failed(format!("cannot connect to {registry}"));
    let new = match is_tls {
        true => new.hint(
            "if the registry has a certificate of your own authority: --cert-dir DIR; if this machine has no \
             certificates of authorities, install them (on Debian: apt-get install ca-certificates); to accept any \
             certificate, or plain HTTP: --tls-verify=false",
        ),
        false => new.hint("check the name of the registry and the network"),
    };
    new.because(error)
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
