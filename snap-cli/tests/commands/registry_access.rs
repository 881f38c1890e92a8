//! Credentials for registries and where they are sent, tokens, credential helpers, and uploads that fail.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use cowl_tests::conditions::{Need, can};
use serde_json::{Value, json};

use crate::fake_registry::{Answer, FakeRegistry, Request};
use crate::image::digest;
use crate::image_import::{World, two_layers};
use crate::registry::{Content, assert_nothing_was_created, large, transfers};

fn auth_file(path: &Path, registry: &str) -> String {
    // u:p:w d
    let auths = json!({ "auths": { registry: { "auth": "dTpwOncgZA==" } } });
    std::fs::write(path, auths.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Credentials are sent only to the registry and to its token server, and a token server must use TLS.
#[test]
fn credentials_are_not_sent_to_other_hosts() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let elsewhere = content.clone();
    let other = FakeRegistry::start(move |request| elsewhere.answer(request));
    let to = other.name();
    let registry = FakeRegistry::start(move |request| {
        if request.header("authorization") != Some("Basic dTpwOncgZA==") {
            return Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\"");
        }
        match request.path.contains("/blobs/") {
            true => Answer::new(307, "").header("Location", format!("http://{to}{}", request.path)),
            false => content.answer(request),
        }
    });
    let file = auth_file(&world.path("auth.json"), &registry.name());
    let reference = format!("{}/web", registry.name());
    world.ok(&["pull", &reference, "--authfile", &file]);
    let redirected = other.requests();
    assert_eq!(redirected.len(), 3);
    for request in redirected {
        assert_eq!(request.header("authorization"), None, "{request:?}");
    }
    world.ok(&["destroy", "web", "--now", "--yes"]);

    // Where a registry may not send a client.
    for location in [
        "http://192.0.2.1/x",
        "file:///etc/passwd",
        "http://u:p@127.0.0.1/",
        "x",
        "",
    ] {
        let registry = FakeRegistry::start(move |request| match request.path.as_str() {
            "/v2/" => Answer::new(200, "{}"),
            _ => Answer::new(302, "").header("Location", location),
        });
        world
            .run(&["pull", &format!("{}/web", registry.name())])
            .fails(1, &["refers to"]);
    }
    let registry = FakeRegistry::start(|request| match request.path.as_str() {
        "/v2/" => Answer::new(200, "{}"),
        path => Answer::new(302, "").header("Location", format!("{path}x")),
    });
    world
        .run(&["pull", &format!("{}/web", registry.name())])
        .fails(1, &["too often"]);
    // A token server without TLS on another machine.
    let registry = FakeRegistry::start(|_| {
        Answer::new(401, "").header(
            "WWW-Authenticate",
            "Bearer realm=\"http://192.0.2.1/token\"",
        )
    });
    let file = auth_file(&world.path("auth.json"), &registry.name());
    world
        .run(&[
            "pull",
            &format!("{}/web", registry.name()),
            "--authfile",
            &file,
        ])
        .fails(1, &["without TLS"]);
    assert_nothing_was_created(&world);
}

