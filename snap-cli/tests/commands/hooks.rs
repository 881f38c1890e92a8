//! Tests of hooks: scripts in a directory that run before and after snapshot, restore and rm.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cowl_tests::command::{Output, run_command};
use cowl_tests::programs;

struct Machine {
    cli: cowl_tests::cowl::Store,
}

impl Machine {
    /// Creates a store with the container web, and a configuration file with the directory of hooks.
    fn new() -> Self {
        let machine = Self {
            cli: cowl_tests::cowl::Store::for_test(),
        };
        std::fs::create_dir(machine.path("base")).unwrap();
        std::fs::write(machine.path("base/file"), "x").unwrap();
        let hooks = machine.path("hooks");
        machine.configure(&format!("[hooks]\ndir = \"{}\"\n", hooks.display()));
        let base = machine.path("base");
        machine.ok(&["create", "web", "--from", base.to_str().unwrap()]);
        machine
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cli.beside(name)
    }

    fn configure(&self, text: &str) {
        std::fs::write(self.path("config.toml"), text).unwrap();
    }

    fn hook(&self, when: &str, name: &str, text: &str) -> PathBuf {
        let dir = self.path("hooks").join(format!("{when}.d"));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join(name);
        let cowl = programs::cowl();
        let text = format!(
            "#!/bin/sh\ncowl={} log={}\n{text}\n",
            cowl.display(),
            self.path("log").display()
        );
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    fn command(&self, args: &[&str]) -> Command {
        let config = self.path("config.toml");
        let mut command = self.cli.command(["--config".as_ref(), config.as_os_str()]);
        command.args(args);
        command
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let done = run_command(self.command(args), b"").ok();
        String::from_utf8(done.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, args: &[&str], words: &[&str]) -> Output {
        run_command(self.command(args), b"").fails(1, words)
    }

    /// Returns and clears the log of the hooks.
    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        std::fs::write(self.path("log"), "").unwrap();
        log
    }

    fn snapshots(&self) -> Vec<String> {
        let text = self.ok(&["list", "web", "--no-header", "--format", "{name}"]);
        text.lines().map(str::to_owned).collect()
    }
}

const NOTE: &str = "echo \"$COWL_HOOK $COWL_CONTAINER [$COWL_SNAPSHOT] $COWL_RESULT\" >> $log";

#[test]
fn hooks_run_around_snapshot_restore_and_rm() {
    let machine = Machine::new();
    for event in ["snapshot", "restore", "rm"] {
        for when in ["pre", "post"] {
            machine.hook(&format!("{when}-{event}"), "note", NOTE);
        }
    }
    // The output of a hook is not part of the command's standard output.
    machine.hook("post-snapshot", "talk", "echo talking");
    assert_eq!(machine.ok(&["snapshot", "web"]), "snap0\n");
    assert_eq!(
        machine.log(),
        "pre-snapshot web [] \npost-snapshot web [snap0] done\n"
    );
    machine.ok(&["snapshot", "web", "--name", "mine"]);
    assert_eq!(
        machine.log(),
        "pre-snapshot web [mine] \npost-snapshot web [mine] done\n"
    );
    machine.ok(&["restore", "web", "snap0"]);
    assert_eq!(
        machine.log(),
        "pre-restore web [snap0] \npost-restore web [snap0] done\n"
    );
    machine.ok(&["rm", "web", "snap0", "mine"]);
    assert_eq!(
        machine.log(),
        "pre-rm web [snap0 mine] \npost-rm web [snap0 mine] done\n"
    );
    for when in ["pre-destroy", "post-destroy"] {
        machine.hook(when, "note", NOTE);
    }
    let base = machine.path("base");
    machine.ok(&["create", "gone", "--from", base.to_str().unwrap()]);
    machine.ok(&["destroy", "gone", "--dry-run"]);
    machine.ok(&["destroy", "gone", "--yes"]);
    assert_eq!(
        machine.log(),
        "pre-destroy gone [] \npost-destroy gone [] done\n"
    );
    // Without a change no hook runs.
    machine.ok(&["snapshot", "web", "--name", "last"]);
    machine.log();
    machine.ok(&["prune", "web", "--keep-last", "1"]);
    machine.ok(&["restore", "web", "last", "--dry-run"]);
    machine.ok(&["rm", "web", "last", "--dry-run"]);
    assert_eq!(machine.log(), "");
    // The removal of a snapshot by prune runs the hooks, too.
    machine.ok(&["snapshot", "web", "--name", "newer"]);
    machine.log();
    machine.ok(&["prune", "web", "--keep-last", "1", "--manual"]);
    assert_eq!(
        machine.log(),
        "pre-rm web [last] \npost-rm web [last] done\n"
    );
}

#[test]
fn failed_hook_before_a_command_prevents_any_change() {
    let machine = Machine::new();
    machine.ok(&["snapshot", "web"]);
    for event in ["snapshot", "restore", "rm"] {
        machine.hook(&format!("pre-{event}"), "no", "echo not today >&2; exit 3");
        machine.hook(&format!("post-{event}"), "note", NOTE);
    }
    let words = ["not today", "hooks/pre-", "exit code 3"];
    let output = machine.fails(&["snapshot", "web"], &words);
    assert!(output.stdout.is_empty());
    machine.fails(&["restore", "web", "snap0"], &words);
    machine.fails(&["rm", "web", "snap0"], &words);
    assert_eq!(machine.snapshots(), ["snap0"]);
    assert_eq!(
        machine.log(),
        "post-snapshot web [] stopped\npost-restore web [snap0] stopped\npost-rm web [snap0] stopped\n"
    );
}

#[test]
fn failed_hook_after_a_command_is_reported_and_undoes_nothing() {
    let machine = Machine::new();
    machine.hook("post-snapshot", "no", "exit 7");
    let output = machine.fails(&["snapshot", "web"], &["exit code 7", "nothing was undone"]);
    assert_eq!(output.stdout, b"snap0\n");
    assert_eq!(machine.snapshots(), ["snap0"]);
}

#[test]
fn hook_can_call_cowl_without_further_hooks() {
    let machine = Machine::new();
    machine.hook(
        "pre-restore",
        "keep",
        "\"$cowl\" --wait 0 snapshot web --name before-restore >> $log",
    );
    machine.hook("pre-snapshot", "note", NOTE);
    machine.hook(
        "post-restore",
        "look",
        "\"$cowl\" list web --format '{name}' >> $log",
    );
    machine.ok(&["snapshot", "web"]);
    machine.log();
    machine.ok(&["restore", "web", "snap0"]);
    assert_eq!(machine.log(), "before-restore\nsnap0\nbefore-restore\n");
}

#[test]
fn hook_has_the_configured_timeout() {
    let machine = Machine::new();
    let hooks = machine.path("hooks");
    machine.hook("pre-snapshot", "slow", "sleep 1000");
    machine.configure(&format!(
        "[hooks]\ndir = \"{}\"\ntimeout = 1\n",
        hooks.display()
    ));
    machine.fails(
        &["snapshot", "web"],
        &["took longer than 1 s", "hooks.timeout"],
    );
    assert!(machine.snapshots().is_empty());
}

#[test]
fn interrupt_of_the_command_interrupts_the_hook() {
    let machine = Machine::new();
    machine.hook(
        "pre-snapshot",
        "slow",
        "echo $$ > $log.new; mv $log.new $log; sleep 1000",
    );
    machine.hook("post-snapshot", "note", NOTE);
    let mut child = machine
        .command(&["snapshot", "web"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !machine.path("log").try_exists().unwrap() {
        std::thread::sleep(std::time::Duration::from_millis(10));
        assert!(child.try_wait().unwrap().is_none());
    }
    let hook: i32 = machine.log().trim().parse().unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stderr.escape_ascii().to_string().contains("SIGINT"));
    assert_eq!(machine.log(), "post-snapshot web [] stopped\n");
    let hook = rustix::process::Pid::from_raw(hook).unwrap();
    assert!(rustix::process::test_kill_process(hook).is_err());
    assert!(machine.snapshots().is_empty());
}
