//! Output: colors only on a terminal, quiet and verbose, progress bars of long commands, a closed pipe, and the
//! settings of the configuration file.

use std::process::Command;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

const ESCAPE: &str = "\u{1b}[";

fn store() -> Store {
    let store = Store::for_test();
    let base = store.scratch().join("base");
    std::fs::create_dir(&base).expect("making the base");
    std::fs::write(base.join("file"), "x").expect("writing the base");
    store.create("web", &base);
    store.cowl(["snapshot", "web"]).ok();
    store
}

/// Runs a command line of the shell at a terminal of its own. Both outputs come as one, as one sees them.
fn at_terminal(store: &Store, line: &str) -> Output {
    run_command(
        prepared(store, &format!("script -qec '{line}' /dev/null")),
        b"",
    )
}

fn piped(store: &Store, line: &str) -> Output {
    run_command(prepared(store, line), b"")
}

fn prepared(store: &Store, line: &str) -> Command {
    let cowl = cowl_tests::programs::cowl();
    let dir = cowl
        .parent()
        .expect("a parent directory")
        .display()
        .to_string();
    let path = std::env::var("PATH").expect("a PATH");
    let mut command = Command::new("sh");
    command
        .args(["-c", line])
        .env("PATH", format!("{dir}:{path}"))
        .env("COWL_STORE", store.path())
        .env("TERM", "xterm")
        .env_remove("NO_COLOR");
    command
}

#[test]
fn colors_are_printed_only_to_terminals() {
    if !can(&[Need::Program("script")]) {
        return;
    }
    let store = store();
    let coloured = |output: Output| output.out().contains(ESCAPE) || output.err().contains(ESCAPE);
    // A table and an error.
    for verb in ["list web", "list wbe"] {
        let line = format!("cowl {verb}");
        assert!(coloured(at_terminal(&store, &line)), "{verb}");
        assert!(!coloured(piped(&store, &line)), "{verb}");
        assert!(
            !coloured(at_terminal(&store, &format!("NO_COLOR=1 {line}"))),
            "{verb}"
        );
        let never = format!("{line} --color never");
        assert!(!coloured(at_terminal(&store, &never)), "{verb}");
        let always = format!("NO_COLOR=1 {line} --color always");
        assert!(coloured(piped(&store, &always)), "{verb}");
        let config = store.scratch().join("config.toml");
        std::fs::write(&config, "color = \"always\"\n").expect("writing the file");
        let by_file = format!("cowl --config {} {verb}", config.display());
        // An invalid name is detected after the configuration file was read.
        assert!(coloured(piped(&store, &by_file)), "{verb}");
    }
    // Colors do not change the alignment: the columns are at the same positions without them.
    let bare = piped(&store, "cowl list web --color never").ok().out();
    let painted = piped(&store, "cowl list web --color always").ok().out();
    assert_ne!(bare, painted);
    let mut stripped = painted.replace("\u{1b}[0m", "");
    while let Some(at) = stripped.find(ESCAPE) {
        let end = at + stripped[at..].find('m').expect("the end of a colour");
        stripped.replace_range(at..=end, "");
    }
    assert_eq!(bare, stripped);
}

#[test]
fn quiet_prints_only_data_and_errors() {
    let store = store();
    let output = store.cowl(["restore", "web", "snap0", "--dry-run"]).ok();
    assert!(
        output.err().contains("would restore"),
        "{}",
        output.report()
    );
    let output = store
        .cowl(["restore", "web", "snap0", "--dry-run", "-q"])
        .ok();
    assert_eq!(output.err(), "");
    let output = store.cowl(["--quiet", "snapshot", "web"]).ok();
    assert_eq!(
        (output.out().as_str(), output.err().as_str()),
        ("snap1", "")
    );
    store
        .cowl(["list", "wbe", "-q"])
        .fails(3, &["wbe", "did you mean"]);
    store
        .cowl(["list", "-q", "-v"])
        .fails(2, &["--quiet", "--verbose"]);
}

#[test]
fn verbose_prints_each_step() {
    let store = store();
    let dir = store.scratch().join("hooks/pre-snapshot.d");
    std::fs::create_dir_all(&dir).expect("making the hooks directory");
    std::os::unix::fs::symlink("/bin/true", dir.join("true")).expect("making a hook");
    let snapshot = |option: &[&str]| {
        let mut command = store.command(["snapshot", "web"]);
        command
            .args(option)
            .env("COWL_HOOKS_DIR", store.scratch().join("hooks"));
        run_command(command, b"").ok().err()
    };
    assert!(snapshot(&["-v"]).contains("pre-snapshot.d/true"));
    assert_eq!(snapshot(&[]), "");
}

