//! Real LXC containers for tests: busybox ones, in a folder of the test's own, and a store beside it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::command::{self, Output};
use crate::conditions::Need;
use crate::cowl::Store;
use crate::scratch::Scratch;

/// What every test with a running container needs.
pub const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("lxc-start"),
    Need::Program("busybox"),
];

/// How long a container may take for what it does by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder of LXC containers, and a store. What runs at the end is stopped.
#[derive(Debug)]
pub struct Lxc {
    store: Store,
    path: PathBuf,
    /// One test at a time: LXC's programs work in mount namespaces of their own, each of which holds a copy
    /// of every mount there is, and so keeps another test's mounts busy.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

impl Lxc {
    /// Both empty.
    #[must_use]
    pub fn new(test: &str) -> Lxc {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let store = Store::new(test);
        let path = store.scratch().make("lxc");
        Lxc {
            store,
            path,
            _alone: alone,
        }
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The folder for a test's other files.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        self.store.scratch()
    }

    /// The folder of the containers.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A container's folder.
    #[must_use]
    pub fn dir(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// What a container's config says.
    #[track_caller]
    #[must_use]
    pub fn config(&self, name: &str) -> String {
        let path = self.dir(name).join("config");
        std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
    }

    /// Makes a container of busybox alone: nothing of this machine is mounted in it, so that its folders
    /// are its own. It has a host name on its disk, as a distribution has.
    #[track_caller]
    pub fn create(&self, name: &str) {
        self.tool("create", name, ["-t", "busybox"]).ok();
        let of_the_machine = |line: &str| {
            line.starts_with("lxc.net.")
                || line.starts_with("lxc.apparmor.")
                || (line.starts_with("lxc.mount.entry") && line.contains("lib"))
        };
        let text: String = self
            .config(name)
            .split_inclusive('\n')
            .filter(|line| !of_the_machine(line))
            .collect();
        let text = format!(
            "{text}lxc.net.0.type = empty\n\nlxc.apparmor.profile = unconfined\n  # the end\n\n"
        );
        let write = |path: PathBuf, text: &str| {
            std::fs::write(&path, text)
                .unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        };
        write(self.dir(name).join("config"), &text);
        write(
            self.dir(name).join("rootfs/etc/hostname"),
            &format!("{name}\n"),
        );
    }

    /// Runs `lxc-TOOL -P PATH -n NAME ARGS`.
    #[track_caller]
    pub fn tool<S: AsRef<OsStr>>(
        &self,
        tool: &str,
        name: &str,
        args: impl IntoIterator<Item = S>,
    ) -> Output {
        let mut command = Command::new(format!("lxc-{tool}"));
        command
            .arg("-P")
            .arg(&self.path)
            .args(["-n", name])
            .args(args);
        command::run_command(command, b"")
    }

    /// Takes a container over.
    #[track_caller]
    pub fn adopt(&self, name: &str) -> Output {
        let args: [OsString; 4] = [
            "adopt".into(),
            name.into(),
            "-P".into(),
            self.path.clone().into(),
        ];
        self.store.cowl(args)
    }

    /// Starts it and waits until it runs.
    #[track_caller]
    pub fn start(&self, name: &str) {
        self.tool("start", name, ["-d"]).ok();
        self.wait_for(name, "RUNNING");
    }

    /// Kills it.
    #[track_caller]
    pub fn kill(&self, name: &str) {
        self.tool("stop", name, ["-k"]).ok();
        self.wait_for(name, "STOPPED");
    }

    /// Its state, in LXC's word.
    #[track_caller]
    #[must_use]
    pub fn state(&self, name: &str) -> String {
        let said = self.tool("info", name, ["-s", "-H"]).out();
        said.rsplit(':')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    /// Its first process.
    #[track_caller]
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        let said = self.tool("info", name, ["-p", "-H"]).out();
        said.rsplit(':')
            .next()
            .and_then(|pid| pid.trim().parse().ok())
    }

    /// Waits for a state.
    #[track_caller]
    pub fn wait_for(&self, name: &str, state: &str) {
        self.wait(&format!("{name} to be {state}"), || {
            self.state(name) == state
        });
    }

    /// Waits for something that comes by itself.
    #[track_caller]
    pub fn wait(&self, what: &str, there: impl Fn() -> bool) {
        let start = Instant::now();
        while !there() {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a shell line in a running container; it must succeed. What it said.
    #[track_caller]
    pub fn run(&self, name: &str, line: &str) -> String {
        self.tool("attach", name, ["--", "/bin/sh", "-c", line])
            .ok()
            .out()
    }

    /// Starts a container whose ids begin at 100000, runs a shell line in it, and kills it. Returns the output.
    ///
    /// Root may use these ids in the mount namespace of the commands only: a subid file is mounted there.
    #[track_caller]
    pub fn run_mapped(&self, name: &str, line: &str) -> String {
        let ids = self.scratch().join("subid");
        std::fs::write(&ids, "root:100000:65536\n").expect("writing the subid file");
        let script = format!(
            "mount --bind {ids} /etc/subuid; mount --bind {ids} /etc/subgid
             lxc-start -P {path} -n {name} -d
             for n in $(seq 100); do
                 lxc-attach -P {path} -n {name} -- true 2>/dev/null && break; sleep 0.1
             done
             lxc-attach -P {path} -n {name} -- /bin/sh -c '{line}'
             lxc-stop -P {path} -n {name} -k",
            ids = ids.display(),
            path = self.path().display(),
        );
        let args = ["-m", "--propagation", "slave", "sh", "-euc", &script];
        let output = crate::command::run("unshare", args).ok().out();
        self.unmounted(name);
        output
    }

    /// Takes the mount away that a stop may have left: any process of this machine that makes a mount
    /// namespace meanwhile keeps a mount busy for a moment.
    #[track_caller]
    pub fn unmounted(&self, name: &str) {
        self.wait(&format!("{name} to be unmounted"), || {
            let said = self.store.cowl(["umount", name]);
            said.code == 0 || said.err().contains("is not mounted")
        });
    }
}

impl Drop for Lxc {
    fn drop(&mut self) {
        let entries = std::fs::read_dir(&self.path);
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let mut stop = Command::new("lxc-stop");
            stop.arg("-P")
                .arg(&self.path)
                .arg("-n")
                .arg(&name)
                .arg("-k");
            // One that does not run is none to be stopped.
            stop.stderr(std::process::Stdio::null());
            if let Err(error) = stop.status() {
                eprintln!("cannot stop {}: {error}", name.display());
            }
        }
    }
}