#[test]
fn tokens_are_requested_with_the_credentials() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let tokens = Arc::new(AtomicUsize::new(0));
    let issued = tokens.clone();
    let realm = Arc::new(Mutex::new(String::new()));
    let own_realm = realm.clone();
    let registry = FakeRegistry::start(move |request| {
        if let Some(query) = request.path.strip_prefix("/token?") {
            let expected = "service=reg%20x&scope=repository%3Ateam%2Fweb%3Apull";
            let is_known = request.header("authorization") == Some("Basic dTpwOncgZA==");
            // The number does not matter, but every token is valid for few requests.
            let number = issued.fetch_add(1, Ordering::Relaxed);
            return match query == expected && is_known {
                true => Answer::new(200, json!({ "token": format!("t{number}") }).to_string()),
                false => Answer::new(400, query.to_owned()),
            };
        }
        let valid = issued.load(Ordering::Relaxed).checked_sub(1);
        let valid = valid.map(|number| format!("Bearer t{number}"));
        let expires = request.path.contains("/blobs/") && issued.load(Ordering::Relaxed) == 1;
        match valid.as_deref() == request.header("authorization") && valid.is_some() && !expires {
            true => content.answer(request),
            false => {
                let realm = own_realm.lock().unwrap().clone();
                Answer::new(401, "").header(
                    "WWW-Authenticate",
                    format!("Bearer realm=\"{realm}\",service=\"reg x\",scope=\"x\""),
                )
            }
        }
    });
    *realm.lock().unwrap() = format!("http://{}/token", registry.name());
    let file = auth_file(&world.path("auth.json"), &registry.name());
    let reference = format!("{}/team/web", registry.name());
    world.ok(&["pull", &reference, "--authfile", &file]);
    assert_eq!(
        tokens.load(Ordering::Relaxed),
        2,
        "the first token has expired"
    );
    // Without credentials.
    let refused = world.run(&["pull", &reference, "second"]);
    refused.fails(1, &["cannot get a token"]);
    // Answers that are not tokens.
    for answer in ["", "[]", "{}", r#"{"token":""}"#, r#"{"token":"a\nb"}"#] {
        let realm = Arc::new(Mutex::new(String::new()));
        let own = realm.clone();
        let registry =
            FakeRegistry::start(move |request| match request.path.starts_with("/token") {
                true => Answer::new(200, answer),
                false => {
                    let realm = own.lock().unwrap().clone();
                    Answer::new(401, "")
                        .header("WWW-Authenticate", format!("Bearer realm=\"{realm}\""))
                }
            });
        *realm.lock().unwrap() = format!("http://{}/token", registry.name());
        world
            .run(&["pull", &format!("{}/web2", registry.name())])
            .fails(1, &["cannot get a token"]);
    }
}

/// Credentials of a helper, and of a file that cannot be used.
#[test]
fn credential_helpers_are_run() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let registry = FakeRegistry::start(move |request| {
        match request.header("authorization") == Some("Basic dTpwOncgZA==") {
            true => content.answer(request),
            false => Answer::new(401, "").header("WWW-Authenticate", "Basic realm=\"x\""),
        }
    });
    let helper = world.path("docker-credential-test");
    let script = "#!/bin/sh\nread -r server\necho \"$1 $server\" >> \"${0%/*}/calls\"\n\
                  echo '{\"ServerURL\":\"x\",\"Username\":\"u\",\"Secret\":\"p:w d\"}'\n";
    std::fs::write(&helper, script).unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let run = |config: Value, name: &str| {
        std::fs::write(world.path("config.json"), config.to_string()).unwrap();
        let path = format!("{}:{}", world.0.display(), std::env::var("PATH").unwrap());
        let mut command = std::process::Command::new(cowl_tests::programs::cowl());
        command.arg("--store").arg(world.path("store"));
        command.args([
            "pull",
            &format!("{}/web", registry.name()),
            name,
            "--authfile",
        ]);
        command.arg(world.path("config.json")).env("PATH", path);
        cowl_tests::command::run_command(command, b"")
    };
    run(json!({ "credsStore": "test" }), "one").ok();
    run(json!({ "credHelpers": { registry.name(): "test" } }), "two").ok();
    let calls = std::fs::read_to_string(world.path("calls")).unwrap();
    assert_eq!(calls, format!("get {0}\nget {0}\n", registry.name()));
    run(json!({ "credsStore": "../test" }), "x").fails(1, &["invalid name"]);
    run(json!({ "credsStore": "missing" }), "x").fails(1, &["docker-credential-missing"]);
    std::fs::write(
        &helper,
        "#!/bin/sh\necho 'credentials not found in store'; exit 1\n",
    )
    .unwrap();
    run(json!({ "credsStore": "test" }), "x").fails(1, &["401"]);
    std::fs::write(&helper, "#!/bin/sh\nyes\n").unwrap();
    run(json!({ "credsStore": "test" }), "x").fails(1, &["docker-credential-test"]);
}