#[test]
fn commands_longer_than_a_second_show_a_progress_bar_on_a_terminal() {
    if !can(&[Need::Program("script")]) {
        return;
    }
    let store = store();
    // The archive comes slowly: two seconds with nothing in them but the wait for it.
    let tar = store.scratch().join("base.tar");
    let base = store.scratch().join("base");
    for number in 0..2_000 {
        std::fs::write(base.join(number.to_string()), "").expect("filling the base");
    }
    let line = format!("tar -C {} -cf {} .", base.display(), tar.display());
    piped(&store, &line).ok();
    let slowly = |options: &str, name: &str| {
        format!(
            "(head -c 500000 {0}; sleep 2; tail -c +500001 {0}) | cowl create {name} {options} --from -",
            tar.display()
        )
    };
    let shown = at_terminal(&store, &slowly("", "one")).ok();
    assert!(shown.out().contains("importing: "), "{}", shown.report());
    assert!(shown.out().contains(" files, "), "{}", shown.report());
    assert!(shown.out().contains("/s"), "{}", shown.report());
    assert!(
        !at_terminal(&store, &slowly("-q", "two"))
            .ok()
            .out()
            .contains("importing")
    );
    assert_eq!(piped(&store, &slowly("", "three")).ok().err(), "");
    // Quick commands show no bar.
    let quick = at_terminal(&store, "cowl create four --from /dev/null");
    assert!(!quick.out().contains("importing"), "{}", quick.report());
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    let store = store();
    for _ in 0..200 {
        store.cowl(["snapshot", "web", "-m", &"x".repeat(400)]).ok();
    }
    let line = "set -o pipefail; cowl list web | head -n 1; cowl --help | head -n 1";
    let output = run_command(prepared(&store, &format!("bash -c '{line}'")), b"").ok();
    assert_eq!(output.err(), "");
    // Standard output that is closed from the start is reported.
    let closed = piped(&store, "cowl list web >&-");
    assert!(closed.code == 1 || closed.code == 0, "{}", closed.report());
    assert!(!closed.err().contains("panicked"));
}

#[test]
fn config_prints_values_and_their_sources() {
    let store = store();
    let config = store.scratch().join("config.toml");
    std::fs::write(&config, "trash_days = 30\n[prune]\nkeep_daily = 7\n").expect("writing it");
    let file = config.display().to_string();
    let mut command = store.command(["config", "--json", "--config", &file]);
    command.env("COWL_WAIT", "3");
    let json = run_command(command, b"").ok().json();
    let setting = |key: &str| {
        let all = json["settings"].as_array().expect("a list");
        let one = all.iter().find(|one| one["key"] == key).expect("the key");
        (
            one["value"].clone(),
            one["from"].as_str().expect("an origin").to_owned(),
        )
    };
    assert_eq!(json["file"], file);
    assert_eq!(setting("wait"), (3.into(), "COWL_WAIT".to_owned()));
    assert_eq!(setting("trash_days"), (30.into(), file.clone()));
    assert_eq!(setting("prune.keep_daily"), (7.into(), file.clone()));
    assert_eq!(setting("store").1, "command line");
    assert_eq!(setting("depth_limit"), (128.into(), "built in".to_owned()));

    std::fs::write(&config, "\n[prun]\nkeep_daily = 7\n").expect("writing it");
    store
        .cowl(["list", "--config", &file])
        .fails(2, &["config.toml, line 2", "prun", "did you mean prune?"]);
    // The daemon and the command in a container are started with the same, and read no file.
    store
        .cowl(["list", "--config", "/no/such"])
        .fails(2, &["/no/such"]);
}

#[test]
fn similar_commands_options_and_values_are_suggested() {
    let store = store();
    let wrong = |args: &[&str], meant: &str| {
        store.cowl(args).fails(2, &[meant]);
    };
    wrong(&["snapshto", "web"], "'snapshot'");
    wrong(&["snapshot", "web", "--protct"], "'--protect'");
    wrong(&["list", "--color", "nevr"], "'never'");
    wrong(&["completions", "bsh"], "'bash'");
    store
        .cowl(["exec", "--snapshot", "wbe", "--", "true"])
        .fails(125, &["did you mean web?"]);
}
