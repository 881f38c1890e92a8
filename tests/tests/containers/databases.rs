//! Databases that write by passthrough while snapshots are taken (docs/decisions/0043). Each snapshot is used as after a
//! crash, and must have every transaction that was acknowledged before it.
//!
//! `COWL_DATABASE_SNAPSHOTS=N` takes N snapshots of each.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cowl_tests::command::run;
use cowl_tests::conditions::{Need, can};
use cowl_tests::cowl::Store;
use cowl_tests::images::Kind;
use cowl_tests::postgres::{self, Server, as_postgres};
use cowl_tests::run::number;
use cowl_tests::samples::ask_sqlite;

/// The number of attempts to take one snapshot: a database may write without a pause.
const ATTEMPTS: u32 = 200;

fn possible(programs: &[&'static str]) -> bool {
    let mut needs = vec![Need::Root, Need::Fuse];
    needs.extend(programs.iter().copied().map(Need::Program));
    can(&[needs, Kind::Xfs.needs()].concat())
}

/// A store on XFS with an empty container, mounted with passthrough for all files where any user reaches it.
struct Lab {
    store: Store,
    top: PathBuf,
}

impl Lab {
    fn new() -> Lab {
        let store = Store::on(|scratch, name| Kind::Xfs.mount_with_size(scratch, name, 2 << 30));
        run("chmod", [Path::new("755"), store.scratch()]).ok();
        let source = store.scratch().make("source");
        run("chmod", [Path::new("1777"), &source]).ok();
        store.create("web", &source);
        let top = store.scratch().make("mount");
        let at = top.to_str().unwrap();
        store
            .cowl(["mount", "web", at, "--passthrough", "all"])
            .ok();
        let status = store.cowl(["status", "web", "--json"]).ok().json();
        assert_eq!(status["passthrough"]["mode"], "all", "{status}");
        Lab { store, top }
    }

    /// Takes a snapshot, and returns its name and the number of refused attempts.
    fn snapshot(&self) -> (String, u32) {
        for refused in 0..ATTEMPTS {
            let output = self.store.cowl(["-v", "snapshot", "web"]);
            if output.err().contains("changed them again") {
                continue;
            }
            let output = output.ok();
            assert!(output.err().contains("were copied"), "{}", output.report());
            return (output.out(), refused);
        }
        panic!("no snapshot in {ATTEMPTS} attempts");
    }

    /// Takes snapshots while databases are in use. `state` returns a number that only grows, which is passed to `check`
    /// with the directory of a copy of each snapshot: its value before the snapshot, and the value after it.
    fn check_snapshots<T>(&self, state: impl Fn() -> T, check: impl Fn(&Path, &T, &T)) {
        let mut refusals = 0;
        for _ in 0..number("COWL_DATABASE_SNAPSHOTS", 5) {
            let before = state();
            let (name, refused) = self.snapshot();
            let after = state();
            refusals += refused;
            self.with_copy(&name, |copy| check(copy, &before, &after));
        }
        println!("{refusals} attempts were refused");
    }

    /// Mounts a copy of a snapshot.
    fn with_copy(&self, snapshot: &str, inspect: impl FnOnce(&Path)) {
        let source = format!("web@{snapshot}");
        self.store.cowl(["clone", &source, "copy"]).ok();
        let at = self.store.scratch().make("copy");
        self.store
            .cowl(["mount", "copy", at.to_str().unwrap()])
            .ok();
        inspect(&at);
        self.store.cowl(["umount", "copy"]).ok();
        self.store.cowl(["destroy", "copy", "--yes"]).ok();
        std::fs::remove_dir(&at).unwrap();
    }

    fn end(self) {
        self.store.cowl(["umount", "web"]).ok();
        self.store.cowl(["check"]).ok();
    }
}

/// A program that executes statements from its standard input, and answers each.
struct Client {
    child: Child,
    stdin: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Client {
    fn start(mut command: Command) -> Client {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Client {
            stdin: child.stdin.take().unwrap(),
            answers: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Executes statements whose last one answers with this number.
    fn execute(&mut self, statements: &str, number: u64) {
        self.stdin.write_all(statements.as_bytes()).unwrap();
        self.stdin.write_all(b"\n").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        assert_eq!(answer.trim(), number.to_string(), "{statements}");
    }

    fn end(mut self) {
        drop(self.stdin);
        assert!(self.child.wait().unwrap().success());
    }
}

/// Counts of transactions: begun, and acknowledged.
#[derive(Default)]
struct Progress {
    begun: AtomicU64,
    acknowledged: AtomicU64,
}

/// Calls `transaction` with 1, 2, 3... until `ended` is set, or a panic of the test ends it.
fn transact(progress: &Progress, ended: &AtomicBool, mut transaction: impl FnMut(u64)) {
    for number in 1.. {
        if ended.load(Ordering::SeqCst) {
            return;
        }
        progress.begun.store(number, Ordering::SeqCst);
        transaction(number);
        progress.acknowledged.store(number, Ordering::SeqCst);
    }
}

/// Ends the threads of a test when it ends, also by a panic.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

const MODES: [&str; 4] = ["wal", "delete", "truncate", "persist"];

/// Returns the highest number in a table, whose numbers must be complete.
fn last_of(database: &Path) -> u64 {
    let found = ask_sqlite(
        database,
        "PRAGMA integrity_check; SELECT count(*), max(n) FROM t;",
    );
    let numbers = found.strip_prefix("ok\n").unwrap_or_else(|| {
        panic!("{}: {found}", database.display());
    });
    let (count, last) = numbers.split_once('|').unwrap();
    assert_eq!(count, last, "{}", database.display());
    count.parse().unwrap()
}

/// One program writes to a database of each journal mode in turn.
#[test]
fn a_snapshot_has_every_row_that_sqlite_has_committed_before() {
    if !possible(&["sqlite3"]) {
        return;
    }
    let lab = Lab::new();
    for mode in MODES {
        let create =
            format!("PRAGMA journal_mode = {mode}; CREATE TABLE t(n INTEGER PRIMARY KEY, v TEXT);");
        ask_sqlite(
            &lab.top.join(mode),
            &(create + "INSERT INTO t VALUES(1, hex(randomblob(20000)));"),
        );
    }
    let (progress, ended) = (Progress::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut clients = MODES.map(|mode| {
                let mut command = Command::new("sqlite3");
                command.args(["-bail", "-batch"]).arg(lab.top.join(mode));
                let mut client = Client::start(command);
                let set = format!("PRAGMA journal_mode = {mode};\n");
                client.stdin.write_all(set.as_bytes()).unwrap();
                let mut answer = String::new();
                client.answers.read_line(&mut answer).unwrap();
                assert_eq!(answer.trim(), mode);
                client
            });
            transact(&progress, &ended, |number| {
                let row = number + 1;
                for client in &mut clients {
                    client.execute(
                        &format!(
                            "BEGIN IMMEDIATE; INSERT INTO t VALUES({row}, hex(randomblob(300)));
                             UPDATE t SET v = hex(randomblob(20000)) WHERE n = 1; COMMIT; SELECT {row};"
                        ),
                        row,
                    );
                }
            });
            for client in clients {
                client.end();
            }
        });
        let _end = EndOnDrop(&ended);
        let state = || {
            let load = |count: &AtomicU64| count.load(Ordering::SeqCst);
            // Rows: one more than transactions.
            (load(&progress.acknowledged) + 1, load(&progress.begun) + 1)
        };
        lab.check_snapshots(state, |copy, (acknowledged, _), (_, begun)| {
            let rows = MODES.map(|mode| last_of(&copy.join(mode)));
            for (mode, rows) in MODES.iter().zip(&rows) {
                assert!(
                    (acknowledged..=begun).contains(&rows),
                    "{mode}: {rows}, of {acknowledged} to {begun}"
                );
            }
            // The databases are written one after the other.
            let is_in_order = rows.is_sorted_by(|one, next| one >= next) && rows[0] - rows[3] <= 1;
            assert!(is_in_order, "{rows:?}");
        });
    });
    assert!(progress.acknowledged.load(Ordering::SeqCst) > 10);
    let rows = MODES.map(|mode| last_of(&lab.top.join(mode)));
    assert!(
        rows.iter()
            .all(|count| *count == progress.acknowledged.load(Ordering::SeqCst) + 1)
    );
    lab.end();
}

/// Starts a server in a copy of a directory, which recovers as after a crash, and checks the database.
fn recover_postgres(dir: &Path) -> u64 {
    // The server whose number they contain still runs, with the original.
    for name in ["data/postmaster.pid", ".s.PGSQL.5432.lock", "log"] {
        std::fs::remove_file(dir.join(name)).unwrap();
    }
    let server = Server::start(dir);
    let found = as_postgres(
        dir,
        "psql -qAt postgres -c 'SELECT sum(abalance) FROM pgbench_accounts' \
             -c 'SELECT sum(bbalance) FROM pgbench_branches' -c 'SELECT sum(tbalance) FROM pgbench_tellers' \
             -c 'SELECT coalesce(sum(delta), 0) FROM pgbench_history' \
             -c 'SELECT count(*) FROM rows' -c 'SELECT max(n) FROM rows'
         pg_amcheck --heapallindexed --install-missing postgres",
    );
    let found: Vec<_> = found.lines().collect();
    assert!(found[..4].iter().all(|sum| *sum == found[0]), "{found:?}");
    assert_eq!(found[4], found[5], "{found:?}");
    server.stop();
    as_postgres(dir, "pg_checksums --check >/dev/null");
    let log = std::fs::read_to_string(dir.join("log")).unwrap();
    assert!(log.contains("automatic recovery in progress"), "{log}");
    for word in ["PANIC", "ERROR", "corrupt", "incorrect resource manager"] {
        assert!(!log.contains(word), "{log}");
    }
    found[4].parse().unwrap()
}

/// pgbench and a program that counts write to one server.
#[test]
fn a_snapshot_has_every_transaction_that_postgres_has_committed_before() {
    if !possible(&["pgbench", "setpriv"]) {
        return;
    }
    let lab = Lab::new();
    let dir = lab.top.join("database");
    std::fs::create_dir(&dir).unwrap();
    run("chown", [Path::new("postgres:postgres"), &dir]).ok();
    as_postgres(
        &dir,
        "initdb -k -A trust --wal-segsize=4 -D data >/dev/null
         echo 'max_wal_size = 32MB' >> data/postgresql.conf
         echo 'min_wal_size = 8MB' >> data/postgresql.conf",
    );
    let server = Server::start(&dir);
    as_postgres(
        &dir,
        "pgbench -q -i -s 2 postgres 2>/dev/null
         psql -qAt postgres -c 'CREATE TABLE rows(n bigint PRIMARY KEY, v text)' -c 'INSERT INTO rows VALUES (1)'",
    );
    let (progress, ended) = (Progress::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = Client::start(postgres::command(&dir, "exec psql -qAt postgres"));
            transact(&progress, &ended, |number| {
                let row = number + 1;
                let insert = "INSERT INTO rows SELECT";
                client.execute(&format!("{insert} {row}, md5('{row}') RETURNING n;"), row);
            });
            client.end();
        });
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                let output = as_postgres(&dir, "pgbench -n -c 2 -j 1 -T 2 postgres 2>&1");
                assert!(
                    output.contains("number of failed transactions: 0 "),
                    "{output}"
                );
            }
        });
        let _end = EndOnDrop(&ended);
        let state = || {
            let load = |count: &AtomicU64| count.load(Ordering::SeqCst);
            (load(&progress.acknowledged) + 1, load(&progress.begun) + 1)
        };
        lab.check_snapshots(state, |copy, (acknowledged, _), (_, begun)| {
            let rows = recover_postgres(&copy.join("database"));
            assert!(
                (acknowledged..=begun).contains(&&rows),
                "{rows} rows, of {acknowledged} to {begun}"
            );
        });
    });
    assert!(progress.acknowledged.load(Ordering::SeqCst) > 10);
    let count = as_postgres(&dir, "psql -qAt postgres -c 'SELECT count(*) FROM rows'");
    let expected = progress.acknowledged.load(Ordering::SeqCst) + 1;
    assert_eq!(count, expected.to_string());
    server.stop();
    lab.end();
}
