//! Podman with a FUSE overlay as its `mount_program`, as root or as an ordinary user, without a network and without a
//! registry.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::command::{Output, run_command};
use crate::conditions::Need;
use crate::scratch::Scratch;

/// Requirements of every test with podman.
pub const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("podman"),
    Need::Program("buildah"),
    Need::Program("crun"),
    Need::Program("newuidmap"),
    Need::Program("busybox"),
    Need::Program("fuse-overlayfs"),
];

/// The user that runs podman.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// The superuser.
    Root,
    /// A user with a range of subordinate ids.
    Plain,
}

/// The program that mounts the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountProgram {
    /// The program under test.
    Cowlfs,
    /// The program whose place it takes.
    FuseOverlayfs,
}

/// A storage directory of podman.
#[derive(Debug)]
pub struct Podman {
    scratch: Scratch,
    user: User,
    /// Serializes the tests: each script has a mount namespace, which holds copies of all mounts.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// Enters a mount namespace and becomes the user. `$1` is the directory, `$2` the mount program, `$3` the user, `$4` the
/// script.
///
/// crun refuses a hierarchy of cgroup v2 below one of v1, so it is unmounted. It changes the owner of its standard input
/// to the root of the container, and the input is /dev/null, so the scripts have a /dev/null of their own.
const NAMESPACE: &str = r#"
D=$1
if grep -q ' /sys/fs/cgroup/unified ' /proc/mounts; then umount /sys/fs/cgroup/unified; fi
cp /etc/passwd /etc/group "$D"
echo "cowl-test:x:54321:54321::$D:/bin/sh" >> "$D/passwd"
echo "cowl-test:x:54321:" >> "$D/group"
printf 'cowl-test:300000:65536\ncontainers:400000:1000000\n' > "$D/ids"
for file in passwd:passwd group:group ids:subuid ids:subgid; do
    mount --bind "$D/${file%:*}" "/etc/${file#*:}"
done
rm -f "$D/fuse" "$D/null"
mknod -m 666 "$D/fuse" c 10 229
mknod -m 666 "$D/null" c 1 3
for name in fuse null; do mount --bind "$D/$name" "/dev/$name"; done
mkdir -p -m 755 "$D/user" "$D/user/tmp" "$D/user/run" "$D/user/context"
cat > "$D/user/script" <<'SCRIPT'
set -eu
podman() { command podman --root "$D/storage" --runroot "$D/run" --tmpdir "$D/libpod" --storage-driver overlay \
    --storage-opt "overlay.mount_program=$PROGRAM" --cgroup-manager cgroupfs --events-backend none "$@"; }
buildah() { command buildah --root "$D/storage" --runroot "$D/run" --storage-driver overlay \
    --storage-opt "overlay.mount_program=$PROGRAM" "$@"; }
run() { podman run --ulimit nofile=4096:4096 --ulimit nproc=4096:4096 --cgroups=disabled --network=none "$@"; }
build() { podman build -q --isolation chroot --network host "$@"; }
# Runs a function where the mounts of podman are visible.
inside() { if [ "$(id -u)" = 0 ]; then "$@"; else podman unshare bash -c ". $D/functions; $*"; fi; }
# Prints a tree. Times differ between two runs.
tree() { (cd "$1" && find . -mindepth 1 \( -type d -printf '%p d %m %U %G\n' -o -type l -printf '%p l %l\n' \
        -o -printf '%p %y %m %U %G %s %n\n' \) | sort && find . -type f -print0 | sort -z | xargs -0r md5sum); }
image_tree() { local mounted; mounted=$(podman image mount "$1"); tree "$mounted"; podman image unmount "$1" > /dev/null; }
# conmon unmounts what belongs to a container a moment after it has ended.
remove_all() {
    for attempt in 1 2 3 4 5; do if podman rm -a > /dev/null 2>&1; then return; fi; sleep 1; done
    podman rm -a
}
cd "$D"
{ echo "D='$D' PROGRAM='$PROGRAM'"; declare -f podman buildah tree image_tree; } > "$D/functions"
finish() {
    podman rm -a -f -t 0 > /dev/null 2>&1 || :
    # The process that holds the namespaces of an ordinary user keeps the mounts as well.
    if [ -e "$D/libpod/pause.pid" ]; then kill -9 "$(cat "$D/libpod/pause.pid")"; fi
}
trap finish EXIT
SCRIPT
printf '%s\n' "$4" >> "$D/user/script"
export D="$D/user" PROGRAM=$2
export HOME=$D XDG_RUNTIME_DIR=$D/run XDG_CONFIG_HOME=$D TMPDIR=$D/tmp
if [ "$3" = root ]; then exec bash "$D/script"; fi
chown -R 54321:54321 "$D"
exec setpriv --reuid 54321 --regid 54321 --clear-groups bash "$D/script"
"#;

impl Podman {
    /// Creates an empty storage directory.
    ///
    /// # Panics
    /// If the directory cannot be opened for other users.
    #[must_use]
    pub fn for_test(user: User) -> Self {
        use std::os::unix::fs::PermissionsExt;
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = Scratch::for_test();
        std::fs::set_permissions(&*scratch, std::fs::Permissions::from_mode(0o755))
            .expect("a directory that other users can enter");
        Self {
            scratch,
            user,
            _alone: alone,
        }
    }

    /// Returns the directory `$D` of the scripts.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.scratch.join("user")
    }

    /// Returns the directory of files of the test, which every user can read.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// Runs a bash script as the user, with the functions `podman`, `buildah`, `run`, `build`, `inside`, `tree` and
    /// `image_tree`. Removes all containers at its end.
    #[must_use]
    pub fn script(&self, program: MountProgram, text: &str) -> Output {
        run_command(self.command(program, text), b"")
    }

    /// Starts a script in the background, with its output in files `out` and `err` of the scratch directory.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(&self, program: MountProgram, text: &str) -> Child {
        let file = |name: &str| std::fs::File::create(self.scratch.join(name)).expect("a file");
        let mut command = self.command(program, text);
        command
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"));
        command.spawn().expect("starting a script")
    }

    fn command(&self, program: MountProgram, text: &str) -> Command {
        // An ordinary user cannot enter the directory of the programs under test.
        let path = match program {
            MountProgram::Cowlfs => {
                let copy = self.scratch.join("cowlfs");
                if !copy.try_exists().expect("a readable directory") {
                    std::fs::copy(crate::programs::cowlfs(), &copy).expect("a copy of cowlfs");
                }
                copy
            }
            MountProgram::FuseOverlayfs => crate::programs::in_path("fuse-overlayfs").expect("it"),
        };
        let mut command = Command::new("unshare");
        command
            .args(["-m", "bash", "-euc", NAMESPACE, "bash"])
            .arg(&*self.scratch)
            .arg(path)
            .arg(if self.user == User::Root {
                "root"
            } else {
                "plain"
            })
            .arg(text);
        command
    }
}