/// The uploads and the blobs of a registry that fails twice while it receives a large blob.
#[derive(Default)]
pub(crate) struct Uploads {
    data: Mutex<HashMap<String, Vec<u8>>>,
    /// The blobs by digest, and the manifests by tag.
    pub(crate) blobs: Mutex<HashMap<String, Vec<u8>>>,
    posts: AtomicUsize,
    /// The number of requests with a large part of a blob.
    patches: AtomicUsize,
}

impl Uploads {
    pub(crate) fn answer(&self, request: &Request) -> Answer {
        let name = request
            .path
            .rsplit(['/', '='])
            .next()
            .unwrap()
            .replace("%3A", ":");
        let session = request.path.split('?').next().unwrap().to_owned();
        let mut uploads = self.data.lock().unwrap();
        let mut blobs = self.blobs.lock().unwrap();
        let answer = |status, state: &str| {
            Answer::new(status, "").header("Location", format!("{session}?state={state}"))
        };
        match request.method.as_str() {
            "GET" if request.path == "/v2/" => Answer::new(200, "{}"),
            "HEAD" | "GET" if method_reads_blob(request) => match blobs.get(&name) {
                Some(blob) => Answer::new(200, blob.clone()),
                None => Answer::new(404, ""),
            },
            "POST" => {
                let number = self.posts.fetch_add(1, Ordering::Relaxed);
                let session = format!("/v2/web/blobs/uploads/{number}");
                uploads.insert(session.clone(), Vec::new());
                Answer::new(202, "").header("Location", format!("{session}?state=x"))
            }
            "GET" => {
                let last = uploads[&session].len().max(1) - 1;
                answer(204, "y").header("Range", format!("0-{last}"))
            }
            "PATCH" => {
                let data = uploads.get_mut(&session).unwrap();
                // A whole blob is not a chunk.
                let range = request.header("content-range").unwrap_or("0-");
                assert_eq!(request.header("content-range").is_some(), !data.is_empty());
                let first = range.split('-').next().unwrap();
                assert_eq!(first.parse::<usize>().unwrap(), data.len());
                let is_large = request.body.len() > 1_000_000;
                let failures = self
                    .patches
                    .fetch_add(usize::from(is_large), Ordering::Relaxed);
                match is_large && failures < 2 {
                    true => {
                        data.extend(&request.body[..400_000]);
                        Answer::new(500, "")
                    }
                    false => {
                        data.extend(&request.body);
                        answer(202, "z")
                    }
                }
            }
            "PUT" if request.path.contains("/manifests/") => {
                blobs.insert(name, request.body.clone());
                Answer::new(201, "")
            }
            "PUT" => {
                let data = uploads.remove(&session).unwrap();
                assert_eq!(digest(&data), name);
                blobs.insert(name, data);
                Answer::new(201, "")
            }
            _ => Answer::new(405, ""),
        }
    }
}

/// Returns whether a request reads a blob or a manifest, and not the state of an upload.
fn method_reads_blob(request: &Request) -> bool {
    let is_object = |part: &str| request.path.contains(part);
    request.method == "HEAD" || is_object("/manifests/") || is_object("/blobs/sha256:")
}

/// An upload that is cut continues, and what the registry has is not sent.
#[test]
fn interrupted_uploads_continue() {
    let world = World::new();
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    std::fs::write(world.path("root/etc/large"), large()).unwrap();
    world.ok(&["create", "web", "--from", "root"]);
    world.ok(&["snapshot", "web"]);
    let uploads = Arc::new(Uploads::default());
    let answers = uploads.clone();
    let registry = FakeRegistry::start(move |request| answers.answer(request));
    let reference = format!("{}/web", registry.name());
    let digest = world.ok(&["push", "web@snap0", &reference]);
    assert!(
        digest.starts_with(&format!("{reference}@sha256:")),
        "{digest}"
    );
    assert_eq!(uploads.patches.load(Ordering::Relaxed), 3);
    assert!(transfers(&world).is_empty());
}

