//! Text output is plain, whatever names, comments, configs and arguments it contains: no control character reaches a
//! terminal, and no line can be forged.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use cowl_tests::command::{self, Output};
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;

const NEEDS: &[Need] = &[Need::Root, Need::Fuse];

/// Colors, a bell, DEL, a C1 control, bidirectional controls, a line that resembles one of cowl's, and bytes that are
/// not UTF-8.
const HOSTILE: &[u8] =
    b"a\x1b[31mb\x07\x7f\xc2\x9b2Jc\xe2\x80\xaed\xe2\x81\xa6e\xe2\x80\x8f\r\nforged\tf\x85\xff";

fn hostile(before: &str) -> OsString {
    OsString::from_vec([before.as_bytes(), HOSTILE].concat())
}

/// Returns the hostile bytes as valid UTF-8: options that take text reject other bytes before they print anything else.
fn hostile_text(before: &str) -> OsString {
    let mut text = hostile(before).into_vec();
    text.truncate(text.len() - 2);
    OsString::from_vec(text)
}

/// Returns the first violation in text output, if any.
fn fault(bytes: &[u8]) -> Option<String> {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return Some("it is not UTF-8".to_owned());
    };
    let wrong = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if let Some(c) = text.chars().find(|c| wrong(*c)) {
        return Some(format!("it holds {c:?}"));
    }
    let forged = text.lines().any(|line| line.starts_with("forged"));
    forged.then(|| "a line is forged".to_owned())
}

#[track_caller]
fn is_plain(output: &Output) {
    for (stream, bytes) in [("output", &output.stdout), ("errors", &output.stderr)] {
        let fault = fault(bytes);
        assert!(
            fault.is_none(),
            "{stream} of {}: {fault:?}: {}",
            output.line,
            bytes.escape_ascii()
        );
    }
    assert!(
        !(output.stdout.is_empty() && output.stderr.is_empty()),
        "{} said nothing: it shows nothing",
        output.line
    );
}

fn word(text: impl AsRef<OsStr>) -> OsString {
    text.as_ref().to_owned()
}

fn words(line: &str) -> Vec<OsString> {
    line.split(' ').map(word).collect()
}

/// Returns the words of a line and an additional one.
fn with(line: &str, last: impl AsRef<OsStr>) -> Vec<OsString> {
    let mut words = words(line);
    words.push(word(last));
    words
}

/// Creates a container with hostile names of every kind in two states, with a hostile comment.
fn world(scratch: &Path, store: &Store) {
    let base = scratch.join("base");
    let inner = base.join(hostile("dir"));
    std::fs::create_dir_all(&inner).unwrap();
    std::fs::write(base.join(hostile("file")), "text\n").unwrap();
    std::fs::write(inner.join(hostile("inner")), "text\n").unwrap();
    std::fs::write(base.join(hostile("gone")), "text\n").unwrap();
    symlink(hostile("target"), base.join(hostile("link"))).unwrap();
    store.create("web", &base);
    let comment: [OsString; 4] = [
        word("snapshot"),
        word("web"),
        word("-m"),
        hostile_text("why"),
    ];
    store.cowl(comment).ok();
    let mount_point = store.mount("web");
    std::fs::write(mount_point.join(hostile("file")), "other\n").unwrap();
    std::fs::write(mount_point.join(hostile("new")), "new\n").unwrap();
    std::fs::remove_file(mount_point.join(hostile("gone"))).unwrap();
    std::fs::rename(
        mount_point.join(hostile("link")),
        mount_point.join(hostile("renamed")),
    )
    .unwrap();
    store.cowl(["umount", "web"]).ok();
}

