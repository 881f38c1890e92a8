//! LXC containers for tests: busybox containers in a directory of the test, and a store next to it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::command::{self, Output};
use crate::conditions::Need;
use crate::cowl::Store;
use crate::scratch::Scratch;

/// Requirements of every test with a running container.
pub const NEEDS: &[Need] = &[
    Need::Root,
    Need::Fuse,
    Need::Program("lxc-start"),
    Need::Program("busybox"),
];

/// Timeout for state changes of a container.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A directory of LXC containers, and a store. Drop stops the containers.
#[derive(Debug)]
pub struct Lxc {
    store: Store,
    path: PathBuf,
    /// Serializes the tests: LXC's programs create mount namespaces, each of which holds copies of all mounts and
    /// thereby keeps the mounts of other tests busy.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// The lines for a container whose root is the user 100000 of the machine.
pub const MAP: &str = "lxc.idmap = u 0 100000 65536\nlxc.idmap = g 0 100000 65536\n";

impl Lxc {
    /// Creates an empty directory and a store.
    #[must_use]
    pub fn for_test() -> Lxc {
        Lxc::with_store(Store::for_test())
    }

    /// Creates an empty directory and a store whose mounts get a keeper each.
    #[must_use]
    pub fn with_keepers() -> Lxc {
        Lxc::with_store(Store::for_test().with_keepers())
    }

    /// Creates an empty directory and a store that mounts with kernel overlayfs.
    #[must_use]
    pub fn with_kernel_driver() -> Lxc {
        Lxc::with_store(Store::for_test().with_kernel_driver())
    }

    /// Creates an empty directory and a store whose mounts use passthrough for all files.
    #[must_use]
    pub fn with_passthrough() -> Lxc {
        Lxc::with_store(Store::for_test().with_passthrough())
    }

    fn with_store(store: Store) -> Lxc {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let path = store.scratch().make("lxc");
        Lxc {
            store,
            path,
            _alone: alone,
        }
    }

    /// Returns the store.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Returns the directory for other files of the test.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        self.store.scratch()
    }