/// A registry on this machine may do without TLS, so that no certificates of authorities are necessary.
#[test]
fn a_local_registry_needs_no_certificates() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let registry = FakeRegistry::start(move |request| content.answer(request));
    std::fs::create_dir(world.path("empty")).unwrap();
    let pull = |reference: &str| {
        let mut command = std::process::Command::new(cowl_tests::programs::cowl());
        command.arg("--store").arg(world.path("store"));
        command.args(["pull", reference]);
        command.env("SSL_CERT_DIR", world.path("empty"));
        command.env_remove("SSL_CERT_FILE");
        cowl_tests::command::run_command(command, b"")
    };
    pull(&format!("{}/web", registry.name())).ok();
}

/// While a registry on this machine is not running, any user can listen on its port, and would get the password.
#[test]
fn a_local_registry_with_certificates_is_not_used_without_tls() {
    if !can(&[Need::Program("openssl")]) {
        return;
    }
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let registry = FakeRegistry::start(move |request| content.answer(request));
    let certificates = world.path("certificates");
    std::fs::create_dir(&certificates).unwrap();
    let name = registry.name();
    let pull = |options: &[&str]| {
        let reference = format!("{name}/web");
        world.run(&[&["pull", &reference], options].concat())
    };
    let with = ["--cert-dir", certificates.to_str().unwrap()];
    pull(&with).ok();
    world.ok(&["destroy", "web", "--now", "--yes"]);
    cowl_tests::command::sh(&format!(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x \
         -keyout {dir}/../key -out {dir}/ca.crt",
        dir = with[1]
    ))
    .ok();
    registry.take_lines();
    pull(&with).fails(1, &["cannot connect"]);
    assert_eq!(registry.take_lines(), [""; 0]);
    pull(&[&with[..], &["--tls-verify=false"]].concat()).ok();
}

/// A token server that refuses the repository from which layers could be mounted does not prevent a push.
#[test]
fn a_refused_scope_does_not_prevent_a_push() {
    let world = World::new();
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    world.ok(&["create", "web", "--from", "root"]);
    world.ok(&["snapshot", "web"]);
    let realm = Arc::new(Mutex::new(String::new()));
    let own_realm = realm.clone();
    let registry = FakeRegistry::start(move |request| {
        if let Some(query) = request.path.strip_prefix("/token?") {
            let scopes = query.split('&').filter(|field| field.starts_with("scope="));
            return match scopes.count() {
                1 => Answer::new(200, r#"{"token":"t"}"#),
                _ => Answer::new(400, ""),
            };
        }
        if request.header("authorization") != Some("Bearer t") {
            let realm = own_realm.lock().unwrap().clone();
            return Answer::new(401, "")
                .header("WWW-Authenticate", format!("Bearer realm=\"{realm}\""));
        }
        match (request.method.as_str(), request.path.contains("/blobs/")) {
            ("HEAD", true) => Answer::new(200, "").without_length(),
            ("PUT", false) => Answer::new(201, ""),
            _ => Answer::new(404, ""),
        }
    });
    *realm.lock().unwrap() = format!("http://{}/token", registry.name());
    let reference = format!("{}/web", registry.name());
    world.ok(&[
        "push",
        "web@snap0",
        &reference,
        "--mount-from",
        "other/base",
    ]);
    let tokens = registry.take_lines();
    let tokens = tokens.iter().filter(|line| line.contains("/token?"));
    assert_eq!(tokens.count(), 2);
    world
        .run(&["push", "web@snap0", &reference, "-m", "text"])
        .fails(2, &["--message"]);
}