/// Commands that list, compare and search inside a container, or are refused there.
fn inside() -> Vec<Vec<OsString>> {
    let mut lines: Vec<_> = [
        "ls web",
        "ls -l web",
        "ls -lR web@snap0",
        "ls -R web",
        "diff web",
        "diff web --long",
        "diff web --stat",
        "diff web --name-only",
        "diff web --no-renames",
        "list",
        "list web",
        "show web",
        "show web@snap0",
        "du web",
        "check",
        "status",
        "config",
        "undo web snap0 --dry-run",
    ]
    .map(words)
    .to_vec();
    lines.push(with("list web --format", "{name}\\t{comment}"));
    for name in ["file", "absent"] {
        lines.push(with("diff web --", hostile(name)));
        lines.push(with("cat", hostile(&format!("web:/{name}/"))));
        lines.push(with("cat", hostile(&format!("web:/dir{name}"))));
        lines.push(with("restore web snap0 --dry-run --", hostile(name)));
        lines.push(with("undo web snap0 --dry-run --", hostile(name)));
    }
    lines.push(with("cat", hostile("web:/dir")));
    lines.push(with("ls", hostile("web:/absent")));
    lines
}

/// Every verb with an argument that does not exist or is refused.
fn refused(scratch: &Path) -> Vec<Vec<OsString>> {
    let name = hostile_text("x");
    let path = scratch.join(hostile("absent"));
    let mut lines = Vec::new();
    for verb in [
        "create",
        "adopt",
        "release",
        "lxc",
        "mount",
        "umount",
        "exec",
        "snapshot",
        "list",
        "show",
        "protect",
        "diff",
        "ls",
        "cat",
        "restore",
        "undo",
        "rm",
        "prune",
        "flatten",
        "import",
        "du",
        "import-lxc-snapshots",
        "status",
        "stats",
        "destroy",
        "undelete",
        "gc",
        "check",
        "config",
        "completions",
        "serve",
        "hook",
        "enter",
    ] {
        for last in [&name, &hostile("y"), path.as_os_str()] {
            lines.push(with(verb, last));
        }
        lines.push(with(verb, hostile_text("--y")));
    }
    for two in [
        "mount web",
        "export web",
        "create web2 --from",
        "create --from",
        "import",
        "adopt c1 -P",
        "clone web",
        "rename web",
        "tag web@snap0",
        "snapshot web --tag",
        "comment web@snap0 --file",
        "restore web",
        "list web --sort",
        "prune web --keep-within",
        "lxc web --like",
        "snapshot --wait",
        "--color",
        "--config",
        "--store",
        "create web3 --from /dev/null --wait",
    ] {
        for last in [&name, &hostile("y"), path.as_os_str()] {
            lines.push(with(two, last));
        }
    }
    // An unclosed brace, and an unknown field. (Line breaks in a template are the user's own.)
    lines.push(with("list --format", hostile_text("{")));
    let mut field = hostile_text("{");
    field.push("}");
    lines.push(with("list --format", field));
    let mut config = with("--config", &path);
    config.push(word("list"));
    let mut store = with("--store", &path);
    store.push(word("list"));
    lines.extend([config, store, vec![name.clone()], vec![hostile_text("--")]]);
    lines
}

#[test]
fn names_in_containers_and_arguments_are_printed_escaped() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let scratch = store.scratch().to_path_buf();
    world(&scratch, &store);
    for line in inside() {
        is_plain(&store.cowl(line.clone()));
        // With colors enabled, only color sequences pass.
        let mut colored = with("--color", "always");
        colored.extend(line);
        let mut output = store.cowl(colored);
        output.stdout = without_colors(&output.stdout);
        output.stderr = without_colors(&output.stderr);
        is_plain(&output);
    }
    for line in refused(&scratch) {
        let mut command = store.command(&line);
        // Standard input is empty, and the commands change no state of the host.
        command.env("HOME", &scratch).current_dir(&scratch);
        let output = command::run_command(command, b"");
        // Successful commands print nothing.
        if !(output.code == 0 && output.stdout.is_empty() && output.stderr.is_empty()) {
            is_plain(&output);
        }
    }
    // A program that does not exist in the container.
    is_plain(&store.cowl(with("exec web --", hostile("program"))));
}

/// Removes the sequences of the colors and weights that cowl uses.
fn without_colors(bytes: &[u8]) -> Vec<u8> {
    let mut text = String::from_utf8(bytes.to_vec()).unwrap();
    for code in [
        "0", "1", "2", "4", "31", "32", "33", "34", "35", "36", "1;31", "1;33", "1;36",
    ] {
        text = text.replace(&format!("\u{1b}[{code}m"), "");
    }
    text.into_bytes()
}