    /// Returns the directory of the containers.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of a container.
    #[must_use]
    pub fn dir(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Reads the config of a container.
    #[track_caller]
    #[must_use]
    pub fn config(&self, name: &str) -> String {
        let path = self.dir(name).join("config");
        std::fs::read_to_string(&path)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
    }

    /// Creates a container of busybox only. Removes the bind mounts and the network of the host from its config, so
    /// that its directories are its own, and writes /etc/hostname as a distribution does.
    #[track_caller]
    pub fn create(&self, name: &str) {
        self.tool("create", name, ["-t", "busybox"]).ok();
        let depends_on_host = |line: &str| {
            line.starts_with("lxc.net.")
                || line.starts_with("lxc.apparmor.")
                || (line.starts_with("lxc.mount.entry") && line.contains("lib"))
        };
        let text: String = self
            .config(name)
            .split_inclusive('\n')
            .filter(|line| !depends_on_host(line))
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
            .args(args)
            .envs(self.store.settings());
        command::run_command(command, b"")
    }

    /// Creates a container with [`MAP`], whose root can reach its files. Returns its config.
    #[track_caller]
    pub fn create_mapped(&self, name: &str) -> String {
        use std::os::unix::fs::PermissionsExt;
        self.create(name);
        for dir in [&**self.scratch(), &self.dir(name)] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))
                .expect("setting a mode");
        }
        let config =
            self.config(name) + MAP + "lxc.mount.auto = cgroup:mixed proc:mixed sys:mixed\n";
        std::fs::write(self.dir(name).join("config"), &config).expect("writing the config");
        let rootfs = self.dir(name).join("rootfs");
        let owner = OsStr::new("100000:100000");
        crate::command::run("chown", [OsStr::new("-R"), owner, rootfs.as_os_str()]).ok();
        config
    }

    /// Creates a Debian container with systemd and /dev/fuse.
    #[track_caller]
    pub fn create_with_systemd(&self, name: &str) {
        let dir = self.dir(name);
        let root = dir.join("rootfs");
        std::fs::create_dir_all(&root).expect("creating the directory of a container");
        let tar = crate::rootfs::systemd_tar().expect("a Debian with systemd");
        crate::rootfs::unpack(&tar, &root).expect("unpacking a Debian with systemd");
        let config = format!(
            "lxc.uts.name = {name}\nlxc.rootfs.path = dir:{}\nlxc.net.0.type = empty\n\
             lxc.apparmor.profile = unconfined\nlxc.mount.auto = cgroup:mixed proc:mixed sys:mixed\n\
             lxc.include = /usr/share/lxc/config/common.conf\n\
             lxc.mount.entry = /dev/fuse dev/fuse none bind,create=file\n",
            root.display()
        );
        std::fs::write(dir.join("config"), config).expect("writing the config");
    }

    /// Starts a container with systemd, and waits until all units of its boot are active.
    #[track_caller]
    pub fn start_systemd(&self, name: &str) {
        self.start(name);
        self.wait("systemd", || {
            let args = ["--", "systemctl", "is-system-running"];
            self.tool("attach", name, args).out() == "running"
        });
    }

    /// Adopts a container.
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

    /// Starts a container and waits until it runs.
    #[track_caller]
    pub fn start(&self, name: &str) {
        self.tool("start", name, ["-d"]).ok();
        self.wait_for(name, "RUNNING");
    }

    /// Kills a container.
    #[track_caller]
    pub fn kill(&self, name: &str) {
        self.tool("stop", name, ["-k"]).ok();
        self.wait_for(name, "STOPPED");
    }

    /// Returns the state of a container, as LXC names it.
    #[track_caller]
    #[must_use]
    pub fn state(&self, name: &str) -> String {
        let output = self.tool("info", name, ["-s", "-H"]).out();
        output
            .rsplit(':')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    }

    /// Returns the pid of the container's init.
    #[track_caller]
    #[must_use]
    pub fn pid(&self, name: &str) -> Option<u32> {
        let output = self.tool("info", name, ["-p", "-H"]).out();
        output
            .rsplit(':')
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

    /// Polls `there` until it returns true.
    #[track_caller]
    pub fn wait(&self, condition: &str, there: impl Fn() -> bool) {
        let start = Instant::now();
        while !there() {
            assert!(
                start.elapsed() < TIMEOUT,
                "timed out waiting for {condition}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a shell line in a running container, which must succeed. Returns its output.
    #[track_caller]
    pub fn run(&self, name: &str, line: &str) -> String {
        self.tool("attach", name, ["--", "/bin/sh", "-c", line])
            .ok()
            .out()
    }

    /// Starts a container whose ids begin at 100000, runs a shell line in it, and kills it. Returns the output of the
    /// line.
    ///
    /// A subid file that permits these ids to root is mounted in the mount namespace of the commands only.
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
        let mut command = Command::new("unshare");
        command
            .args(["-m", "--propagation", "slave", "sh", "-euc", &script])
            .envs(self.store.settings());
        let output = crate::command::run_command(command, b"").ok().out();
        self.unmounted(name);
        output
    }

    /// Unmounts a container after its stop. Retries while the mount is busy: a process that creates a mount namespace
    /// meanwhile holds a copy of it for a moment.
    #[track_caller]
    pub fn unmounted(&self, name: &str) {
        self.wait(&format!("{name} to be unmounted"), || {
            let output = self.store.cowl(["umount", name]);
            output.code == 0 || output.err().contains("is not mounted")
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
            // lxc-stop prints an error for containers that do not run.
            stop.stderr(std::process::Stdio::null());
            if let Err(error) = stop.status() {
                eprintln!("cannot stop {}: {error}", name.display());
            }
        }
    }
}
