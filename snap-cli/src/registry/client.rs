//! Requests to a registry, with credentials, and with further attempts after errors that may pass.

use std::fs::File;
use std::io::{Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::NON_ALPHANUMERIC;
use serde::Deserialize;
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use ureq::{Agent, AsSendBody, Body, SendBody};

use super::answer;
use super::auth_file::AuthFiles;
use super::challenge::Challenge;
use super::credentials::{self, Credential};
use super::pace::{self, Pace};
use super::parallel::Transfer;
use super::patience::{self, Patience};
use super::reference::{RegistryName, RegistryRef};
use super::transport::{self, Connection};
use super::trust::Trust;
use crate::error::{Error, Kind, Result};

/// The maximum number of redirects of a request.
const REDIRECTS: u32 = 5;

/// The maximum size of the answer of a token server, in bytes.
const MAX_TOKEN: u64 = 1 << 20;

/// The time in which a connection must transfer a part of a blob.
const IDLE: Duration = Duration::from_secs(60);

/// The time until the answer to an upload: some registries assemble a blob before they answer.
const ANSWER: Duration = Duration::from_secs(600);

/// The permission that a command needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read a repository.
    Pull,
    /// To read and to write a repository, and to read another one, whose layers are mounted.
    Push {
        /// The other repository.
        from: Option<String>,
    },
}

/// A client of one repository.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    repository: String,
    scopes: Vec<String>,
    credential: Option<Credential>,
    /// The header Authorization, once the registry has requested it.
    authorization: Mutex<Option<HeaderValue>>,
}

/// The content of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content<'c> {
    None,
    Bytes(&'c [u8]),
    /// A file from an offset to its end, and the transfer that it is a part of.
    File(&'c Path, u64, &'c Transfer),
}

/// A request.
#[derive(Clone, Debug)]
pub(super) struct Call<'c> {
    pub(super) method: Method,
    pub(super) url: String,
    pub(super) headers: Vec<(header::HeaderName, String)>,
    pub(super) content: Content<'c>,
    /// The size of the blob in the answer, in bytes, which makes the time to receive it longer; 0 for documents.
    pub(super) blob_size: u64,
}

impl<'c> Call<'c> {
    /// Creates a request without headers and content, whose answer has a short body.
    pub(super) fn new(method: Method, url: String) -> Self {
        Self {
            method,
            url,
            headers: Vec::new(),
            content: Content::None,
            blob_size: 0,
        }
    }
}

impl Client {
    /// Connects to the registry of a reference. Finds the credentials for it in `files`.
    pub fn connect(
        reference: &RegistryRef,
        access: &Access,
        (trust, files): (&Trust, &AuthFiles),
    ) -> Result<Self> {
        let repository = &reference.repository;
        let scopes = match access {
            Access::Pull => vec![format!("repository:{repository}:pull")],
            Access::Push { from } => {
                let own = format!("repository:{repository}:pull,push");
                let from = from.iter().map(|from| format!("repository:{from}:pull"));
                // Some token servers use only the last one.
                from.chain(std::iter::once(own)).collect()
            }
        };
        let credential = credentials::find(files, &reference.registry, repository)?;
        let connection = Connection::open(&reference.registry, trust)?;
        Ok(Self::new(
            connection,
            repository.clone(),
            scopes,
            credential,
        ))
    }

    pub(super) fn new(
        connection: Connection,
        repository: String,
        scopes: Vec<String>,
        credential: Option<Credential>,
    ) -> Self {
        Self {
            connection,
            repository,
            scopes,
            credential,
            authorization: Mutex::new(None),
        }
    }

    /// Returns the registry.
    pub fn registry(&self) -> &RegistryName {
        self.connection.registry()
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Returns the URL of a path of the repository, such as `blobs/DIGEST`.
    pub(super) fn url(&self, path: &str) -> String {
        self.connection
            .url(&format!("/v2/{}/{path}", self.repository))
    }

    /// Returns a request to the repository.
    pub(super) fn call(&self, method: Method, path: &str) -> Call<'static> {
        Call::new(method, self.url(path))
    }

    /// Sends a request; repeats it after an error that may pass.
    ///
    /// The answer may be an error of the registry.
    pub(super) fn send(&self, call: &Call<'_>) -> Result<Response<Body>> {
        self.send_for(call, None)
    }

    /// Sends a request like [`Self::send`]. Does not wait any longer once another of several transfers has failed.
    pub(super) fn send_for(
        &self,
        call: &Call<'_>,
        transfer: Option<&Transfer>,
    ) -> Result<Response<Body>> {
        self.send_patiently(call, transfer, &mut Patience::new())
    }

