//! sqlite with two writers, and PostgreSQL.

use std::path::Path;
use std::process::{Command, Stdio};

use cowl_tests::command::{self, run};
use cowl_tests::conditions::{Need, can_mount};
use cowl_tests::postgres::{Server, as_postgres};
use cowl_tests::samples::ask_sqlite;

use crate::field::{Attack, Field};

/// Runs two writers, each of which prints the rows that it has committed. Returns these.
#[track_caller]
fn two_writers(database: &Path, mode: &str, round: u32) -> Vec<String> {
    let writers = ["a", "b"].map(|writer| {
        let mut script = format!("PRAGMA busy_timeout = 60000; PRAGMA journal_mode = {mode};\n");
        for number in 0..40 {
            let row = format!("{writer}-{round}-{number}");
            script += &format!(
                "BEGIN IMMEDIATE; INSERT INTO t(name, v) VALUES('{row}', hex(randomblob(200)));
                 UPDATE t SET v = v || 'x' WHERE id % 100 = 1; COMMIT; SELECT '{row}';\n"
            );
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, script.as_bytes()).unwrap();
        let child = Command::new("sqlite3")
            .args(["-bail", "-batch"])
            .arg(database)
            .stdin(std::fs::File::open(file.path()).unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        (child, file)
    });
    let mut committed = Vec::new();
    for (child, _file) in writers {
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "sqlite3 in mode {mode}: {}",
            command::show(&output.stderr)
        );
        let lines = command::show(&output.stdout);
        committed.extend(
            lines
                .lines()
                .filter(|line| line.contains('-'))
                .map(str::to_owned),
        );
    }
    assert_eq!(committed.len(), 80, "{mode}");
    committed
}

#[test]
fn sqlite_keeps_every_committed_row() {
    if !can_mount(&[Need::Program("sqlite3")]) {
        return;
    }
    let modes = ["wal", "delete", "truncate", "persist"];
    let field = Field::new(|lower| {
        for mode in modes {
            ask_sqlite(
                &lower.join(mode),
                &format!(
                    "PRAGMA journal_mode = {mode}; CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT UNIQUE, v TEXT);
                     CREATE INDEX i ON t(v); WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n
                     WHERE x < 2000) INSERT INTO t(name, v) SELECT x, hex(randomblob(100)) FROM n;"
                ),
            );
        }
    });
    let attack = field.attack();
    let mut committed = modes.map(|mode| (mode, Vec::new()));
    let mut round = 0;
    while round == 0 || attack.continues() {
        round += 1;
        for (mode, rows) in &mut committed {
            rows.extend(two_writers(&attack.path().join(*mode), mode, round));
        }
    }
    let check = |dir: &Path| {
        for (mode, rows) in &committed {
            let database = dir.join(mode);
            let found = ask_sqlite(
                &database,
                "SELECT name FROM t WHERE name LIKE '%-%' ORDER BY name;",
            );
            let mut rows = rows.clone();
            rows.sort();
            assert!(
                found.lines().eq(rows.iter().map(String::as_str)),
                "{mode}: {found}"
            );
            assert_eq!(
                ask_sqlite(&database, "PRAGMA integrity_check;"),
                "ok",
                "{mode}"
            );
        }
    };
    check(attack.path());
    attack.end();
    let mount = field.mount();
    check(mount.path());
    mount.unmount();
}

#[test]
fn postgres_loses_no_transaction() {
    if !can_mount(&[Need::Program("pgbench"), Need::Program("setpriv")]) {
        return;
    }
    let field = Field::new(|lower| {
        run("chown", [Path::new("postgres:postgres"), lower]).ok();
        as_postgres(lower, "initdb -N -A trust -D data >/dev/null");
        let server = Server::start(lower);
        as_postgres(lower, "pgbench -q -i -s 1 postgres 2>/dev/null");
        server.stop();
    });
    let attack: Attack = field.attack();
    let dir = attack.path().to_owned();
    let mut transactions = 0;
    let server = Server::start(&dir);
    while transactions == 0 || attack.continues() {
        let output = as_postgres(&dir, "pgbench -n -c 4 -j 2 -t 150 postgres 2>&1");
        assert!(
            output.contains("number of failed transactions: 0 ")
                && output.contains("actually processed: 600/600"),
            "{output}"
        );
        transactions += 600;
    }
    server.stop();
    attack.end();

    let mount = field.mount();
    let dir = mount.path();
    let server = Server::start(dir);
    let sums = as_postgres(
        dir,
        "psql -qAt postgres -c 'SELECT sum(abalance) FROM pgbench_accounts' \
             -c 'SELECT sum(bbalance) FROM pgbench_branches' -c 'SELECT sum(tbalance) FROM pgbench_tellers' \
             -c 'SELECT sum(delta) FROM pgbench_history' -c 'SELECT count(*) FROM pgbench_history'
         pg_amcheck --heapallindexed --install-missing postgres",
    );
    let sums: Vec<_> = sums.lines().collect();
    assert!(sums[..4].iter().all(|sum| *sum == sums[0]), "{sums:?}");
    assert_eq!(sums[4], transactions.to_string());
    server.stop();
    let log = std::fs::read_to_string(dir.join("log")).unwrap();
    for word in ["PANIC", "ERROR", "not properly shut down", "recovery"] {
        assert!(!log.contains(word), "{log}");
    }
    assert_eq!(
        log.matches("database system is shut down").count(),
        3,
        "{log}"
    );
    mount.unmount();
}
