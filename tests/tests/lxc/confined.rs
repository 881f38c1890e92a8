//! `cowl exec` in a container with an id map: the root of the container is not trusted with anything of the caller.

use std::process::Command;

use cowl_tests::command::{Output, run_command};
use cowl_tests::conditions::{Need, can};
use cowl_tests::lxc::{Lxc, MAP, NEEDS};
use cowl_tests::programs;

/// Runs a shell script of the host. `$COWL` is cowl, `$S` the store, `$C` the container.
fn host(lxc: &Lxc, script: &str) -> Output {
    let mut shell = Command::new("sh");
    shell
        .args(["-euc", script])
        .current_dir(&**lxc.scratch())
        .env("COWL", programs::cowl())
        .env("COWL_STORE", lxc.store().path())
        .env("SECRET", "environment");
    run_command(shell, b"")
}

#[test]
fn a_command_gets_only_the_standard_streams_of_the_caller() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create_mapped("c1");
    lxc.adopt("c1").ok();
    let script = r#"
echo secret > file; echo host > /dev/shm/cowl-$$; exec 7< file 8< /var
TERM=vt100 "$COWL" exec c1 -- sh -c '
    cat <&7 || echo closed; ls /proc/self/fd/8/ || echo closed; echo "${SECRET-unset} $TERM $HOME"
    ls /dev/shm /dev/pts; readlink /proc/self/ns/ipc' 2> /dev/null > out
rm /dev/shm/cowl-$$; grep -v ipc: out; [ $(tail -n 1 out) != $(readlink /proc/self/ns/ipc) ]
echo input | "$COWL" exec c1 -- cat
"$COWL" exec c1 -- sh -c 'kill -9 $$' || echo $?; "$COWL" exec c1 -- sh -c 'exit 9' || echo $?
"$COWL" exec c1 -- sh -c 'trap "echo stopped; exit 3" TERM; echo ready; while :; do sleep 0.1; done' > signals &
until grep -q ready signals; do sleep 0.05; done; kill -TERM $!; wait $! || echo $?; tail -n 1 signals"#;
    let output = host(&lxc, script).ok();
    assert_eq!(
        output.out(),
        "closed\nclosed\nunset vt100 /root\n/dev/pts:\nptmx\n\n/dev/shm:\ninput\n137\n9\n3\nstopped",
        "{}",
        output.report()
    );
}

/// Types lines at a terminal on which a shell runs, and prints what it shows: the name of the script, and pairs of a text
/// to wait for and a text to type.
const TYPIST: &str = r#"
import fcntl, os, pty, re, struct, sys, termios
pid, terminal = pty.fork()
if pid == 0:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    os.execvp("sh", ["sh", "-euc", sys.argv[1]])
shown = b""
for wanted, typed in zip(sys.argv[2::2], sys.argv[3::2]):
    while wanted.encode() not in shown:
        shown += os.read(terminal, 4096)
    os.write(terminal, typed.encode().decode("unicode_escape").encode())
try:
    while piece := os.read(terminal, 4096):
        shown += piece
except OSError:
    pass
sys.stdout.buffer.write(shown.replace(b"\r", b""))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"#;

fn at_terminal(lxc: &Lxc, script: &str, typed: &[&str]) -> Output {
    let mut python = Command::new("python3");
    python
        .args(["-c", TYPIST, script])
        .args(typed)
        .current_dir(&**lxc.scratch())
        .env("COWL", programs::cowl())
        .env("COWL_STORE", lxc.store().path());
    run_command(python, b"")
}

#[test]
fn a_command_has_a_terminal_of_its_own() {
    if !can(NEEDS) || !can(&[Need::Program("python3")]) {
        return;
    }
    let lxc = Lxc::for_test();
    lxc.create_mapped("c1");
    lxc.adopt("c1").ok();
    let script = r#"stty -a > before
"$COWL" exec c1 -- sh -c '
    tty; stty size; echo first; read line; echo "read: $line"
    trap "echo interrupted; exit 4" INT; echo second; while :; do sleep 0.1; done' || echo "code $?"
stty -a | cmp - before; echo restored"#;
    let output = at_terminal(&lxc, script, &["first\r", "a line\\n", "second\r", "\\x03"]).ok();
    assert_eq!(
        output.out(),
        "/dev/console\n33 99\nfirst\na line\nread: a line\nsecond\n^Cinterrupted\ncode 4\nrestored",
        "{}",
        output.report()
    );
    // What is typed later is not read by a program that the command has left behind.
    let script = r#"
"$COWL" exec c1 -- sh -c '(trap "" TTIN TTOU HUP; exec sh -c "head -n 1 < /dev/tty > /etc/tty & head -n 1 > /etc/in") &
    sleep 0.2; echo gone'
echo prompt; read line; echo "the host: $line"; "$COWL" exec c1 -- sh -c 'cat /etc/tty /etc/in'"#;
    let output = at_terminal(&lxc, script, &["prompt\r", "password\\n"]).ok();
    assert_eq!(
        output.out(),
        "gone\nprompt\npassword\nthe host: password",
        "{}",
        output.report()
    );
    // Only some of the streams are terminals.
    let script = r#"echo piped | "$COWL" exec c1 -- sh -c 'cat; test -t 0 || test -t 1 && echo mixed' | cat
"$COWL" exec c1 -- sh -c 'test -t 0 && echo in; test -t 1 || echo file' > file; cat file"#;
    let output = at_terminal(&lxc, script, &[]).ok();
    assert_eq!(output.out(), "piped\nin\nfile", "{}", output.report());
}