    /// Sends a request like [`Self::send_for`], as an attempt of an operation with more attempts.
    pub(super) fn send_patiently(
        &self,
        call: &Call<'_>,
        transfer: Option<&Transfer>,
        patience: &mut Patience,
    ) -> Result<Response<Body>> {
        loop {
            let result = self.send_once(call);
            let (error, requested) = match &result {
                Ok(response) if answer::is_temporary(response.status()) => {
                    let what = format!("{} answered {}", self.registry(), response.status());
                    (Error::failed(what), answer::retry_after(response.headers()))
                }
                Err(error) if error.kind == Kind::Busy => (Error::failed(error.to_string()), None),
                Ok(_) | Err(_) => return result,
            };
            let Some(wait) = patience.next_wait(requested) else {
                return result.map_err(|error| Error {
                    kind: Kind::Failed,
                    ..error
                });
            };
            patience::report(&error, wait);
            match transfer {
                Some(transfer) => transfer.wait(wait)?,
                None => std::thread::sleep(wait),
            }
        }
    }

    /// Sends a request once, and follows redirects. An error of the connection has the kind [`Kind::Busy`].
    pub(super) fn send_once(&self, call: &Call<'_>) -> Result<Response<Body>> {
        let mut call = call.clone();
        for _ in 0..=REDIRECTS {
            let response = self.send_authorized(&call)?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let Some(location) = answer::text(response.headers(), header::LOCATION.as_str()) else {
                return Ok(response);
            };
            if !matches!(call.method, Method::GET | Method::HEAD) {
                let what = format!(
                    "{} redirects an upload, which is not supported",
                    self.registry()
                );
                return Err(Error::failed(what));
            }
            call.url = self.connection.resolve(&call.url, location)?;
        }
        let what = format!("{} redirects a request too often", self.registry());
        Err(Error::failed(what))
    }

    /// Sends a request; if the registry requires authentication, sends it again with the credentials.
    fn send_authorized(&self, call: &Call<'_>) -> Result<Response<Body>> {
        if !self.connection.is_own(&call.url) {
            return self.exchange(call, None);
        }
        let before = self.authorization();
        let response = self.exchange(call, before.as_ref())?;
        if response.status().as_u16() != 401 {
            return Ok(response);
        }
        let Some(challenge) = challenge(response.headers()) else {
            return Ok(response);
        };
        let Some(authorization) = self.authorize(&challenge, before.as_ref())? else {
            return Ok(response);
        };
        self.exchange(call, Some(&authorization))
    }

