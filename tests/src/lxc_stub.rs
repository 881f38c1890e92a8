//! A container that cowl takes for a running LXC container, without LXC's programs: a control group that can be frozen,
//! into which a test puts programs, and a program `lxc-info` that reports it as running. Snapshots of it can stop these
//! programs (docs/decisions/0043).

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::scratch::Scratch;

/// A container whose root filesystem is any directory. Drop ends its processes.
#[derive(Debug)]
pub struct LxcStub {
    lxcpath: PathBuf,
    name: String,
    programs: PathBuf,
    group: PathBuf,
    init: Child,
    added: Mutex<Vec<u32>>,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Returns the root directory of the control groups that can be frozen, those of the freezer of version 1 if it is
/// mounted. `None` if there are none, or if other groups than the own ones are not visible.
#[must_use]
pub fn freezer() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let find = |kind: &str, option: &str| {
        let fits = |line: &&str| {
            let Some((fields, rest)) = line.split_once(" - ") else {
                return false;
            };
            let options = rest.split(' ').nth(2).unwrap_or_default();
            fields.split(' ').nth(3) == Some("/")
                && rest.split(' ').next() == Some(kind)
                && (option.is_empty() || options.split(',').any(|found| found == option))
        };
        let line = mounts.lines().find(fits)?;
        line.split(' ').nth(4).map(PathBuf::from)
    };
    find("cgroup", "freezer").or_else(|| find("cgroup2", ""))
}

impl LxcStub {
    /// Creates the container `name` with the root filesystem `rootfs`. Its config is in `scratch`.
    ///
    /// # Panics
    /// If [`freezer`] returns none.
    #[must_use]
    pub fn new(scratch: &Scratch, name: &str, rootfs: &Path) -> LxcStub {
        let lxcpath = scratch.make("lxc");
        let dir = scratch.make(&format!("lxc/{name}"));
        let config = format!(
            "lxc.uts.name = {name}\nlxc.rootfs.path = dir:{}\n",
            rootfs.display()
        );
        std::fs::write(dir.join("config"), config).expect("writing a config");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let unique = format!("lxc.payload.{name}-{}-{number}", std::process::id());
        let group = freezer().expect("a freezer").join(unique);
        let programs = scratch.make("lxc-programs");
        std::fs::create_dir(&group).expect("creating a control group");
        let init = Command::new("sleep")
            .arg("infinity")
            .stdin(Stdio::null())
            .spawn()
            .expect("starting sleep");
        let stub = LxcStub {
            programs,
            added: Mutex::default(),
            lxcpath,
            name: name.to_owned(),
            group,
            init,
        };
        stub.add(stub.init.id());
        stub.write_program();
        stub
    }

    fn write_program(&self) {
        let real = crate::programs::in_path("lxc-info").expect("lxc-info");
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *' -H -s -p') echo 'State: RUNNING'; echo 'PID: {}';; *) exec {} \"$@\";; esac\n",
            self.init.id(),
            real.display()
        );
        let path = self.programs.join("lxc-info");
        std::fs::write(&path, script).expect("writing a program");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("setting a mode");
    }

    /// Puts a process into the container's control group.
    pub fn add(&self, pid: u32) {
        std::fs::write(self.group.join("cgroup.procs"), pid.to_string())
            .expect("moving a process to a control group");
        self.added.lock().expect("the processes").push(pid);
    }

    /// Lets the programs continue, and ends those that are left after a failure of the test.
    fn end_programs(&self) {
        for (file, running) in [("cgroup.freeze", "0"), ("freezer.state", "THAWED")] {
            let path = self.group.join(file);
            if path.try_exists().unwrap_or(false)
                && let Err(error) = std::fs::write(&path, running)
            {
                eprintln!("cannot write {}: {error}", path.display());
            }
        }
        let listed = std::fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        let added = self.added.lock().expect("the processes");
        for pid in added.iter().filter(|pid| {
            let pid = pid.to_string();
            listed.lines().any(|line| line == pid)
        }) {
            let output = crate::command::run("kill", ["-KILL", &pid.to_string()]);
            if output.code != 0 {
                eprintln!("{}", output.report());
            }
        }
    }

    /// Returns the arguments of the command that adopts the container.
    #[must_use]
    pub fn adopt(&self) -> [OsString; 4] {
        let path = self.lxcpath.clone().into_os_string();
        ["adopt".into(), self.name.clone().into(), "-P".into(), path]
    }

    /// Returns PATH for a command to which the container is running. To other commands, it is stopped.
    #[must_use]
    pub fn path_variable(&self) -> OsString {
        let mut path = self.programs.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        path
    }
}

impl Drop for LxcStub {
    fn drop(&mut self) {
        self.end_programs();
        // The init is a plain process of the test.
        let ended = self.init.kill().and_then(|()| self.init.wait());
        if let Err(error) = ended {
            eprintln!("cannot end a process: {error}");
        }
        for _ in 0..100 {
            if std::fs::remove_dir(&self.group).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        eprintln!("cannot remove {}", self.group.display());
    }
}