#[test]
#[expect(clippy::too_many_lines, reason = "one scenario, step by step")]
fn paths_of_stores_mounts_and_logs_are_printed_escaped() {
    if !can(NEEDS) {
        return;
    }
    let outer = Store::for_test();
    let scratch = outer.scratch().to_path_buf();
    let root = scratch.join(hostile("store"));
    let run = |words: Vec<OsString>| {
        let mut command = std::process::Command::new(cowl_tests::programs::cowl());
        command.arg("--store").arg(&root).args(words);
        command::run_command(command, b"")
    };
    let base = scratch.join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("file"), "text\n").unwrap();
    run(with("create web --from", &base)).ok();
    let at = scratch.join(hostile("at"));
    std::fs::create_dir(&at).unwrap();
    // The mount point is a result for programs, and printed unescaped.
    let output = run(with("mount web", &at)).ok();
    assert_eq!(output.stdout, [at.as_os_str().as_bytes(), b"\n"].concat());
    run(words("snapshot web")).ok();
    for line in [
        "status",
        "status web",
        "list",
        "list --stores",
        "show web",
        "show web@snap0",
        "check",
        "stats web",
        "gc -v",
        "restore web snap0 --dry-run",
        "destroy web --dry-run",
        "config",
        "-v list",
        "-v -v status",
    ] {
        is_plain(&run(words(line)));
    }
    let other = scratch.join(hostile("other"));
    is_plain(&run(with("mount web", &other)));
    std::fs::create_dir(&other).unwrap();
    is_plain(&run(with("mount web", &other)));
    // In use by a process with a hostile name in a hostile directory.
    let program = scratch.join(OsString::from_vec(b"s\x1b[31m\n\xc2\x9b".to_vec()));
    std::fs::copy("/bin/sleep", &program).unwrap();
    let mut user = std::process::Command::new(&program)
        .arg("100")
        .current_dir(&at)
        .spawn()
        .unwrap();
    let output = run(words("umount web"));
    is_plain(&output);
    assert_eq!(output.code, 4, "{}", output.report());
    user.kill().unwrap();
    user.wait().unwrap();
    run(words("umount web")).ok();
    is_plain(&run(with("umount", &at)));
    let logs = logs_below(&root);
    for log in &logs {
        let text = std::fs::read(log).unwrap();
        assert_eq!(
            fault(&text),
            None,
            "{}: {}",
            log.display(),
            text.escape_ascii()
        );
    }
    // Damage is reported with the name of the file.
    let layers = std::fs::read_dir(root.join("layers")).unwrap();
    std::fs::write(
        layers.flatten().next().unwrap().path().join("layer.json"),
        HOSTILE,
    )
    .unwrap();
    for line in ["check", "list", "du web", "gc"] {
        is_plain(&run(words(line)));
    }
    let manifest = std::fs::read_dir(root.join("containers"))
        .unwrap()
        .flatten()
        .next()
        .unwrap();
    std::fs::write(manifest.path().join("container.json"), HOSTILE).unwrap();
    for line in ["check", "list", "show web", "snapshot web"] {
        is_plain(&run(words(line)));
    }
    // A configuration file with hostile keys and values.
    for text in [
        "store = \"x\u{1b}[31m",
        "\"k\u{9b}\\u001b\" = 1",
        "wait = \"\\u202e\\nforged\"",
        "depth = \u{202e}",
    ] {
        let file = scratch.join("config.toml");
        std::fs::write(&file, text).unwrap();
        let mut line = with("--config", &file);
        line.push(word("list"));
        is_plain(&run(line));
    }
}

fn logs_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(logs_below(&path));
        } else if path.file_name() == Some(OsStr::new("log")) {
            found.push(path);
        }
    }
    found
}

