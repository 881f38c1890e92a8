//! Transfers while other commands run: a second transfer, garbage collection, and the end of `cowl copy`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};

use cowl_tests::mount::wait_until;
use serde_json::json;

use crate::sending::{Side, ssh};

/// Starts `cowl receive` with a pipe as its input.
fn start_receive(side: &Side, before: &[&str], args: &[&str]) -> Child {
    let mut command = side.cli.command([before, &["receive"], args].concat());
    command.stdin(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits for a command, and returns its exit code and its messages.
fn finish(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    let messages = cowl_tests::command::show(&output.stderr);
    (output.status.code().unwrap(), messages)
}

/// Writes the same stream to two commands, in turns.
fn feed_both(commands: [Child; 2], stream: &[u8]) -> [(i32, String); 2] {
    let mut commands = commands;
    let mut inputs = commands.each_mut().map(|command| command.stdin.take());
    for chunk in stream.chunks(30_000) {
        for input in &mut inputs {
            if input
                .as_mut()
                .is_some_and(|input| input.write_all(chunk).is_err())
            {
                // The command has ended.
                *input = None;
            }
        }
    }
    drop(inputs);
    commands.map(finish)
}

#[test]
fn two_transfers_of_one_container_at_once_are_one() {
    let (a, b) = (Side::with_web(), Side::new());
    let stream = a.send(&["web", "--compress", "none"]);
    // Both would create it: one does, and the other one reports it.
    let [first, second] = [(); 2].map(|()| start_receive(&b, &["--wait", "1"], &[]));
    let mut done = feed_both([first, second], &stream);
    done.sort();
    assert_eq!(done[0].0, 0, "{done:?}");
    let refused = |text: &str| text.contains("is still at work") || text.contains("already exists");
    assert!(
        [1, 4].contains(&done[1].0) && refused(&done[1].1),
        "{done:?}"
    );
    assert_eq!(b.states("web"), a.states("web"));
    // Both add the same snapshots to it.
    for round in ["d", "e"] {
        a.write("web", &format!("etc/{round}"), &[b'x'; 100_000]);
        a.cli.ok(["snapshot", "--no-sync", "web"]);
    }
    let stream = a.send(&["web", "--compress", "none"]);
    let [first, second] = [(); 2].map(|()| start_receive(&b, &[], &[]));
    let done = feed_both([first, second], &stream);
    assert_eq!([done[0].0, done[1].0], [0, 0], "{done:?}");
    for words in [": 2 snapshots (3 more", ": 0 snapshots (5 more"] {
        let count = done.iter().filter(|(_, text)| text.contains(words)).count();
        assert_eq!(count, 1, "{words}: {done:?}");
    }
    assert_eq!(b.described("web"), a.described("web"));
    let names = |side: &Side| {
        let mut states = side.states("web");
        states.pop();
        states
    };
    assert_eq!(names(&b), names(&a));
    assert_eq!(b.waiting(), 0);
    b.cli.ok(["gc"]);
    b.cli.ok(["check", "--deep"]);
    // Each layer once, and the head.
    assert_eq!(b.layers().len(), a.layers().len());
}

/// A connection can stall for a long time.
#[test]
fn garbage_is_collected_while_a_transfer_waits() {
    let (a, b) = (Side::with_web(), Side::new());
    let stream = a.send(&["web", "--compress", "none"]);
    b.receive(&["other"], &a.send(&["web@..snap0"])).ok();
    let before = b.layers().len();
    let mut command = start_receive(&b, &[], &[]);
    let mut input = command.stdin.take().unwrap();
    let (first, rest) = stream.split_at(200_000);
    input.write_all(first).unwrap();
    wait_until("a layer is being received", || b.layers().len() > before);
    for args in [
        &["--wait", "0", "gc", "--empty-trash", "--empty-transfers"][..],
        &["--wait", "0", "check"],
        &["destroy", "other", "--now", "--yes"],
        &["--wait", "0", "gc", "--empty-trash", "--empty-transfers"],
    ] {
        b.cli.ok(args);
    }
    input.write_all(rest).unwrap();
    drop(input);
    let (code, messages) = finish(command);
    assert_eq!(code, 0, "{messages}");
    assert_eq!(b.states("web"), a.states("web"));
    b.cli.ok(["check", "--deep"]);
    b.cli.ok(["gc"]);
    // No note on a layer remains, so that the following commands do not search for garbage.
    let locks = std::fs::read_dir(b.cli.path().join("locks")).unwrap();
    let mut names = locks.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names.any(|name| name.starts_with("held-") || name.starts_with("making-")));
}

/// The layers of a base can vanish from the receiver, and those of the sent states from the sender.
#[test]
fn a_container_that_is_destroyed_is_sent_to_its_end() {
    let (a, b) = (Side::with_web(), Side::new());
    let mut command = a.cli.command(["send", "web", "--compress", "none"]);
    let mut sender = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = sender.stdout.take().unwrap();
    let mut stream = vec![0; 1000];
    output.read_exact(&mut stream).unwrap();
    let states = a.states("web");
    a.cli
        .ok(["destroy", "web", "--now", "--yes", "--protected"]);
    a.cli.ok(["--wait", "0", "gc", "--empty-trash"]);
    assert!(a.has_no_container());
    output.read_to_end(&mut stream).unwrap();
    assert!(sender.wait().unwrap().success());
    b.receive(&[], &stream).ok();
    assert_eq!(b.states("web"), states);
    a.cli.ok(["gc"]);
    assert_eq!(a.layers().len(), 0);
}

/// A transfer locks layers like a mount, but does not prevent the removal of snapshots, on either side.
#[test]
fn snapshots_can_be_removed_during_a_transfer() {
    let (a, b) = (Side::with_web(), Side::new());
    b.receive(&[], &a.send(&["web"])).ok();
    for side in [&a, &b] {
        side.cli.ok(["protect", "--off", "web@snap1"]);
    }
    let expected = a.states("web").swap_remove(0);
    let mut command = a.cli.command(["send", "web@snap0", "--compress", "none"]);
    let mut sender = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut output = sender.stdout.take().unwrap();
    let mut stream = vec![0; 1000];
    output.read_exact(&mut stream).unwrap();
    a.cli.ok(["--wait", "0", "rm", "web@snap0", "--yes"]);
    a.cli.ok([
        "--wait",
        "0",
        "prune",
        "web",
        "--keep-last",
        "1",
        "--manual",
    ]);
    assert_eq!(a.described("web").len(), 1);
    output.read_to_end(&mut stream).unwrap();
    assert!(sender.wait().unwrap().success());
    b.receive(&["new"], &stream).ok();
    assert_eq!(b.states("new")[0], expected);

    // The receiver holds the layers that it has while the sender reads its own.
    let have = b.json(&["receive", "--have"]);
    let layers = have["layers"].as_array().unwrap().iter();
    let ids: Vec<_> = layers.map(|layer| layer["id"].clone()).collect();
    let mut command = b.cli.command(["receive", "--negotiate"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut receiver = command.stderr(Stdio::null()).spawn().unwrap();
    let mut input = receiver.stdin.take().unwrap();
    let offer = json!({ "cowl": 1, "container": "web", "layers": ids });
    writeln!(input, "{offer}").unwrap();
    let mut reply = String::new();
    let output = receiver.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut reply).unwrap();
    assert!(reply.contains("digest"), "{reply}");
    for name in ["snap2", "snap1"] {
        let name = format!("web@{name}");
        b.cli.ok(["--wait", "0", "rm", &name, "--yes"]);
    }
    drop(input);
    assert!(!receiver.wait().unwrap().success());
    for side in [a, b] {
        side.cli.ok(["gc"]);
        side.cli.ok(["check", "--deep"]);
    }
}

/// Returns the descendants of a process, with their names.
fn descendants(pid: u32) -> Vec<(u32, String)> {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}"));
    let children = read(&format!("task/{pid}/children")).unwrap_or_default();
    let children = children
        .split_whitespace()
        .map(|child| child.parse().unwrap());
    let mut all = Vec::new();
    for child in children {
        let name = std::fs::read_to_string(format!("/proc/{child}/comm"));
        all.push((child, name.unwrap_or_default()));
        all.extend(descendants(child));
    }
    all
}

fn has_ended(pid: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        // Nothing may collect it: a zombie.
        Ok(text) => text.contains(") Z "),
        Err(_) => true,
    }
}

