//! Registries and networks that fail for a while: requests are repeated, transfers continue, and nothing waits for ever.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use cowl_tests::command::run_command;
use serde_json::json;

use crate::fake_registry::{Answer, FakeRegistry};
use crate::image_import::{World, base, two_layers};
use crate::registry::{Content, assert_nothing_was_created, large, transfers};
use crate::registry_access::Uploads;

/// The first request of a command is repeated if the connection fails, and so are the others.
#[test]
fn failed_connections_are_repeated() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let failures = AtomicUsize::new(0);
    let registry = FakeRegistry::start(move |request| {
        let is_first = request.path == "/v2/";
        let number = failures.fetch_add(1, Ordering::Relaxed);
        // Three times at the beginning, and then every second request.
        match number < 3 || (!is_first && number.is_multiple_of(2)) {
            true => Answer::nothing(),
            false => content.answer(request),
        }
    });
    let done = world
        .run(&["pull", &format!("{}/web", registry.name())])
        .ok();
    let reported = done.err().matches("trying again").count();
    assert!(reported >= 4, "{}", done.report());
    assert!(done.err().contains("cannot connect"), "{}", done.report());
    assert_eq!(world.at("cat", "web", "etc/app"), "app");
}

/// A registry that refuses a request is not asked again.
#[test]
fn refused_requests_are_not_repeated() {
    let world = World::new();
    let registry = FakeRegistry::start(|request| match request.path.as_str() {
        "/v2/" => Answer::new(200, "{}"),
        _ => Answer::new(400, ""),
    });
    let refused = world.run(&["pull", &format!("{}/web", registry.name())]);
    assert!(!refused.fails(1, &["400"]).err().contains("trying again"));
    assert_eq!(registry.take_lines().len(), 1);
}

/// A registry that is overloaded determines when a command may return.
#[test]
fn requested_waits_are_respected() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let busy = AtomicBool::new(true);
    let registry = FakeRegistry::start(move |request| match request.path.as_str() {
        path if path.contains("/manifests/") && busy.swap(false, Ordering::Relaxed) => {
            Answer::new(429, "").header("Retry-After", "1")
        }
        _ => content.answer(request),
    });
    let done = world
        .run(&["pull", &format!("{}/web", registry.name())])
        .ok();
    assert!(done.err().contains("429"), "{}", done.report());
    assert!(
        done.err().contains("trying again in 1.0 s"),
        "{}",
        done.report()
    );
}

/// A registry that sends a byte now and then does not hold a command for ever.
#[test]
fn slow_answers_are_given_up() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let (_, layers) = content.parsed();
    for slow in ["/manifests/".to_owned(), layers[1].clone()] {
        let content = content.clone();
        let registry = FakeRegistry::start(move |request| {
            let answer = content.answer(request);
            match request.path.contains(&slow) {
                true => answer.slow(),
                false => answer,
            }
        });
        let mut command = world.command(&["pull", &format!("{}/web", registry.name())]);
        command.env("COWL_STALL_TIME", "200");
        let failed = run_command(command, b"").fails(1, &["cannot", "bytes were transferred in"]);
        // More if the machine is so busy that another answer is slow, too.
        let reported = failed.err().matches("trying again").count();
        assert!(reported >= 7, "{}", failed.report());
        assert_nothing_was_created(&world);
    }
}

/// The data of the body is complete, and what follows it is endless.
#[test]
fn endless_answers_are_given_up() {
    let world = World::new();
    let content = Content::new(&world, &two_layers());
    let (_, layers) = content.parsed();
    for endless in ["/manifests/".to_owned(), layers[1].clone()] {
        let (content, is_blob) = (content.clone(), endless == layers[1]);
        let registry = FakeRegistry::start(move |request| {
            let answer = content.answer(request);
            match request.path.contains(&endless) {
                true => answer.endless(),
                false => answer,
            }
        });
        let mut command = world.command(&["pull", &format!("{}/web", registry.name())]);
        command.env("COWL_STALL_TIME", "50");
        let output = run_command(command, b"");
        if is_blob {
            // The blob is complete, and what follows is not read.
            let output = output.ok();
            assert!(
                !output.err().contains("trying again"),
                "{}",
                output.report()
            );
        } else {
            output.fails(1, &["cannot read the manifest", "timeout"]);
            assert_nothing_was_created(&world);
        }
    }
}