#[test]
fn snapshots_and_configs_of_lxc_are_printed_escaped() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let lxcpath = store.scratch().make("lxc");
    let dir = store.scratch().make("lxc/c1/rootfs");
    let dir = dir.parent().unwrap();
    let config = |value: &[u8]| {
        let text = [
            b"lxc.rootfs.path = ".as_slice(),
            value,
            b"\nlxc.uts.name = c1\n",
        ]
        .concat();
        std::fs::write(dir.join("config"), text).unwrap();
    };
    let front = store.scratch().join("lxc-snapshot");
    symlink(cowl_tests::programs::cowl(), &front).unwrap();
    let run = |more: Vec<OsString>| {
        let mut command = std::process::Command::new(&front);
        command
            .arg("-P")
            .arg(&lxcpath)
            .args(["-n", "c1"])
            .args(more);
        command.env("COWL_STORE", store.path());
        is_plain(&command::run_command(command, b""));
    };
    config(format!("dir:{}/rootfs", dir.display()).as_bytes());
    for name in [word("snap0"), hostile("snap1")] {
        let snap = dir.join("snaps").join(&name);
        std::fs::create_dir_all(snap.join("rootfs")).unwrap();
        std::fs::copy(dir.join("config"), snap.join("config")).unwrap();
        std::fs::write(snap.join("ts"), HOSTILE).unwrap();
        std::fs::write(snap.join("comment"), HOSTILE).unwrap();
    }
    run(words("-L"));
    run(words("-L -C"));
    run(with("-r", hostile("snap1")));
    run(with("-r", hostile("absent")));
    run(with("-d", hostile("absent")));
    run(with("-c", hostile("absent")));
    run(with("-N", hostile_text("new")));
    run(vec![hostile_text("--x")]);
    for value in [
        [b"overlay:".as_slice(), HOSTILE].concat(),
        [b"/".as_slice(), HOSTILE].concat(),
        HOSTILE.to_vec(),
    ] {
        config(&value);
        run(words("-r snap0"));
        let adopt = with("adopt c1 -P", &lxcpath);
        is_plain(&store.cowl(adopt));
    }
}

#[test]
fn archives_and_mount_options_are_printed_escaped() {
    if !can(NEEDS) {
        return;
    }
    let store = Store::for_test();
    let tree = store.scratch().make("tree");
    std::fs::write(tree.join(hostile("x")), "text").unwrap();
    let archive = store.scratch().join("a.tar");
    let tar = |more: &[&OsStr]| {
        let mut command = std::process::Command::new("tar");
        command
            .arg("-C")
            .arg(&tree)
            // The order of names decides which of two hard links is stored as a link.
            .args(["--sort=name", "-cPf"])
            .arg(&archive)
            .args(more)
            // In a UTF-8 locale, a pattern does not match a name that is not UTF-8.
            .env("LC_ALL", "C");
        command::run_command(command, b"").ok();
        is_plain(&store.cowl(with("create bad --from", &archive)));
    };
    // Members that lead out of the tree, and a link to a path that is not in the archive.
    tar(&[
        OsStr::new("--transform"),
        OsStr::from_bytes(b"s,^,../,"),
        OsStr::new("."),
    ]);
    std::fs::hard_link(tree.join(hostile("x")), tree.join(hostile("z"))).unwrap();
    let link = [
        OsStr::new("--transform"),
        OsStr::new("s,x,y\x1b,H"),
        OsStr::new("."),
    ];
    tar(&link);
    std::fs::write(&archive, HOSTILE).unwrap();
    is_plain(&store.cowl(with("create bad --from", &archive)));
    is_plain(&store.cowl(with("import", &archive)));

    let cowlfs = |words: Vec<OsString>| {
        is_plain(&command::run(cowl_tests::programs::cowlfs(), words));
    };
    let at = store.scratch().join(hostile("at"));
    for option in [
        "",
        "lowerdir=",
        "lowerdir=/a,upperdir=",
        "uidmapping=",
        "timeout=",
        "passthrough=",
        "fsname=x,",
    ] {
        let mut words = with("-o", hostile(option));
        words.push(at.clone().into());
        cowlfs(words);
    }
    cowlfs(vec![hostile_text("--x")]);
    cowlfs(vec![word("-o"), word("lowerdir=/usr"), at.into()]);
}
