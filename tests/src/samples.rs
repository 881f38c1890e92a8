//! Material of tests with real programs: a project for make, questions to sqlite, and the comparable part of a Debian.

use std::path::Path;
use std::process::Command;

use crate::command::{Output, run_command};
use crate::tree::{self, Tree};

/// Fifty sources, each with its header, and one program.
pub const PROJECT: &str = r##"
    mkdir src; cd src
    for n in $(seq 50); do
        echo "int f$n(int);" > f$n.h
        echo "#include \"f$n.h\"
#include <stdio.h>
int f$n(int x) { return x + $n; }" > f$n.c
    done
    { for n in $(seq 50); do echo "#include \"f$n.h\""; done
      echo '#include <stdio.h>'; echo 'int main(void) { int x = 0;'
      for n in $(seq 50); do echo "x = f$n(x);"; done
      printf '%s\n' 'printf("%d\n", x); return 0; }'; } > main.c
    printf 'objects = $(patsubst %%.c,%%.o,$(wildcard *.c))\nprogram: $(objects)\n\t$(CC) -o $@ $^\n' > Makefile
    printf '%%.o: %%.c\n\t$(CC) -O0 -MMD -c -o $@ $<\n-include *.d\n' >> Makefile"##;

/// Executes statements of SQL, and returns the output.
#[track_caller]
#[allow(
    clippy::must_use_candidate,
    reason = "also for statements without output"
)]
pub fn ask_sqlite(database: &Path, question: &str) -> String {
    let mut command = Command::new("sqlite3");
    command.args(["-bail", "-batch"]).arg(database);
    run_command(command, question.as_bytes()).ok().out()
}

/// Returns a tree without objects that depend on the time or on the machine: logs, caches of numbers, dpkg's own
/// records, and the times of directories whose entries changed.
#[must_use]
pub fn without_records(root: &Path) -> Tree {
    let mut tree = tree::read(root).unwrap();
    let records = [
        &b"var/log/"[..],
        b"var/cache/",
        b"var/lib/dpkg/",
        b"var/lib/apt/",
        b"etc/ld.so.cache",
    ];
    tree.retain(|path, _| !records.iter().any(|record| path.starts_with(record)));
    for entry in tree.values_mut() {
        if entry.kind == rustix::fs::FileType::Directory {
            entry.mtime = (0, 0);
        }
    }
    tree
}

/// Runs a shell line in a root filesystem, which must succeed.
#[track_caller]
pub fn in_chroot(root: &Path, line: &str) -> Output {
    let mut command = Command::new("chroot");
    command
        .arg(root)
        .args(["sh", "-euc", line])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8");
    run_command(command, b"").ok()
}