/// A server that does not accept the range of a resumed download (416) sends the blob again.
#[test]
fn a_refused_range_begins_the_download_again() {
    let world = World::new();
    let content = Content::new(&world, &[base(), large()]);
    let (_, layers) = content.parsed();
    let (top, wanted) = (layers[1].clone(), layers[1].clone());
    let requests = AtomicUsize::new(0);
    let registry = FakeRegistry::start(move |request| {
        let answer = content.answer(request);
        if request.method != "GET" || !request.path.ends_with(&wanted) {
            return answer;
        }
        match requests.fetch_add(1, Ordering::Relaxed) {
            0 => answer.cut_after(1_000_000),
            1 => Answer::new(416, "").header("Content-Range", "bytes */7"),
            _ => answer,
        }
    });
    world.ok(&["pull", &format!("{}/web", registry.name())]);
    let ranges: Vec<_> = registry
        .requests()
        .iter()
        .filter(|request| request.path.ends_with(&top))
        .map(|request| request.header("range").unwrap_or("all").to_owned())
        .collect();
    assert_eq!(ranges, ["all", "bytes=1000000-", "all"]);
    assert!(transfers(&world).is_empty());
    world.ok(&["check"]);
}

/// A token that expires in the middle of a transfer is replaced, and the transfer continues.
#[test]
fn expired_tokens_are_replaced() {
    let world = World::new();
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    std::fs::write(world.path("root/etc/large"), large()).unwrap();
    world.ok(&["create", "web", "--from", "root"]);
    world.ok(&["snapshot", "web"]);
    let uploads = Arc::new(Uploads::default());
    let answers = uploads.clone();
    let realm = Arc::new(Mutex::new(String::new()));
    let own_realm = realm.clone();
    // Each kind of request is refused once, although the token was valid before.
    let expired = Mutex::new(HashMap::new());
    let valid = AtomicUsize::new(0);
    let registry = FakeRegistry::start(move |request| {
        if request.path.starts_with("/token") {
            let number = valid.fetch_add(1, Ordering::Relaxed) + 1;
            return Answer::new(200, json!({ "token": format!("t{number}") }).to_string());
        }
        // A new token does not end the earlier ones, which other threads may use.
        let token = request.header("authorization");
        let number = token.and_then(|token| token.strip_prefix("Bearer t")?.parse().ok());
        let is_known = number.is_some_and(|number: usize| number <= valid.load(Ordering::Relaxed));
        let kind = (request.method.clone(), request.path.contains("/uploads/"));
        let is_fresh = expired.lock().unwrap().insert(kind, ()).is_some();
        match is_known && is_fresh {
            true => answers.answer(request),
            false => {
                let realm = own_realm.lock().unwrap().clone();
                let challenge = format!("Bearer realm=\"{realm}\"");
                Answer::new(401, "").header("WWW-Authenticate", challenge)
            }
        }
    });
    *realm.lock().unwrap() = format!("http://{}/token", registry.name());
    let reference = format!("{}/web", registry.name());
    world.ok(&["push", "web@snap0", &reference]);
    let lines = registry.take_lines();
    let tokens = lines.iter().filter(|line| line.contains("/token"));
    // Requests that are refused at the same time share one.
    assert!(tokens.count() >= 3, "{lines:?}");
    world.ok(&["pull", &reference, "again"]);
    assert_eq!(
        world.at("cat", "again", "etc/large"),
        world.at("cat", "web@snap0", "etc/large")
    );
}

/// Two commands that pull one image at the same time do not disturb each other.
#[test]
fn two_pulls_at_the_same_time_succeed() {
    let world = World::new();
    let content = Content::new(&world, &[base(), large()]);
    let (_, layers) = content.parsed();
    let top = layers[1].clone();
    let readers = (Mutex::new(0), Condvar::new());
    let registry = FakeRegistry::start(move |request| {
        if request.method == "GET" && request.path.ends_with(&top) {
            let (count, changed) = &readers;
            let mut count = count.lock().unwrap();
            *count += 1;
            changed.notify_all();
            // Until the other command has requested the blob as well.
            let wait =
                changed.wait_timeout_while(count, Duration::from_secs(60), |count| *count < 2);
            assert!(!wait.unwrap().1.timed_out());
        }
        content.answer(request)
    });
    let reference = format!("{}/web", registry.name());
    // The store exists.
    std::fs::create_dir_all(world.path("root/etc")).unwrap();
    world.ok(&["create", "other", "--from", "root"]);
    std::thread::scope(|scope| {
        for name in ["one", "two"] {
            let (world, reference) = (&world, &reference);
            scope.spawn(move || world.ok(&["pull", reference, name]));
        }
    });
    let content = world.at("cat", "one", "etc/large");
    assert!(content.len() > 1_000_000 && content == world.at("cat", "two", "etc/large"));
    assert!(transfers(&world).is_empty());
    world.ok(&["check", "--deep"]);
}
