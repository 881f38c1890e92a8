//! PostgreSQL servers, run by the user `postgres`. The directory of each contains the database cluster `data`, the
//! socket and the log.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{run_command, sh};

/// Returns the directory of the newest server's programs.
#[must_use]
pub fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten();
    let mut found: Vec<_> = versions
        .map(|version| version.unwrap().path().join("bin"))
        .filter(|bin| bin.join("initdb").is_file())
        .collect();
    found.sort();
    found.pop()
}

/// Returns the command that runs a script as the user of PostgreSQL, with its server's programs in PATH.
#[must_use]
pub fn command(dir: &Path, script: &str) -> Command {
    let bin = programs().expect("PostgreSQL's server; `cargo xtask setup` installs it");
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "sh", "-euc"])
        .arg(format!(
            "PATH={}:$PATH; export PATH; export PGDATA={dir}/data PGHOST={dir} HOME={dir}; cd {dir}\n{script}",
            bin.display(),
            dir = dir.display()
        ));
    command
}

/// Runs a script as the user of PostgreSQL, which must succeed. Returns its output.
#[track_caller]
#[allow(clippy::must_use_candidate, reason = "also for scripts without output")]
pub fn as_postgres(dir: &Path, script: &str) -> String {
    run_command(command(dir, script), b"").ok().out()
}

/// A server, which is stopped with the test.
#[derive(Debug)]
pub struct Server {
    dir: PathBuf,
}

impl Server {
    /// Starts a server, and waits until it accepts connections.
    #[track_caller]
    #[must_use]
    pub fn start(dir: &Path) -> Server {
        as_postgres(
            dir,
            "pg_ctl -s -w -l log -o \"-c listen_addresses= -c unix_socket_directories=$PGHOST\" start >/dev/null 2>&1 || { cat log; exit 1; }",
        );
        Server {
            dir: dir.to_owned(),
        }
    }

    /// Shuts the server down in the normal way.
    #[track_caller]
    pub fn stop(self) {
        as_postgres(&self.dir, "pg_ctl -s -w -m fast stop");
        std::mem::forget(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.dir.join("data/postmaster.pid")).unwrap_or_default();
        if let Some(pid) = pid.lines().next() {
            // SIGQUIT ends it at once.
            drop(sh(&format!("kill -QUIT {pid}")));
        }
    }
}
