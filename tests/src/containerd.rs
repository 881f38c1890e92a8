//! containerd with `cowl-snapshotter`, in namespaces of its own, without a network and without a registry.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::{Output, run_command, sh_in};
use crate::conditions::Need;
use crate::hosts::Host;
use crate::rootfs;
use crate::scratch::Scratch;

/// Requirements of every test with containerd.
pub const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("containerd"),
    Need::Program("ctr"),
    Need::Program("runc"),
    Need::Program("busybox"),
    Need::Program("python3"),
];

/// Enters the namespaces, and starts both programs. `$1` is the directory, `$2` that of the programs under test, `$3` the
/// script.
///
/// runc refuses a hierarchy of cgroup v2 below one of v1, so it is unmounted. The paths of the shims' sockets are fixed,
/// so `/run/containerd` is hidden. The cgroups of containers are those of the whole machine, so the namespace of
/// containerd has a name of its own.
const NAMESPACE: &str = r#"
export D=$1 PATH=$2:$PATH COWL_STORE=$1/store NS=cowl-$(echo "$1" | md5sum | head -c 12)
if grep -q ' /sys/fs/cgroup/unified ' /proc/mounts; then umount /sys/fs/cgroup/unified; fi
mkdir -p /run/containerd && mount -t tmpfs -o mode=755 none /run/containerd
cat > "$D/containerd.toml" <<CONFIG
version = 2
root = "$D/root"
state = "$D/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[proxy_plugins.cowl]
  type = "snapshot"
  address = "/run/containerd/cowl.sock"