/// The local cowl and ssh are children of `cowl copy`, which can be killed alone.
#[test]
fn the_processes_of_a_copy_end_with_it() {
    let a = Side::with_web();
    let list = "{\"cowl\":1,\"layers\":[]}";
    // The other host receives everything, or nothing, and does not answer.
    for (script, args) in [
        (
            format!("echo '{list}'; exec cat >/dev/null\n"),
            &["web", "ssh://b"][..],
        ),
        ("exec cat >/dev/null\n".to_owned(), &["web", "ssh://b"]),
        (
            "exec cat >/dev/null\n".to_owned(),
            &["--from", "ssh://b", "web", "--as", "new"],
        ),
    ] {
        let program = ssh(&a, &script);
        let mut command: Command = a.cli.command([&["copy", "--ssh", &program], args].concat());
        let mut copy = command.stderr(Stdio::null()).spawn().unwrap();
        let pid = copy.id();
        // The local cowl, and cat in place of the other host.
        wait_until("both processes run", || {
            let names = descendants(pid);
            let has = |wanted: &str| names.iter().any(|(_, name)| name.trim_end() == wanted);
            has("cowl") && has("cat")
        });
        let processes = descendants(pid);
        copy.kill().unwrap();
        copy.wait().unwrap();
        for (process, name) in processes {
            wait_until(&format!("{name} has ended"), || has_ended(process));
        }
    }
    a.cli.ok(["check"]);
}
