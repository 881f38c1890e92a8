//! Completion in the shells themselves: keys are typed at a pseudo-terminal, or, where a shell can print its
//! candidates, they are requested.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

/// Two containers with snapshots.
fn store() -> Store {
    let store = Store::for_test();
    let base = store.scratch().join("base");
    std::fs::create_dir(&base).expect("making the base");
    std::fs::write(base.join("file"), "x").expect("writing the base");
    store.create("web", &base);
    store.create("db", &base);
    store.cowl(["snapshot", "web", "-m", "the first"]).ok();
    store.cowl(["snapshot", "web", "--name", "zeta"]).ok();
    store.cowl(["snapshot", "db", "--name", "only"]).ok();
    store
}

fn script(store: &Store, shell: &str, name: &str) {
    let text = store.cowl(["completions", shell]).ok().stdout;
    std::fs::write(store.scratch().join(name), text).expect("writing the script");
}

/// A command with `cowl` first in its path, and the store in its environment.
fn shell(store: &Store, line: &str) -> Command {
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
        .env("COWL_CONFIG", "/dev/null")
        .env("HOME", store.scratch().join(""))
        .env("HISTFILE", "/dev/null")
        .env("TERM", "dumb")
        .current_dir(store.scratch().join(""));
    command
}

/// Types keys at a terminal of the shell, after a line that prepares it. `cowl` prints completions only if the
/// shell's completion function calls it.
fn typed(store: &Store, interactive: &str, ready: &str, keys: &str) -> Output {
    let tell = "cowl() { if [ -n \"$COWL_COMPLETE\" ]; then command cowl \"$@\"; \
                else printf G''OT; printf '<%s>' \"$@\"; echo; fi; }";
    let keys = keys.replace("STORE", &store.path().display().to_string());
    let input = format!("{ready}\n{tell}\n:\n{keys}exit\n");
    let line = format!("script -qec '{interactive}' /dev/null");
    run_command(shell(store, &line), input.as_bytes())
}

#[track_caller]
fn got(output: &Output, words: &[&str]) {
    let wanted = format!(
        "GOT{}",
        words.iter().map(|w| format!("<{w}>")).collect::<String>()
    );
    let text = output.stdout.escape_ascii().to_string();
    assert!(text.contains(&wanted), "no {wanted} in: {text}");
}

const KEYS: &str = "cowl export web@z\t x\ncowl restore web ze\t y\ncowl destro\td\tz\n\
                    cowl export db@\t x\ncowl list --so\t size\ncowl --store=STORE export db@\t w\n";

#[track_caller]
fn all_got(output: &Output, store: &Store) {
    got(output, &["export", "web@zeta", "x"]);
    got(output, &["restore", "web", "zeta", "y"]);
    got(output, &["destroy", "db", "z"]);
    got(output, &["export", "db@only", "x"]);
    got(output, &["list", "--sort", "size"]);
    let option = format!("--store={}", store.path().display());
    got(output, &[&option, "export", "db@only", "w"]);
}

#[test]
fn bash_completes_verbs_options_containers_and_snapshots() {
    if !can(&[Need::Program("bash"), Need::Program("script")]) {
        return;
    }
    let store = store();
    script(&store, "bash", "cowl.bash");
    let keys = format!("{KEYS}cowl flatten web ze\tsn\t\ncowl export web@sn\t x\n");
    let output = typed(&store, "bash --norc --noprofile -i", ". ./cowl.bash", &keys);
    all_got(&output, &store);
    // No space is inserted between the two ends of a range.
    got(&output, &["flatten", "web", "zeta..snap0"]);
    got(&output, &["export", "web@snap0", "x"]);
    // The same if bash does not split words at `@`.
    let ready = ". ./cowl.bash; COMP_WORDBREAKS=\" \"";
    let output = typed(&store, "bash --norc --noprofile -i", ready, KEYS);
    all_got(&output, &store);
}

#[test]
fn zsh_completes_verbs_options_containers_and_snapshots() {
    if !can(&[Need::Program("zsh"), Need::Program("script")]) {
        return;
    }
    let store = store();
    script(&store, "zsh", "_cowl");
    let ready = "fpath=($PWD $fpath); autoload -U compinit; compinit -u -D";
    all_got(&typed(&store, "zsh -f -i", ready, KEYS), &store);
}

#[test]
fn fish_completes_verbs_options_containers_and_snapshots() {
    if !can(&[Need::Program("fish")]) {
        return;
    }
    let store = store();
    script(&store, "fish", "cowl.fish");
    let offers = |typed: &str| {
        let line = format!("fish -N -c \"source cowl.fish; complete -C '{typed}'\"");
        run_command(shell(&store, &line), b"").ok().out()
    };
    assert_eq!(offers("cowl export web@"), "web@snap0\tthe first\nweb@zeta");
    assert!(offers("cowl restore web ").starts_with("snap0\tthe first\nzeta"));
    assert!(offers("cowl export d").starts_with("db\ndb@only"));
    assert!(offers("cowl moun").starts_with("mount\tMount a container"));
    assert_eq!(offers("cowl flatten web snap0..z"), "snap0..zeta");
}

/// Returns all files of the store with their content and times.
fn content(dir: &Path) -> BTreeMap<std::path::PathBuf, (Vec<u8>, std::time::SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("reading a directory") {
        let path = entry.expect("an entry").path();
        let meta = path.symlink_metadata().expect("looking at a file");
        if meta.is_dir() {
            found.extend(content(&path));
            found.insert(path, (Vec::new(), meta.modified().expect("a time")));
        } else {
            let bytes = std::fs::read(&path).expect("reading a file");
            found.insert(path, (bytes, meta.modified().expect("a time")));
        }
    }
    found
}

#[test]
fn completion_only_reads() {
    let store = store();
    let ask = |words: &str| {
        let line =
            format!("_CLAP_COMPLETE_INDEX=2 _CLAP_IFS=, COWL_COMPLETE=bash cowl -- cowl {words}");
        run_command(shell(&store, &line), b"")
    };
    let before = content(store.path());
    assert_eq!(ask("export web@").ok().out(), "web@snap0,web@zeta");
    assert!(ask("umount ''").ok().out().starts_with("db,web"));
    assert_eq!(content(store.path()), before);

    // A damaged manifest hides no other container, and is no error here.
    let containers = store.path().join("containers");
    let one = std::fs::read_dir(&containers).expect("reading the containers");
    let one = one.last().expect("a container").expect("an entry").path();
    std::fs::write(one.join("container.json"), "{").expect("damaging it");
    let left = ask("umount ''").ok();
    assert!(
        left.out().starts_with("db") || left.out().starts_with("web"),
        "{}",
        left.report()
    );
    assert_eq!(left.err(), "");

    // Completion creates no store.
    let mut command = shell(
        &store,
        "_CLAP_COMPLETE_INDEX=2 COWL_COMPLETE=bash cowl -- cowl mount ''",
    );
    let none = store.scratch().join("none");
    command.env("COWL_STORE", &none);
    run_command(command, b"").ok();
    assert!(!none.try_exists().expect("looking for it"));
}