    fn authorization(&self) -> Option<HeaderValue> {
        let held = self.authorization.lock();
        held.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the header Authorization for a challenge, unless another thread has replaced that of `before` already;
    /// `None` if the registry requires a password and there is none.
    fn authorize(
        &self,
        challenge: &Challenge,
        before: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>> {
        let held = self.authorization.lock();
        let mut held = held.unwrap_or_else(PoisonError::into_inner);
        if held.as_ref() != before {
            return Ok(held.clone());
        }
        let new = match (challenge, &self.credential) {
            (Challenge::Basic, Some(Credential::Basic(user, password))) => {
                let new = basic(user, password)?;
                // The same password fails again.
                (Some(&new) != before).then_some(new)
            }
            (Challenge::Basic, _) => None,
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                _,
            ) => {
                let token = self.token(realm, service.as_deref(), scope.as_deref())?;
                let value = HeaderValue::from_str(&format!("Bearer {token}"));
                let mut value = value.map_err(|_| self.token_error("the token is invalid"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        if new.is_some() {
            held.clone_from(&new);
        }
        Ok(new)
    }

    /// Requests a token. If the token server refuses the other repository, requests one without it: then its layers are
    /// not mounted, but sent.
    fn token(&self, realm: &str, service: Option<&str>, scope: Option<&str>) -> Result<String> {
        // The scope of the challenge is that of one request.
        let mut scopes: Vec<&str> = self.scopes.iter().map(String::as_str).collect();
        if scopes.is_empty() {
            scopes.extend(scope);
        }
        match (self.token_for(realm, service, &scopes), scopes.last()) {
            (Err(error), Some(own)) if error.kind == Kind::Failed && scopes.len() > 1 => {
                log::info!("{error}");
                self.token_for(realm, service, &[own])
            }
            (result, _) => result,
        }
    }

    fn token_for(&self, realm: &str, service: Option<&str>, scopes: &[&str]) -> Result<String> {
        let base = self.connection.url("/v2/");
        let realm = self.connection.resolve(&base, realm)?;
        let mut fields: Vec<(&str, &str)> = Vec::new();
        fields.extend(service.map(|service| ("service", service)));
        let (method, url, authorization, body);
        match &self.credential {
            Some(Credential::Identity(token)) => {
                let scopes = scopes.join(" ");
                fields.extend([("grant_type", "refresh_token"), ("client_id", "cowl")]);
                fields.extend([
                    ("refresh_token", token.as_str()),
                    ("scope", scopes.as_str()),
                ]);
                (method, url, authorization) = (Method::POST, realm, None);
                body = encoded(&fields);
            }
            other => {
                fields.extend(scopes.iter().map(|scope| ("scope", *scope)));
                let separator = if realm.contains('?') { '&' } else { '?' };
                authorization = match other {
                    Some(Credential::Basic(user, password)) => Some(basic(user, password)?),
                    _ => None,
                };
                method = Method::GET;
                url = format!("{realm}{separator}{}", encoded(&fields));
                body = String::new();
            }
        }
        let form = "application/x-www-form-urlencoded".to_owned();
        let content = match body.is_empty() {
            true => Content::None,
            false => Content::Bytes(body.as_bytes()),
        };
        let call = Call {
            headers: match body.is_empty() {
                true => Vec::new(),
                false => vec![(header::CONTENT_TYPE, form)],
            },
            content,
            ..Call::new(method, url)
        };
        let response = self.exchange(&call, authorization.as_ref())?;
        if !response.status().is_success() {
            let (status, text) = answer::describe(response);
            let error = self.token_error(&text);
            return Err(match status.as_u16() {
                401 | 403 => error.hint(self.login_hint()),
                _ if answer::is_temporary(status) => Error {
                    kind: Kind::Busy,
                    ..error
                },
                _ => error,
            });
        }
        let data = answer::read(response, MAX_TOKEN, "the answer of the token server")?;
        let answer: TokenAnswer = serde_json::from_slice(&data)
            .map_err(|error| self.token_error("its answer is not a token").because(error))?;
        let token = answer.token.or(answer.access_token);
        token
            .filter(|token| !token.is_empty())
            .ok_or_else(|| self.token_error("it sent no token"))
    }

    fn token_error(&self, why: &str) -> Error {
        Error::failed(format!("cannot get a token for {}: {why}", self.registry()))
    }

    fn login_hint(&self) -> String {
        match &self.credential {
            Some(_) => format!(
                "check the permissions of this user, or log in again: cowl login {}",
                self.registry()
            ),
            None => format!("log in: cowl login {}", self.registry()),
        }
    }

    /// Sends a request and returns the answer, whatever it is.
    fn exchange(
        &self,
        call: &Call<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Body>> {
        let mut request = Request::builder().method(&call.method).uri(&call.url);
        for (name, value) in &call.headers {
            request = request.header(name, value);
        }
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let agent = self.connection.agent_for(&call.url);
        let invalid = |error: ureq::http::Error| {
            Error::failed(format!("cannot create a request to {}", self.registry())).because(error)
        };
        let idle = match call.method {
            Method::GET | Method::HEAD => IDLE,
            _ => ANSWER,
        };
        // The rate is measured when a part of the body arrives, and what surrounds its parts can be endless.
        let body = pace::longest(call.blob_size);
        let answered = match call.content {
            Content::None if matches!(call.method, Method::GET | Method::HEAD) => {
                let request = request.body(()).map_err(invalid)?;
                run(agent, request, (idle, body))
            }
            Content::None | Content::Bytes(_) => {
                let data = match call.content {
                    Content::Bytes(data) => data,
                    _ => &[],
                };
                let request = request.body(data).map_err(invalid)?;
                run(agent, request, (idle, body))
            }
            Content::File(path, offset, transfer) => {
                let at = |error| Error::at("read", path, error);
                let mut file = File::open(path).map_err(at)?;
                let size = file.metadata().map_err(at)?.len();
                file.seek(SeekFrom::Start(offset)).map_err(at)?;
                let length = size.saturating_sub(offset);
                let mut reader = CountingReader {
                    input: file.take(length),
                    transfer,
                    sent: 0,
                    pace: Pace::new(),
                    last: None,
                    failed: None,
                };
                let request = request
                    .header(header::CONTENT_LENGTH, length)
                    .body(SendBody::from_reader(&mut reader))
                    .map_err(invalid)?;
                let answered = run(agent, request, (idle, body));
                // What was not received is sent again.
                let is_received = matches!(&answered, Ok(answer) if answer.status().is_success());
                if !is_received {
                    transfer.bytes.fetch_sub(reader.sent, Ordering::Relaxed);
                }
                transfer.check()?;
                if let Some(error) = reader.failed.take() {
                    return Err(at(error));
                }
                answered
            }
        };
        answered.map_err(|error| {
            let kind = match transport::may_pass_later(&error) {
                true => Kind::Busy,
                false => Kind::Failed,
            };
            let what = format!("the connection to {} failed", host_of(&call.url));
            Error::new(kind, what)
                .hint("try again: data that was transferred is not transferred again")
                .because(error)
        })
    }

    /// Returns the error for an answer that is not expected; `what` is the failed operation.
    pub(super) fn refusal(&self, what: &str, response: Response<Body>) -> Error {
        let (status, text) = answer::describe(response);
        let what = format!("{what}: {} answered {text}", self.registry());
        match status.as_u16() {
            401 | 403 => Error::failed(what).hint(self.login_hint()),
            404 => Error::not_found(what).hint("check the repository and the tag"),
            429 => Error::failed(what).hint("the registry limits requests: wait, or log in"),
            _ => Error::failed(what),
        }
    }
}

/// Sends a request, with time limits for each read and for the body of the answer.
fn run(
    agent: &Agent,
    request: Request<impl AsSendBody>,
    (read, body): (Duration, Duration),
) -> std::result::Result<Response<Body>, ureq::Error> {
    let configured = agent.configure_request(request);
    let configured = configured.timeout_per_read(Some(read));
    agent.run(configured.timeout_recv_body(Some(body)).build())
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

/// Returns the host in a URL, for messages.
fn host_of(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.split(['/', '?']).next();
    answer::shortened(host.unwrap_or_default())
}

fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let values = headers.get_all(header::WWW_AUTHENTICATE).iter();
    Challenge::select(values.filter_map(|value| value.to_str().ok()))
}

fn basic(user: &str, password: &str) -> Result<HeaderValue> {
    let encoded = STANDARD.encode(format!("{user}:{password}"));
    let value = HeaderValue::from_str(&format!("Basic {encoded}"));
    let mut value =
        value.map_err(|error| Error::failed("the credential is invalid").because(error))?;
    value.set_sensitive(true);
    Ok(value)
}

/// Encodes fields as in a form, or in the query of a URL.
pub(super) fn encoded(fields: &[(&str, &str)]) -> String {
    let pairs = fields.iter().map(|(key, value)| {
        let value = percent_encoding::utf8_percent_encode(value, NON_ALPHANUMERIC);
        format!("{key}={value}")
    });
    pairs.collect::<Vec<_>>().join("&")
}

/// A reader that counts, and that ends with an error if another transfer has failed, or if the registry reads too slowly.
struct CountingReader<'c, R> {
    input: R,
    transfer: &'c Transfer,
    sent: u64,
    pace: Pace,
    /// The time at which the last part was read, and its size.
    last: Option<(Instant, u64)>,
    /// The error of the file, which is not one of the connection.
    failed: Option<std::io::Error>,
}

impl<R: Read> Read for CountingReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.transfer.check().map_err(std::io::Error::other)?;
        if let Some((since, bytes)) = self.last {
            self.pace.count(bytes, since.elapsed())?;
        }
        let got = match self.input.read(buffer) {
            Ok(got) => got,
            Err(error) => {
                let copy = error.kind().into();
                self.failed = Some(error);
                return Err(copy);
            }
        };
        self.last = Some((Instant::now(), got as u64));
        self.sent += got as u64;
        self.transfer.bytes.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}

/// Returns a directory in the store for transfers, which is created if necessary.
pub(super) fn transfer_dir(dir: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt as _;
    let mut builder = std::fs::DirBuilder::new();
    let created = builder.mode(0o700).recursive(true).create(dir);
    created.map_err(|error| Error::at("create the directory", dir, error))?;
    Ok(dir.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_encoded() {
        let fields = [
            ("scope", "repository:a/b:pull"),
            ("service", "a&b=c d\u{e9}"),
        ];
        let expected = "scope=repository%3Aa%2Fb%3Apull&service=a%26b%3Dc%20d%C3%A9";
        assert_eq!(encoded(&fields), expected);
    }
}