CONFIG
ctr() { command ctr --address /run/containerd/containerd.sock --namespace "$NS" "$@"; }
await() { for i in $(seq 500); do if "$@" > /dev/null 2>&1; then return; fi; sleep 0.05; done; echo "never: $*" >&2; return 1; }
connects() { python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("/run/containerd/cowl.sock")'; }
# Returns when containerd, if it runs, is connected.
start_snapshotter() {
    cowl-snapshotter --address /run/containerd/cowl.sock -v 2>> "$D/snapshotter.log" &
    SNAPSHOTTER=$!
    await connects
    if [ -n "${CONTAINERD-}" ]; then
        await ctr snapshots --snapshotter cowl prepare probe
        ctr snapshots --snapshotter cowl rm probe
    fi
}
start_containerd() {
    containerd --config "$D/containerd.toml" --log-level warn 2>> "$D/containerd.log" &
    CONTAINERD=$!
    await ctr version
}
import() { ctr images import --snapshotter cowl "$D/$1.tar" > /dev/null; }
start() { ctr run -d --snapshotter cowl "$@"; }
stop() {
    ctr task kill -s KILL "$1" > /dev/null 2>&1 || :
    await ctr task rm "$1"
}
remove() { stop "$1"; ctr containers rm "$1"; }
run_in() { local id=$1; shift; ctr task exec --exec-id "exec-$RANDOM$RANDOM" "$id" "$@"; }
# containerd removes what no container uses some time after the removal of the container.
# containerd lists no snapshot whose removal has failed because a process was using it.
collected() {
    local listed
    ctr content prune references > /dev/null 2>&1 || :
    listed=$(cowl list --containerd=all) && [ "$(ctr snapshots --snapshotter cowl ls | wc -l)" = 1 ] && [[ $listed != *ctr.* ]]
}
prepare() { ctr snapshots --snapshotter cowl prepare "$@"; }
commit() { ctr snapshots --snapshotter cowl commit "$@"; }
# Mounts the snapshot $2 at $D/$1.
mount_at() { mkdir -p "$D/$1"; eval "$(ctr snapshots --snapshotter cowl mounts "$D/$1" "$2")"; }
kill_snapshotter() { kill -9 $SNAPSHOTTER; wait $SNAPSHOTTER 2> /dev/null || :; }
kill_containerd() { kill -9 $CONTAINERD; wait $CONTAINERD 2> /dev/null || :; }
# The lease of a client that has lost its connection retains snapshots for a day.
remove_leases() { for lease in $(ctr leases ls -q); do ctr leases rm $lease > /dev/null; done; }
mounts() { grep -c " $COWL_STORE/mnt/" /proc/mounts || :; }
daemons() { pgrep -fc "cowl --store $COWL_STORE serve" || :; }
trap 'tail -n 5 "$D"/*.log >&2' ERR
start_snapshotter
start_containerd
eval "$3"
"#;

/// A directory for containerd and a store.
#[derive(Debug)]
pub struct Containerd {
    scratch: Scratch,
    /// The directory of the programs under test.
    programs: PathBuf,
}

/// A layer of an image: a name, and a script that creates its files in an empty directory.
pub type LayerScript<'s> = (&'s str, &'s str);

impl Containerd {
    /// Creates the directory.
    #[must_use]
    pub fn for_test() -> Self {
        Self::with_programs(Scratch::for_test(), programs())
    }

    /// Creates one with the programs of a directory.
    #[must_use]
    pub fn with_programs(scratch: Scratch, programs: PathBuf) -> Self {
        Self { scratch, programs }
    }

    /// Returns the directory `$D` of the scripts.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.scratch
    }

    /// Runs a bash script with containerd and the snapshotter. It has the functions of [`NAMESPACE`] and ends with its
    /// first failing command. All processes and mounts end with it.
    #[must_use]
    pub fn script(&self, text: &str) -> Output {
        run_command(self.command(text), b"")
    }

    /// Runs a script like [`Containerd::script`] in the network namespace of a host.
    #[track_caller]
    #[must_use]
    pub fn script_on(&self, host: &Host, text: &str) -> Output {
        host.run_command(&self.command(text))
    }

    fn command(&self, text: &str) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["-mp", "--fork", "--kill-child", "--mount-proc"])
            .args(["bash", "-Eeuo", "pipefail", "-c", NAMESPACE, "bash"])
            .arg(&*self.scratch)
            .arg(&self.programs)
            .arg(text);
        command
    }

    /// Creates the file `$D/NAME.tar`, an image of `docker save` with the name `test/NAME:latest`. Its bottom layer is a
    /// root filesystem with busybox.
    ///
    /// # Panics
    /// If a script fails.
    pub fn make_image(&self, name: &str, layers: &[LayerScript<'_>]) {
        let dir = self.scratch.make(&format!("image-{name}"));
        let base = rootfs::busybox_tar().expect("a root filesystem");
        std::fs::copy(base, dir.join("base.tar")).expect("a copy of the root filesystem");
        let mut names = vec!["base.tar".to_owned()];
        for (layer, script) in layers {
            let script = format!(
                "mkdir {layer}; (cd {layer}; {script}); \
                 tar -C {layer} --numeric-owner --mtime=@1700000000 --format=pax -cf {layer}.tar ."
            );
            sh_in(&dir, &script).ok();
            names.push(format!("{layer}.tar"));
        }
        let digest = |name: &String| format!("sha256:{}", sha256(&dir.join(name)));
        let config = json!({
            "architecture": rootfs::image_architecture(),
            "os": "linux",
            "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": names.iter().map(digest).collect::<Vec<_>>() },
        });
        let manifest = json!([{
            "Config": "config.json",
            "RepoTags": [format!("docker.io/test/{name}:latest")],
            "Layers": names,
        }]);
        let write = |file: &str, value: &Value| {
            std::fs::write(dir.join(file), value.to_string()).expect("a document of the image");
        };
        write("config.json", &config);
        write("manifest.json", &manifest);
        let files = format!("config.json manifest.json {}", names.join(" "));
        sh_in(&dir, &format!("tar -cf ../{name}.tar {files}")).ok();
    }
}

fn sha256(path: &Path) -> String {
    let bytes = std::fs::read(path).expect("a file of the image");
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the directory of the programs under test.
fn programs() -> PathBuf {
    let program = crate::programs::cowl_snapshotter();
    program.parent().expect("a directory").to_path_buf()
}