/// The ids never become those of the host because LXC cannot read the config.
#[test]
fn a_map_that_cannot_be_determined_is_an_error() {
    if !can(NEEDS) {
        return;
    }
    let lxc = Lxc::for_test();
    let config = lxc.create_mapped("c1");
    let (path, map) = (lxc.dir("c1").join("config"), lxc.scratch().join("map"));
    let include = format!("lxc.include = {}\n", map.display());
    std::fs::write(&map, MAP).unwrap();
    std::fs::write(&path, config.replace(MAP, &include)).unwrap();
    lxc.adopt("c1").ok();
    let text = lxc.config("c1");
    let line = [
        "exec",
        "c1",
        "--",
        "awk",
        "{ print $2 }",
        "/proc/self/uid_map",
    ];
    assert_eq!(lxc.store().cowl(line).ok().out(), "100000");
    let fails = |what: &str| {
        let output = lxc.store().cowl(line);
        assert_eq!(output.code, 125, "{what}: {}", output.report());
        assert_eq!(output.out(), "", "{what}");
    };
    for more in [
        "lxc.foo.bar = 1\n",
        "lxc.include = /no/such/file\n",
        "lxc.idmap = nonsense\n",
    ] {
        std::fs::write(&path, format!("{text}{more}")).unwrap();
        fails(more);
    }
    // The last one has no effect.
    std::fs::write(&path, format!("{text}lxc.include =\n")).unwrap();
    assert_eq!(lxc.store().cowl(line).ok().out(), "100000");
    std::fs::write(&path, &text).unwrap();
    for broken in [
        "lxc.idmap = u 0 nonsense\n",
        "lxc.idmap = u 0 100000 65536\n",
        "",
    ] {
        std::fs::write(&map, broken).unwrap();
        fails(broken);
    }
    std::fs::write(&map, MAP).unwrap();
    let mut words = line.to_vec();
    words.insert(1, "--host-ids");
    assert_eq!(lxc.store().cowl(words.clone()).ok().out(), "0");
    let archive = lxc.scratch().join("archive.tar");
    let archive = archive.to_str().unwrap();
    lxc.store()
        .cowl(["export", "c1", "--with-snapshots", archive])
        .ok();
    lxc.store().cowl(["import", archive, "c2"]).ok();
    words.remove(1);
    words[1] = "c2";
    assert_eq!(lxc.store().cowl(words).ok().out(), "100000");
    lxc.store().cowl(["release", "c1"]).ok();
    // It was not recorded yet: LXC's tools have to find it.
    lxc.adopt("c1").ok();
    let mut without_lxc = lxc.store().command(line);
    without_lxc.env("PATH", lxc.scratch().join("none"));
    run_command(without_lxc, b"").fails(125, &["the files of c1 have its ids"]);
    lxc.store().cowl(["release", "c1"]).ok();
    // Users that can change the config decide what root executes.
    let dir = lxc.dir("c1");
    for (path, owner) in [(&path, "4242:4242"), (&dir, "4242:0")] {
        cowl_tests::command::run("chown", [owner, path.to_str().unwrap()]).ok();
        lxc.adopt("c1")
            .fails(1, &["a user other than root can change"]);
        cowl_tests::command::run("chown", ["0:0", path.to_str().unwrap()]).ok();
    }
    lxc.adopt("c1").ok();
    cowl_tests::command::run("chown", ["4242", path.to_str().unwrap()]).ok();
    fails("a config of another user");
    cowl_tests::command::run("chown", ["0", path.to_str().unwrap()]).ok();
    lxc.store().cowl(["release", "c1"]).ok();
}
