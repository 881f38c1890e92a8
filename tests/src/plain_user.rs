//! A plain user without any privilege, who runs a script in a mount namespace of the test.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::command::{Output, run_command};
use crate::conditions::Need;
use crate::programs;
use crate::scratch::Scratch;

/// Requirements of a test with a plain user.
pub const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("setpriv"),
    Need::Program("unshare"),
    Need::Program("newuidmap"),
    Need::Program("busybox"),
    Need::Program("python3"),
];

/// The first id of the users of the tests.
const FIRST_USER: u32 = 1_000_000_000;

/// Whether the user has ranges of subordinate ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ids {
    /// 65,536 ids from 300,000 on.
    Ranges,
    /// No range.
    Own,
}

/// Becomes the user `$5` in a mount namespace, after the lines `$3`, which root executes. `$1` is the directory, `$2` the
/// content of /etc/subuid, `$4` the script.
const BECOME: &str = r#"
D=$1
export D U=$5
mkdir -m 755 "$D/user" "$D/user/home"
cp /etc/passwd /etc/group "$D"
echo "cowl-plain:x:$U:$U::$D/user/home:/bin/sh" >> "$D/passwd"
echo "cowl-plain:x:$U:" >> "$D/group"
printf "$2" > "$D/ids"
for file in passwd:passwd group:group ids:subuid ids:subgid; do
    mount --bind "$D/${file%:*}" "/etc/${file#*:}"
done
mknod -m 666 "$D/fuse" c 10 229
mount --bind "$D/fuse" /dev/fuse
cat > "$D/user/script" <<'SCRIPT'
set -eu
# The processes that hold the namespace; with an argument, all processes of cowl.
holders() { ps -u $U -o pid=,stat=,args= | awk -v all="${1-}" \
    '$2 !~ /Z/ && $3 ~ /cowl$/ && (all || / hold /) { print $1 }'; }
# The processes that hold its lock. A new one is visible before it has the lock.
locks() { stat -c ':%i 0 0$' "$HOME"/.local/state/cowl/namespace-* 2> /dev/null > inode || echo none > inode
    grep -c -f inode /proc/locks || :; }
ready() { for attempt in $(seq 100); do [ "$(holders | wc -l) $(locks)" != "2 2" ] || return 0; sleep 0.05; done; return 1; }
settle() { for attempt in $(seq 100); do [ "$(holders | wc -l)" != "$1" ] || return 0; sleep 0.05; done; holders; return 1; }
# A holder that is killed may have been replaced before.
finish() { for attempt in $(seq 20); do pids=$(holders all); [ -n "$pids" ] || return 0; kill -9 $pids || true; sleep 0.05; done; }
trap finish EXIT
mkdir source source/bin source/etc source/proc source/dev
cp "$(command -v busybox)" source/bin/busybox
for name in sh ls cat id; do ln -s busybox source/bin/$name; done
echo one > source/file
SCRIPT
printf '%s\n' "$4" >> "$D/user/script"
export HOME="$D/user/home" PATH="$D:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
unset XDG_RUNTIME_DIR XDG_STATE_HOME XDG_DATA_HOME XDG_CONFIG_HOME COWL_STORE COWL_KEEPER
eval "$3"
chown -R $U:$U "$D/user"
eval "${LAST-}"
cd "$HOME"
exec ${WRAP-} setpriv --reuid $U --regid $U --clear-groups bash "$D/user/script"
"#;

/// Runs a script of bash as a plain user, in a directory of that user, after the lines `before`, which root executes.
///
/// The script can use the functions `holders`, `locks`, `ready` and `settle`. All processes of cowl end with it.
#[track_caller]
pub fn as_user(ids: Ids, before: &str, script: &str) -> Output {
    let scratch = Scratch::for_test();
    programs::copy_for_all_users(&scratch);
    // Tests run at the same time, also those of several processes, and the namespace of each belongs to another user.
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let user = FIRST_USER + 32 * std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed);
    let ranges = match ids {
        Ids::Ranges => "cowl-plain:300000:65536\\n",
        Ids::Own => "",
    };
    let mut command = Command::new("unshare");
    command
        .args(["-m", "bash", "-euc", BECOME, "bash"])
        .arg(&*scratch)
        .args([ranges, before, script, &user.to_string()]);
    run_command(command, b"")
}
